"""Mixers that restrict softmax attention to a subset of the keys."""
