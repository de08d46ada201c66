"""Documents packed in one row: `segment_ids` int32 [B,T], one contiguous run per document, 0 = right padding."""

import jax
import jax.numpy as jnp

from hydrax.core.typing import Array, Bool, Int


def fill_padding(segment_ids: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Ids with padding joined to the last document (so that its state passes through), and the mask of real tokens."""
    valid = segment_ids != 0
    last = jnp.take_along_axis(segment_ids, jnp.maximum(valid.sum(1, keepdims=True) - 1, 0), axis=1)
    return jnp.where(valid, segment_ids, last), valid


def document_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Index of every token inside its document: 0, 1, 2, ... from each change of id."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    start = segment_ids != jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    first = jnp.where(start, index, 0)
    return index - jax.lax.cummax(first, axis=1)


def changes(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Whether a token belongs to another document than the one before it; what comes before token 0 is not another."""
    return segment_ids != jnp.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1)


def ids_before(seg: Int[Array, "B N C"]) -> Int[Array, "B N"]:
    """The id of the token before each chunk. What comes before the row belongs to the document of token 0."""
    return jnp.concatenate([seg[:, :1, 0], seg[:, :-1, -1]], axis=1)


def chunk_masks(seg: Int[Array, "B N C"], before: Int[Array, "B N"]) -> tuple[Array, Array, Array, Array]:
    """How the tokens of each chunk relate, for forms that carry one state from chunk to chunk.

    Returns `same` [B,N,C,C] (both in one document), `enters` [B,N,C] (in the document of the incoming state),
    `leaves` [B,N,C] (in the document of the outgoing state), `keep` [B,N] (incoming state survives the chunk).
    """
    last = seg[:, :, -1]
    same = seg[..., :, None] == seg[..., None, :]
    return same, seg == before[..., None], seg == last[..., None], before == last
