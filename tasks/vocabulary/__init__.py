"""What the stage `tokenizer` is made of: vocabularies that are written down, trained or fetched."""
