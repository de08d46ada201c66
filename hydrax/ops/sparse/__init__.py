"""Attention to some of the past: what tokens leave a window with, and keys in groups."""

from hydrax.ops.sparse.groups import chunk_attention, landmark_attention
from hydrax.ops.sparse.window import leaving

__all__ = ["chunk_attention", "landmark_attention", "leaving"]
