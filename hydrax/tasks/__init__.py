"""Synthetic tasks, each a pure function of (seed, step) in numpy."""
