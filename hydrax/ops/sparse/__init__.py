"""Sparse attention: keys that live for a while, masks that are given, and what selects keys by their content."""

from hydrax.ops.sparse.lifetimes import lifetime_attention
from hydrax.ops.sparse.masks import block_mask_attention, masked_attention
from hydrax.ops.sparse.ranked import ranked_ends
from hydrax.ops.sparse.sets import token_set_attention
from hydrax.ops.sparse.tokens import token_topk_attention

__all__ = [
    "block_mask_attention",
    "lifetime_attention",
    "masked_attention",
    "ranked_ends",
    "token_set_attention",
    "token_topk_attention",
]
