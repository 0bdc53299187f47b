"""What the stage `tokens` is made of: libraries that encode, and shards of documents turned into token shards."""
