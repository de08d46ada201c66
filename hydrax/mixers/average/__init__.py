"""Mixers that average, convolve or filter over time."""
