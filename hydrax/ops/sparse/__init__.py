"""Sparse attention: keys that live for a while, masks that are given, keys in groups, and what selects by content."""

from hydrax.ops.sparse.blocks import block_topk_attention
from hydrax.ops.sparse.clusters import clustered_window
from hydrax.ops.sparse.groups import chunk_attention, landmark_attention
from hydrax.ops.sparse.lifetimes import lifetime_attention
from hydrax.ops.sparse.masks import block_mask_attention, masked_attention
from hydrax.ops.sparse.permuted import permuted_window
from hydrax.ops.sparse.pooled import causal_block_topk, pooled_keys
from hydrax.ops.sparse.ranked import ranked_ends
from hydrax.ops.sparse.sets import token_set_attention
from hydrax.ops.sparse.tokens import token_topk_attention
from hydrax.ops.sparse.window import leaving

__all__ = [
    "block_mask_attention",
    "block_topk_attention",
    "causal_block_topk",
    "chunk_attention",
    "clustered_window",
    "landmark_attention",
    "leaving",
    "lifetime_attention",
    "masked_attention",
    "permuted_window",
    "pooled_keys",
    "ranked_ends",
    "token_set_attention",
    "token_topk_attention",
]
