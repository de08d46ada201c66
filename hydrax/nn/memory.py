"""Memories beside the mixers (after Hydra, arXiv 2508.15099, made causal): a workspace of slots that a document fills
as it goes, and a table of learned values under product keys (arXiv 1907.05242)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core import tree
from hydrax.core.build import ConfigError, Fraction, Positive
from hydrax.core.numerics import einsum, fp32, wide
from hydrax.core.typing import Array, Bool, Float, Int
from hydrax.nn.linear import Linear
from hydrax.nn.param import param
from hydrax.ops import documents

State = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class WorkspaceConfig:
    slots: Positive = 64  # M per document
    rank: Positive = 128  # of the maps with which tokens read slots
    chunk: Positive = 32  # tokens, counted from the start of the document, that are written at once
    write_slots: Positive | None = None  # how many slots, those of least norm, a chunk is written into; M / 2 if None
    blend: Fraction = 0.1  # share of the new content in a written slot

    def __post_init__(self) -> None:
        if self.write_slots is not None and self.write_slots > self.slots:
            raise ConfigError("write_slots", self.write_slots, f"expected at most slots = {self.slots}")

    def flops(self, d_model: int) -> float:
        """Forward FLOPs per token of reading the slots; a write is spread over its chunk, and is not counted."""
        return 4 * self.slots * d_model


@dataclasses.dataclass(frozen=True)
class PKMConfig:
    rows: Positive = 64  # R, sub-keys per table: the memory has R² values
    key_dim: Positive = 64  # K of a sub-key
    top_k: Positive = 4  # sub-keys kept per table, and values read
    value_dim: Positive = 128  # V of a value

    def __post_init__(self) -> None:
        if self.top_k > self.rows:
            raise ConfigError("top_k", self.top_k, f"expected at most rows = {self.rows}")

    def flops(self, d_model: int) -> float:
        """Forward FLOPs per token of scoring the sub-keys and reading the values."""
        return 4 * self.rows * self.key_dim + 2 * self.top_k * self.value_dim


def state_bytes(cfg: WorkspaceConfig, d_model: int, itemsize: int) -> int:
    """Bytes of one row's workspace: slots and running sum, fp32 in every compute dtype."""
    return 4 * (cfg.slots + 1) * d_model


class _Blocks(NamedTuple):
    """Which slots the tokens of each block see, and what the block leaves.

    Attributes:
      before: [N,B,C], in the chunk of the block's first token: reads the slots as they come in.
      after: [N,B,C], in a later chunk of the same document: reads the slots as this block writes them.
      fresh: [N,B,C], in a document that starts inside the block: reads the initial slots.
      pending: [N,B,C], in the chunk that is in progress after the block.
      continues: [N,B], the first token is in the document of the incoming slots.
      writes: [N,B], a chunk ends in this block.
    """

    before: Array
    after: Array
    fresh: Array
    pending: Array
    continues: Array
    writes: Array


def _blocks(seg: Int[Array, "B T"], ends: Bool[Array, "B T"], size: int) -> _Blocks:
    """The masks of blocks of `size` tokens, at most a chunk, from filled ids and the tokens that end a chunk.

    Two chunks end at least `chunk` tokens apart, whatever documents they belong to, because a document that is shorter
    ends none. So at most one ends in a block; it began with the block's first token or before, in its document.
    """
    starts = documents.changes(seg)
    epoch = jnp.cumsum(starts, axis=1) + jnp.cumsum(ends, axis=1) - ends  # counts the chunks of the row
    seg, starts, ends, epoch = (_cut(a, size) for a in (seg, starts, ends, epoch))
    before, document = epoch == epoch[..., :1], seg == seg[..., :1]
    return _Blocks(
        before=before,
        after=document & ~before,
        fresh=~document,
        pending=epoch == epoch[..., -1:] + ends[..., -1:],
        continues=~starts[..., 0],
        writes=ends.any(-1),
    )


def _cut(a: Array, size: int) -> Array:
    """[B,T,...] -> [N,B,size,...]."""
    return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)


