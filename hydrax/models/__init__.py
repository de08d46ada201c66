"""One language model over a list of layers, written as a pattern."""
