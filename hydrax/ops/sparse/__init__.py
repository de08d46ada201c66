"""Sparse attention: keys that live for a while, and what selects keys by their content."""

from hydrax.ops.sparse.lifetimes import lifetime_attention
from hydrax.ops.sparse.ranked import ranked_ends

__all__ = ["lifetime_attention", "ranked_ends"]
