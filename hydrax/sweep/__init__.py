"""Sweeps: grids of runs, and what runs them on one machine or on Slurm."""
