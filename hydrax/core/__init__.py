"""Types, configuration and numerics shared by every other room."""
