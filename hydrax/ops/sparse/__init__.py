"""Sparse attention: which keys a query reads, as arrays of various shapes."""

from hydrax.ops.sparse.masks import block_mask_attention as block_mask_attention, masked_attention as masked_attention
