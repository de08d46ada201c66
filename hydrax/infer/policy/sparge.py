"""SpargeAttn (arXiv 2502.18137): a map of blocks from pooled queries and keys, and a second test on the way."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp

from hydrax.core.build import Check, Fraction, Positive
from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array, Bool, Float, PyTree
from hydrax.infer.policy.base import Choice, Policy, Seen, blocks_of, by_query_head
from hydrax.ops.softmax.forms import MASKED
from hydrax.ops.sparse import block_mask_attention, masked_attention
from hydrax.ops.sparse.masks import PARTIAL, SKIP

Negative = Annotated[float, Check("a number < 0", lambda x: x < 0)]


@dataclasses.dataclass(frozen=True)
class Sparge(Policy):
    """Blocks of queries and keys are pooled to their means. Of the blocks whose members are alike (mean cosine of pairs
    above `alike`), each block of queries reads those of the highest softmax(q̄·k̄) that sum to `mass`; blocks that are
    not alike, the diagonal and, with `sink`, the first block are always read.

    With `skip` λ, the values of a block of keys are left out if all its scores are λ or more below the highest before:
    the weights of such a block still count in the denominator.
    """

    ABOUT: ClassVar[str] = "blocks of keys chosen by pooled queries and keys"

    query_block: Positive = 128  # queries of a block
    key_block: Positive = 64  # keys of a block
    mass: Fraction = 0.9  # of the pooled softmax that the chosen blocks have
    alike: float = 0.1  # mean cosine of a block, above which it is pooled
    sink: bool = True  # the first block is always read
    skip: Negative | None = None  # λ: blocks with scores so far below the highest add no values

    def select(self, seen: Seen, layer: int, handed: PyTree, memory: PyTree) -> Choice:
        (T, H), S = seen.q.shape[1:3], seen.slots
        C, b = min(self.query_block, T), self.key_block
        positions, real = blocks_of(seen.positions, C), blocks_of(seen.real, C)
        last = jnp.where(real, positions, -1).max(2)  # [B,NQ]
        held = jnp.arange(S)[None] <= last.max(1, keepdims=True)
        q, q_alike = _pooled(blocks_of(jnp.where(seen.real[..., None, None], seen.q, 0), C), real)
        keys = jnp.moveaxis(by_query_head(seen.k, H), 1, 2)
        k, k_alike = _pooled(blocks_of(keys, b), blocks_of(held, b))
        first = jnp.arange(k.shape[1]) * b
        past = (first <= last[..., None])[:, None]  # blocks that begin before the block of queries ends
        z = einsum("bnhk,bmhk->bhnm", q, k) * seen.scale
        z = jnp.where(past & (k_alike > self.alike)[:, :, None], z, MASKED)
        p = jnp.where(z > MASKED / 2, jax.nn.softmax(z, axis=-1), 0)
        order = jnp.argsort(-p, axis=-1)
        ranked = jnp.take_along_axis(p, order, axis=-1)
        chosen = jnp.cumsum(ranked, axis=-1) - ranked < self.mass  # the mass of those before it; the first always
        chosen = jnp.put_along_axis(jnp.zeros(p.shape, bool), order, chosen & (ranked > 0), axis=-1, inplace=False)
        always = (k_alike <= self.alike)[:, :, None] | (q_alike <= self.alike)[..., None]
        always |= (first + b > positions[:, :, :1])[:, None]  # the diagonal
        if self.sink:
            always |= first == 0
        map_ = (chosen | always) & past
        by_key = jnp.repeat(map_, b, axis=3)[..., :S]
        return Choice(jnp.repeat(by_key, C, axis=2)[:, :, :T], plan=map_)

    def attend(self, seen: Seen, choice: Choice) -> Float[Array, "B T H V"]:
        C = min(self.query_block, seen.q.shape[1])
        at = jnp.broadcast_to(jnp.arange(seen.slots)[None], seen.k.shape[:2])
        o, lse = block_mask_attention(
            seen.q,
            seen.k,
            seen.v,
            jnp.where(choice.plan, PARTIAL, SKIP),
            block=(C, self.key_block),
            kv_positions=at,
            return_lse=True,
            **seen.facts(),
        )
        if self.skip is None:
            return o
        read = self._read(seen, choice.kept & seen.visible(), C)
        o, part = masked_attention(seen.q, seen.k, seen.v, read, return_lse=True, **seen.facts())
        share = jnp.where(part > -jnp.inf, jnp.exp(part - lse), 0)  # of the denominator, which has all blocks
        return (o * share[..., None]).astype(o.dtype)

    def _read(self, seen: Seen, kept: Array, C: int) -> Bool[Array, "B H T S"]:
        """The keys whose values are read: those of blocks in which any query comes near its highest score so far."""
        assert self.skip is not None
        B, H, T, S = *kept.shape[:3], seen.slots
        b, N = self.key_block, -(-seen.slots // self.key_block)
        z = jnp.where(kept, seen.scores(), MASKED)
        z = jnp.pad(z, ((0, 0), (0, 0), (0, 0), (0, N * b - S)), constant_values=MASKED)
        highest = z.reshape(B, H, T, N, b).max(-1)
        running = jax.lax.cummax(highest, axis=3)
        close = highest - running > self.skip
        rows = blocks_of(jnp.moveaxis(close & (highest > MASKED / 2), 2, 1), C).any(2)  # [B,NQ,H,N]
        rows = jnp.moveaxis(jnp.repeat(rows, C, axis=1)[:, :T], 1, 2)
        return kept & jnp.repeat(rows, b, axis=3)[..., :S]


def _pooled(x: Float[Array, "B N C H K"], held: Bool[Array, "B N C"]) -> tuple[Array, Array]:
    """The mean [B,N,H,K] of what each block holds, and the mean cosine [B,H,N] of all pairs in it."""
    weight = held[..., None, None]
    x = jnp.where(weight, fp32(x), 0)
    count = jnp.maximum(weight.sum(2), 1)
    unit = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
    cosine = jnp.square(unit.sum(2) / count).sum(-1)
    return x.sum(2) / count, jnp.moveaxis(cosine, 2, 1)
