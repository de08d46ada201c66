"""Sweeps: files whose get_sweep returns a grid of runs for launch.sweep."""
