"""Command-line entry points; the logic lives in hydrax."""
