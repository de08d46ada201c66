"""From files to batches: read, encode, pack, resume."""
