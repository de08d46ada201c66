"""Sparse attention: keys that live for a while, and what selects keys by their content."""

from hydrax.ops.sparse.lifetimes import lifetime_attention

__all__ = ["lifetime_attention"]
