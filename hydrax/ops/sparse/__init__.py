"""Attention to some of the past: what tokens leave a window with, keys in groups, keys near in another order."""

from hydrax.ops.sparse.groups import chunk_attention, landmark_attention
from hydrax.ops.sparse.permuted import permuted_window
from hydrax.ops.sparse.window import leaving

__all__ = ["chunk_attention", "landmark_attention", "leaving", "permuted_window"]
