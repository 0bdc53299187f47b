"""What the stage `documents` is made of: sources, rules, duplicates, contamination, and the pipeline through them."""