class Workspace(nnx.Module):
    """M slots S [M,D] per document, learned at its start, read by every token and written by every whole chunk:

        p_ti = softmax_i(D^-½ (W_k W_q x_t)·S_i),   y_t = W_o (r_t W_v Σ_i p_ti S_i),   (r, w)_t = softmax(W_g x_t);
        S_i ← (1 - blend) S_i + blend · w m   for the `write_slots` slots of least norm,

    m the mean of the chunk's x and w the second gate of m. A token in chunk c of its document reads what chunks up to
    c - 1 have left. The token itself is the query: it is the newest thing a causal read may know, and needs no state
    beyond slots and running sum. The choice of slots has no gradient; what is written has.

    The state is dict(slots [B,M,D], the difference to the learned slots; total [B,D], the sum of the x of the chunk in
    progress), fp32; zeros stand before the first token. Positions count from 0 in each document.
    """

    def __init__(self, d_model: int, cfg: WorkspaceConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.write_slots = cfg.write_slots or -(-cfg.slots // 2)
        # small beside what is written, and distinct: equal slots would be written alike for ever
        self.slots = param(rngs, jax.nn.initializers.normal(0.02), (cfg.slots, d_model), ("slots", "embed"))
        self.query = Linear(d_model, cfg.rank, axes=("embed", "rank"), rngs=rngs)
        self.key = Linear(cfg.rank, d_model, axes=("rank", "embed"), rngs=rngs)
        self.value = Linear(d_model, cfg.rank, axes=("embed", "rank"), rngs=rngs)
        self.gate = Linear(d_model, 2, axes=("embed", "gates"), rngs=rngs)
        self.project = Linear(cfg.rank, d_model, axes=("rank", "embed"), residual=True, rngs=rngs)

    def init_state(self, batch: int, dtype: jnp.dtype) -> State:
        """The state before token 0: zeros, in fp32 also where the compute dtype is narrower."""
        M, D = self.slots.shape[-2:]  # a stack of layers may be asked
        return {"slots": jnp.zeros((batch, M, D), wide(dtype)), "total": jnp.zeros((batch, D), wide(dtype))}

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T D"], State]:
        """y and the state after the last real token: a scan over blocks that writes, then all reads at once."""
        B, T, D = x.shape
        before = self.init_state(B, x.dtype) if state is None else state
        C = min(self.cfg.chunk, T)
        seg, real, ends = self._tokens(positions, segment_ids, padding=-T % C)
        blocks, tokens = _blocks(seg, ends, C), _cut(jnp.pad(x, ((0, 0), (0, -T % C), (0, 0))), C)
        summed = jnp.where(_cut(real, C)[..., None], fp32(tokens), 0)

        def write(before: State, inputs: tuple[_Blocks, Array]) -> tuple[State, tuple[Array, Array]]:
            block, x = inputs
            before = tree.where(block.continues, before, jax.tree.map(jnp.zeros_like, before))
            old, total = before["slots"], before["total"]
            chunk = total + einsum("bc,bcd->bd", block.before, x)
            new = tree.where(block.writes, self._write(old, chunk / self.cfg.chunk), old)
            left = tree.where(block.fresh[:, -1], jnp.zeros_like(new), new)
            kept = tree.where(block.pending[:, 0], total, jnp.zeros_like(total))
            return {"slots": left, "total": kept + einsum("bc,bcd->bd", block.pending, x)}, (old, new)

        after, (old, new) = jax.lax.scan(write, before, (blocks, summed))
        initial = jnp.zeros_like(self.slots[...])
        y = self._read(tokens, (old, blocks.before), (new, blocks.after), (initial, blocks.fresh))
        return jnp.moveaxis(y, 0, 1).reshape(B, -1, D)[:, :T], after

    def recurrent(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T D"], State]:
        """The definition, token by token: what the call must equal."""
        before = self.init_state(x.shape[0], x.dtype) if state is None else state
        seg, real, ends = self._tokens(positions, segment_ids)

        def token(before: State, inputs: tuple[Array, ...]) -> tuple[State, Array]:
            x, start, real, end = inputs
            before = tree.where(start, jax.tree.map(jnp.zeros_like, before), before)
            y = self._read(x[:, None], (before["slots"], jnp.ones_like(real)[:, None]))
            total = before["total"] + jnp.where(real[:, None], fp32(x), 0)
            done = {"slots": self._write(before["slots"], total / self.cfg.chunk), "total": jnp.zeros_like(total)}
            return tree.where(end, done, {**before, "total": total}), y[:, 0]

        inputs = tuple(jnp.moveaxis(a, 1, 0) for a in (x, documents.changes(seg), real, ends))
        after, y = jax.lax.scan(token, before, inputs)
        return jnp.moveaxis(y, 0, 1), after

    def _tokens(
        self, positions: Array, segment_ids: Array | None, padding: int = 0
    ) -> tuple[Int[Array, "B T"], Bool[Array, "B T"], Bool[Array, "B T"]]:
        """Ids with padding (and more of it) joined to the last document, which tokens are real, which end a chunk."""
        ids = jnp.ones_like(positions) if segment_ids is None else segment_ids
        ids, positions = (jnp.pad(a, ((0, 0), (0, padding))) for a in (ids, positions))
        seg, real = documents.fill_padding(ids)
        return seg, real, real & ((positions + 1) % self.cfg.chunk == 0)

    def _write(self, slots: Float[Array, "B M D"], mean: Float[Array, "B D"]) -> Float[Array, "B M D"]:
        """The slots (as differences) after a chunk of that mean."""
        now = self.slots[...] + slots
        _, least = jax.lax.top_k(-jnp.sum(now * now, axis=-1), self.write_slots)
        chosen = jax.nn.one_hot(least, now.shape[1], dtype=now.dtype).sum(1)
        content = jax.nn.softmax(self.gate(mean))[:, 1:] * mean
        return slots + self.cfg.blend * chosen[..., None] * (content[:, None] - now)

    def _read(self, x: Float[Array, "*N C D"], *seen: tuple[Array, Array]) -> Float[Array, "*N C D"]:
        """y of tokens, each of which is in one mask [*N,C] of `seen` and reads the slots [*N,M,D] beside it.

        W_k and W_v stay with the tokens: to project the slots would cost more wherever a block has fewer tokens than
        slots.
        """
        slots = [(self.slots[...] + difference).astype(x.dtype) for difference, _ in seen]
        masks = [mask[..., None] for _, mask in seen]
        q = self.key(self.query(x))
        scores = jnp.select(masks, [einsum("...cd,...md->...cm", q, s) for s in slots])
        p = jax.nn.softmax(scores * x.shape[-1] ** -0.5).astype(x.dtype)
        read = jnp.select(masks, [einsum("...cm,...md->...cd", p, s) for s in slots])
        gate = jax.nn.softmax(fp32(self.gate(x)))[..., :1]
        return self.project((gate * self.value(read.astype(x.dtype))).astype(x.dtype))


class PKM(nnx.Module):
    """R² learned values v_ij under the sums of two sub-keys each (arXiv 1907.05242, one head, no query norm):

        s_ij = q¹·k¹_i + q²·k²_j,   (q¹, q²) = W_q x;   y = σ(W x - 2) W_v Σ softmax(s) v   over the k largest s_ij.

    The k largest sums are among the k x k of the best k sub-keys of either table, so none of the others is formed.
    W x is one number per token: the memory opens and closes as a whole.
    """

    def __init__(self, d_model: int, cfg: PKMConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        R, K, V = cfg.rows, cfg.key_dim, cfg.value_dim
        normal = jax.nn.initializers.normal
        self.query = Linear(d_model, (2, K), axes=("embed", "tables", "state_k"), rngs=rngs)
        self.keys = param(rngs, normal(K**-0.5), (2, R, K), ("tables", "rows", "state_k"), cast=True)
        # a lookup, like the token embedding: sharded as that and without weight decay
        self.values = param(rngs, normal(V**-0.5), (R * R, V), ("vocab", "embed"), cast=True)
        self.gate = Linear(d_model, 1, axes=("embed", "gates"), rngs=rngs)
        self.project = Linear(V, d_model, axes=("state_v", "embed"), residual=True, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        k = self.cfg.top_k
        scores = einsum("bthk,hrk->bthr", self.query(x), self.keys[...].astype(x.dtype))
        best, rows = jax.lax.top_k(scores, k)
        sums = (best[:, :, 0, :, None] + best[:, :, 1, None, :]).reshape(*x.shape[:2], k * k)
        score, pair = jax.lax.top_k(sums, k)
        row, column = (jnp.take_along_axis(rows[:, :, i], at, axis=-1) for i, at in enumerate((pair // k, pair % k)))
        values = self.values[...][row * self.cfg.rows + column]
        read = einsum("btk,btkv->btv", jax.nn.softmax(score), values).astype(x.dtype)
        return self.project((jax.nn.sigmoid(fp32(self.gate(x)) - 2) * read).astype(x.dtype))
