"""Token shards on disk, and the pure function from a sample index to a window of tokens."""
