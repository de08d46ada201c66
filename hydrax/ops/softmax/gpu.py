"""Softmax attention on Hopper GPUs, forward and backward, to keys that live for a while or whose blocks are chosen.

    o_t = Σ_s p_ts v_s,   p_ts = e^{z_ts - lse_t},   z_ts = scale · q_t·k_s + bias_s,   first_t <= s <= t <= end_s

or first_t <= s <= last_t, of keys that are not the queries' own.

Blocks of keys that no query of a block sees are never loaded: XLA lists the others (`live`) and what needs a mask.
The forward pass is that of arXiv 2205.14135. The backward pass forms p again, once for dq by blocks of queries and once
for dk and dv by blocks of keys, so that no two thread blocks add to one gradient:

    dz_ts = p_ts (do_t·v_s - δ_t),    δ_t = do_t·o_t - dlse_t,
    dq_t = scale Σ_s dz_ts k_s,    dk_s = scale Σ_t dz_ts q_t,    dv_s = Σ_t p_ts do_t,    dbias_s = Σ_t dz_ts

with the sums over t also over all query heads of a key's head.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, PyTree
from hydrax.ops.dispatch import KERNEL
from hydrax.ops.pallas import compat, ring, tiles
from hydrax.ops.pallas.chunks import WIDTHS
from hydrax.ops.pallas.tiles import BLOCK, TILED
from hydrax.ops.pallas.tuning import TUNING, Tuning
from hydrax.ops.softmax import live
from hydrax.ops.softmax.live import EVERYTHING, Choice

WORKERS = 2
"""Warpgroups of a thread block that multiply, each for 64 rows."""

ROWS = live.BLOCK
"""Query rows, or keys, that a thread block is for."""

LOG2E = math.log2(math.e)
MASKED = -1e30
"""Score of an invisible key. What a query gathers before it meets a visible one is forgotten when it does."""

NOTHING = 1e30
"""lse of a query that sees nothing, while it is in kernels: there all its weights are 0."""


@dataclasses.dataclass(frozen=True)
class Plan:
    scale: float
    tuning: Tuning
    choice: Choice


def refusal(q: Array, k: Array, v: Array, device: jax.Device | None = None) -> str | None:
    """Why these kernels cannot serve, or None."""
    kind = (device or jax.devices()[0]).device_kind
    if {x.dtype for x in (q, k, v)} != {jnp.dtype(jnp.bfloat16)}:
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: these kernels multiply bfloat16"
    if q.shape[-1] not in WIDTHS or v.shape[-1] not in WIDTHS:
        return f"K, V = {q.shape[-1]}, {v.shape[-1]}: expected 64 or 128"
    if kind not in TUNING:
        return f"the device is {kind!r}: expected one of {', '.join(TUNING)}"
    return None


def attend(
    q: Array,
    k: Array,
    v: Array,
    first: Array,
    scale: float,
    *,
    last: Array | None = None,
    end: Array | None = None,
    by_life: bool = False,
    bias: Array | None = None,
    chosen: Array | None = None,
    choice: Choice = EVERYTHING,
    tuning: Tuning | None = None,
) -> tuple[Array, Array]:
    """o [B,Q,H,V] and lse fp32 [B,Q,H] of Q = T·per query rows, those of a token in a row.

    Args:
      q: [B,Q,H,K]; k, v: [B,T,Hk,K] and [B,T,Hk,V].
      first: int32 [B,T], never decreasing: the first key that each token sees. With `last` [B,1 or Hk,Q].
      last: int32 [B,1 or Hk,Q], never decreasing: the last key that each row sees, none where it is below `first`. Rows
        and keys are then no tokens of one sequence. Neither `end` nor `chosen` may be with it.
      end: int32 [B,T,1 or Hk], the last token that sees each key, up to `live.FOREVER`.
      by_life: whether keys that live equally long are brought together, as some outlive many that come after them. It
        moves all keys and values once.
      bias: [B,T,Hk], added to the scores of each key; it has a gradient.
      chosen: int32 [B,Hk,W,T], of `live.words`: the blocks of keys that each token sees.
      choice: size of these blocks, and `per`.
    """
    Q, T = q.shape[1], k.shape[1]
    more = -T % ROWS
    k, v = _padded(k, more), _padded(v, more)
    if last is None:
        q = _padded(q, more * choice.per)
        own = jnp.broadcast_to(jnp.arange(T, T + more, dtype=jnp.int32), (k.shape[0], more))
        first = jnp.concatenate([jnp.broadcast_to(first, (k.shape[0], T)), own], axis=1)
        bounds = {"first": jnp.repeat(first, choice.per, axis=1)[:, None]}
    else:
        q, fill = _padded(q, -Q % ROWS), [(0, 0), (0, 0), (0, -Q % ROWS)]
        bounds = {"first": jnp.pad(first, fill, constant_values=T + 1), "last": jnp.pad(last, fill, constant_values=T)}
        bounds = {name: jnp.broadcast_to(x, (k.shape[0], *x.shape[1:])) for name, x in bounds.items()}
    facts = {}
    if bias is not None:
        facts["bias"] = jnp.moveaxis(_padded(fp32(bias), more), 1, 2)
    if end is not None:
        end, index = jnp.moveaxis(_padded(end, more), 1, 2), jnp.arange(T + more, dtype=jnp.int32)
        end = jnp.where(end < index, -1, jnp.where(end >= T - 1, live.FOREVER, end))
        facts["end"] = jnp.broadcast_to(end, (k.shape[0], *end.shape[1:]))
    if by_life:
        places, back = live.order(facts["end"])
        k, v, *others = (moved(places, back, x) for x in (k, v, *(jnp.moveaxis(x, 1, 2) for x in facts.values())))
        facts = {name: jnp.moveaxis(x, 1, 2) for name, x in zip(facts, others, strict=True)} | {"at": places}
    if chosen is not None:
        chosen = jnp.repeat(jnp.pad(chosen, [(0, 0)] * 3 + [(0, more)]), choice.per, axis=-1)
    plan = Plan(scale, tuning or TUNING[jax.devices()[0].device_kind], choice)
    o, lse = _attend(plan, q, k, v, bounds, facts, chosen)
    lse = jnp.where(lse >= NOTHING / 2, -jnp.inf, lse)
    return o[:, :Q], jnp.moveaxis(lse, 1, 2)[:, :Q]


def _padded(x: Array, more: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))


@jax.custom_vjp
def moved(places: Array, back: Array, x: Array) -> Array:
    """The keys x [B,T,G,...] at `places` [B,1 or G,T], which are a permutation; `back` is its inverse.

    The gradient gathers too: XLA would add it up by atomic operations.
    """
    index = jnp.moveaxis(places, 1, 2)
    index = jnp.broadcast_to(index, (*x.shape[:2], max(x.shape[2], index.shape[2])))
    x = jnp.broadcast_to(x, (*index.shape, *x.shape[3:]))
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 3)), axis=1)


def _moved_forward(places: Array, back: Array, x: Array) -> tuple[Array, tuple]:
    return moved(places, back, x), (places, back)


def _moved_backward(saved: tuple, dx: Array) -> tuple:
    places, back = saved
    return None, None, moved(back, places, dx)


moved.defvjp(_moved_forward, _moved_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    plan: Plan, q: Array, k: Array, v: Array, bounds: dict[str, Array], facts: dict[str, Array], chosen: Array | None
) -> tuple[Array, Array]:
    return _outputs(plan, q, k, v, bounds, facts, chosen)


def _forward(plan: Plan, *inputs: PyTree) -> tuple[tuple, tuple]:
    found = checkpoint_name(_outputs(plan, *inputs), KERNEL)
    return found, (*inputs, *found)


def _backward(plan: Plan, saved: tuple, cotangents: tuple) -> tuple:
    dq, dk, dv, dfacts = _gradients(plan, saved, *cotangents)
    return dq, dk, dv, None, {name: dfacts.get(name) for name in saved[4]}, None


_attend.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=0)  # equal layers share a trace: it takes longer than all else
def _outputs(
    plan: Plan, q: Array, k: Array, v: Array, bounds: dict[str, Array], facts: dict[str, Array], chosen: Array | None
) -> tuple[Array, Array]:
    (B, Q, H, K), V = q.shape, v.shape[-1]
    widths = (K + V) // BLOCK
    stages = plan.tuning.stages_of(WORKERS * widths, WORKERS * widths, WORKERS * len(facts))
    blocks = live.listed(*_tables(plan, bounds, k, facts, chosen))
    o, lse = compat.launch(
        functools.partial(_output_body, plan),
        ({"q": q}, {"k": k, "v": v}, facts, bounds | {"chosen": chosen}, blocks),
        (jax.ShapeDtypeStruct((B, Q, H, V), v.dtype), jax.ShapeDtypeStruct((B, H, Q), jnp.float32)),
        scratch={
            "own_s": {"q": tiles.scratch(q.dtype, WORKERS, BLOCK, K)},
            "key_s": {"k": tiles.scratch(k.dtype, stages, ROWS, K), "v": tiles.scratch(v.dtype, stages, ROWS, V)},
            "fact_s": _vectors(facts, stages, ROWS),
            "out_s": tiles.scratch(v.dtype, WORKERS, BLOCK, V),
            "lse_s": plgpu.SMEM((WORKERS, BLOCK), jnp.float32),
            "ready": plgpu.Barrier(num_arrivals=1, num_barriers=(WORKERS,)),
            **ring.barriers(stages, 2 + len(facts), WORKERS),
        },
        grid={"h": H, "i": Q // ROWS, "b": B},
        warpgroups=WORKERS + 1,
    )
    return o, lse


@functools.partial(jax.jit, static_argnums=0)
def _gradients(plan: Plan, saved: tuple, do: Array, dlse: Array) -> tuple[Array, Array, Array, dict[str, Array]]:
    q, k, v, bounds, facts, chosen, o, lse = saved
    (B, Q, H, K), (T, Hk, V) = q.shape, v.shape[1:]
    parts = _parts(H // Hk * Q // T)
    delta = jnp.einsum("bthv,bthv->bht", fp32(do), fp32(o)) - dlse
    tables = _tables(plan, bounds, k, facts, chosen)
    by_rows, by_keys = live.listed(*tables), live.listed(*(jnp.swapaxes(x, -1, -2) for x in tables))
    widths = (K + V) // BLOCK
    stages = plan.tuning.stages_of(WORKERS * widths, WORKERS * widths, WORKERS * len(facts))
    (dq,) = compat.launch(
        functools.partial(_query_body, plan),
        ({"q": q, "do": do}, {"k": k, "v": v}, facts, bounds | {"chosen": chosen}, by_rows, lse, delta),
        (jax.ShapeDtypeStruct(q.shape, q.dtype),),
        scratch={
            "own_s": {"q": tiles.scratch(q.dtype, WORKERS, BLOCK, K), "do": tiles.scratch(v.dtype, WORKERS, BLOCK, V)},
            "key_s": {"k": tiles.scratch(k.dtype, stages, ROWS, K), "v": tiles.scratch(v.dtype, stages, ROWS, V)},
            "fact_s": _vectors(facts, stages, ROWS),
            "ready": plgpu.Barrier(num_arrivals=2, num_barriers=(WORKERS,)),
            **ring.barriers(stages, 2 + len(facts), WORKERS),
        },
        grid={"h": H, "i": Q // ROWS, "b": B},
        warpgroups=WORKERS + 1,
    )
    per_row = {"lse": lse, "delta": delta} | {name: jnp.broadcast_to(x, lse.shape) for name, x in bounds.items()}
    vectors = len(per_row) + (chosen is not None)
    stages = plan.tuning.stages_of(widths, 2 * WORKERS * widths, vectors)
    types = {name: jax.ShapeDtypeStruct((B, T, Hk * parts, x.shape[-1]), x.dtype) for name, x in (("k", k), ("v", v))}
    out_s = {"k": tiles.scratch(k.dtype, WORKERS, BLOCK, K), "v": tiles.scratch(v.dtype, WORKERS, BLOCK, V)}
    if "bias" in facts:
        types["bias"] = jax.ShapeDtypeStruct((B, Hk * parts, T), jnp.float32)
        out_s["bias"] = plgpu.SMEM((WORKERS, BLOCK), jnp.float32)
    words = {} if chosen is None else {"chosen": chosen}
    found = compat.launch(
        functools.partial(_key_body, plan, H // Hk, parts),
        ({"q": q, "do": do}, {"k": k, "v": v}, facts, per_row, words, by_keys),
        types,
        scratch={
            "own_s": {"k": tiles.scratch(k.dtype, WORKERS, BLOCK, K), "v": tiles.scratch(v.dtype, WORKERS, BLOCK, V)},
            "row_s": {"q": tiles.scratch(q.dtype, stages, BLOCK, K), "do": tiles.scratch(v.dtype, stages, BLOCK, V)},
            "fact_s": _vectors(per_row | words, stages, BLOCK),
            "out_s": out_s,
            "ready": plgpu.Barrier(num_arrivals=2, num_barriers=(WORKERS,)),
            **ring.barriers(stages, 2 + vectors, WORKERS),
        },
        grid={"h": Hk * parts, "j": T // ROWS, "b": B},
        warpgroups=WORKERS + 1,
    )
    if parts > 1:
        axis = {"k": 3, "v": 3, "bias": 2}
        split = {n: x.reshape(*x.shape[: axis[n] - 1], Hk, parts, *x.shape[axis[n] :]) for n, x in found.items()}
        found = {n: fp32(x).sum(axis[n]).astype(x.dtype) for n, x in split.items()}
    return dq, found.pop("k"), found.pop("v"), found


def _parts(rows: int) -> int:
    """Thread blocks that share the rows of a block of keys, by rows per key: else one whose keys all rows see, as those
    of the first block that many masks keep, would be the last to end by far."""
    return min(16, max(1, rows // 4))


def _tables(
    plan: Plan, bounds: Mapping[str, Array], k: Array, facts: Mapping[str, Array], chosen: Array | None
) -> tuple[Array, Array]:
    keys = facts.get("at"), facts.get("end")
    return live.tables(plan.choice, bounds["first"], bounds.get("last"), k.shape[1], *keys, chosen)


def _vectors(facts: Mapping[str, Array], stages: int, length: int) -> dict[str, PyTree]:
    """Room for a vector of each fact."""
    return {name: plgpu.SMEM((stages, length), x.dtype) for name, x in facts.items()}


def _group(h: Array, heads: int, x: PyTree) -> Array:
    """The head of x [B,G,...] that serves head h of `heads`."""
    return jax.lax.div(h, jnp.int32(heads // x.shape[1]))


def _token(plan: Plan, row: Array) -> Array:
    return row if plan.choice.per == 1 else jax.lax.div(row, jnp.full_like(row, plan.choice.per))


def _has(words: Array, bit: Array) -> Array:
    return jax.lax.shift_right_logical(words, jnp.broadcast_to(bit, words.shape)) & 1 == 1


def _as_workers(work: Callable, load: Callable) -> None:
    """`work(wg)` in the warpgroups that multiply, `load()` in the last."""
    wg = jax.lax.axis_index("wg")

    @pl.when(wg < WORKERS)
    def _() -> None:
        plgpu.set_max_registers(240, action="increase")
        work(wg)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == WORKERS)
    def _() -> None:
        plgpu.set_max_registers(24, action="decrease")
        load()


def _own_rows(sources: dict[str, PyTree], own_s: dict[str, PyTree], at: tuple, ready: PyTree) -> dict[str, PyTree]:
    """The warpgroup's rows `at` of the sources, in shared memory."""
    b, rows, h, wg = at
    for name, x in sources.items():
        plgpu.copy_gmem_to_smem(x.at[b, rows, h], own_s[name].at[wg], ready.at[wg])
    plgpu.barrier_wait(ready.at[wg])
    return {name: x_s.at[wg] for name, x_s in own_s.items()}


@dataclasses.dataclass(frozen=True)
class _Rows:
    """128 query rows of a head, those with the most keys first, and the blocks of keys they see."""

    plan: Plan
    heads: int
    keys: dict[str, PyTree]
    facts: dict[str, PyTree]
    per_row: dict[str, PyTree]
    blocks: tuple[PyTree, PyTree]

    @functools.cached_property
    def at(self) -> tuple[Array, Array, Array]:
        """Of the thread block: row of the batch, head, block of queries."""
        b, h, i = (jax.lax.axis_index(name) for name in ("b", "h", "i"))
        return b, h, self.blocks[0].shape[2] - 1 - i

    def _listed(self) -> tuple[Callable[[Array], Array], Array]:
        (codes, counts), (b, h, i) = self.blocks, self.at
        g = _group(h, self.heads, codes)
        return lambda n: codes[b, g, i, n], counts[b, g, i]

    def load(self, key_s: dict, fact_s: dict, full: PyTree, free: PyTree) -> None:
        """What `over_keys` waits for; for the loading warpgroup."""
        code, count = self._listed()
        b, h, _ = self.at

        def fetch(n: Array, slot: Array, full: PyTree) -> None:
            place = pl.ds(jax.lax.shift_right_logical(code(n), jnp.int32(1)) * ROWS, ROWS)
            for name, x in self.keys.items():
                plgpu.copy_gmem_to_smem(x.at[b, place, ring.head(h, self.heads, x)], key_s[name].at[slot], full)
            for name, x in self.facts.items():
                plgpu.copy_gmem_to_smem(x.at[b, _group(h, self.heads, x), place], fact_s[name].at[slot], full)

        ring.load_all([(fetch, full, free)], count)

    def over_keys(
        self, step: Callable, carry: PyTree, wg: Array, key_s: dict, fact_s: dict, full: PyTree, free: PyTree
    ) -> PyTree:
        """`step(keys, score, carry)` over the blocks of keys; `score(s)` adds the bias to products in units of log2,
        and hides those of the keys that a row does not see."""
        code, count = self._listed()
        b, h, i = self.at
        own = pl.ds(i * ROWS + wg * BLOCK, BLOCK)
        bounds = {n: self.per_row[n] for n in ("first", "last") if n in self.per_row}
        bounds = {n: compat.load(x.at[b, _group(h, self.heads, x), own], TILED.reduce(1)) for n, x in bounds.items()}
        chosen, choice = self.per_row["chosen"], self.plan.choice

        def block(n: Array, slot: Array, carry: PyTree) -> PyTree:
            this = code(n)
            start = jax.lax.shift_right_logical(this, jnp.int32(1)) * ROWS
            fact = {name: x.at[slot] for name, x in fact_s.items()}
            if chosen is not None:
                g = _group(h, self.heads, chosen)
                bits = compat.load(chosen.at[b, g, choice.word(start), own], TILED.reduce(1))

            def hide(s: Array) -> Array:
                column = tiles.index(1, ROWS)
                key = tiles.per_column(fact["at"]) if "at" in fact else start + column
                if "last" in bounds:
                    query = tiles.spread(bounds["last"], ROWS)
                else:
                    query = _token(self.plan, i * ROWS + wg * BLOCK + tiles.index(0, ROWS))
                s = jnp.where((key <= query) & (key >= tiles.spread(bounds["first"], ROWS)), s, MASKED)
                if "end" in fact:  # one after the other: each vector takes registers
                    s = jnp.where(tiles.per_column(fact["end"]) >= query, s, MASKED)
                if chosen is not None:
                    bit = choice.bit(start)
                    bit = jnp.where(column < choice.size, bit, bit + 1) if choice.size < ROWS else bit
                    s = jnp.where(_has(tiles.spread(bits, ROWS), bit), s, MASKED)
                return s

            def score(s: Array) -> Array:
                if "bias" in fact:
                    s = s + tiles.per_column(fact["bias"]) * LOG2E
                return jax.lax.cond(this & 1 == 1, hide, lambda s: s, s)

            return step({name: x.at[slot] for name, x in key_s.items()}, score, carry)

        return ring.work(block, carry, count, full.shape[0], full, free)


def _output_body(
    plan: Plan,
    inputs: tuple,
    outputs: tuple,
    *,
    own_s: dict,
    key_s: dict,
    fact_s: dict,
    out_s: PyTree,
    lse_s: PyTree,
    ready: PyTree,
    full: PyTree,
    free: PyTree,
) -> None:
    """o and lse of 128 query rows of a head."""
    queries, keys, facts, per_row, blocks = inputs
    over = _Rows(plan, queries["q"].shape[2], keys, facts, per_row, blocks)
    b, h, i = over.at
    V = out_s.shape[-1]

    def work(wg: Array) -> None:
        rows = pl.ds(i * ROWS + wg * BLOCK, BLOCK)
        own = _own_rows(queries, own_s, (b, rows, h, wg), ready)

        def step(key: dict, score: Callable, carry: tuple) -> tuple:
            o, top, total = carry
            s = score(tiles.mm((own["q"], compat.transpose(key["k"])), width=ROWS) * (plan.scale * LOG2E))
            before, top = top, jnp.maximum(top, s.max(1))
            p = jnp.exp2(s - tiles.spread(top, ROWS))
            keep = jnp.exp2(before - top)
            (o,) = tiles.accumulate([o * tiles.spread(keep, V)], [[(p.astype(out_s.dtype), key["v"])]])
            return o, top, total * keep + p.sum(1)

        carry = tiles.zeros(V), tiles.row_vector(MASKED), tiles.row_vector(0.0)
        o, top, total = over.over_keys(step, carry, wg, key_s, fact_s, full, free)
        some = top > MASKED / 2
        share = jnp.where(some, 1 / total, 0)  # nothing is kept of what was gathered from invisible keys
        out_s.at[wg][...] = (o * tiles.spread(share, V)).astype(out_s.dtype)
        lse_s.at[wg][...] = jnp.where(some, top / LOG2E + jnp.log(total), NOTHING)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s.at[wg], outputs[0].at[b, rows, h])
        plgpu.copy_smem_to_gmem(lse_s.at[wg], outputs[1].at[b, h, rows])

    _as_workers(work, lambda: over.load(key_s, fact_s, full, free))


def _query_body(
    plan: Plan,
    inputs: tuple,
    outputs: tuple,
    *,
    own_s: dict,
    key_s: dict,
    fact_s: dict,
    ready: PyTree,
    full: PyTree,
    free: PyTree,
) -> None:
    """dq of 128 query rows of a head."""
    queries, keys, facts, per_row, blocks, lse, delta = inputs
    over = _Rows(plan, queries["q"].shape[2], keys, facts, per_row, blocks)
    b, h, i = over.at

    def work(wg: Array) -> None:
        rows = pl.ds(i * ROWS + wg * BLOCK, BLOCK)
        own = _own_rows(queries, own_s, (b, rows, h, wg), ready)
        top, mean = (compat.load(x.at[b, h, rows], TILED.reduce(1)) for x in (lse, delta))
        top = top * LOG2E

        def step(key: dict, score: Callable, dq: Array) -> Array:
            pairs = [[(own[x], compat.transpose(key[y]))] for x, y in (("q", "k"), ("do", "v"))]
            s, dp = tiles.accumulate([tiles.zeros(ROWS)] * 2, pairs)
            p = jnp.exp2(score(s * (plan.scale * LOG2E)) - tiles.spread(top, ROWS))
            dz = p * (dp - tiles.spread(mean, ROWS))
            (dq,) = tiles.accumulate([dq], [[(dz.astype(own["q"].dtype), key["k"])]])
            return dq

        dq = over.over_keys(step, tiles.zeros(own["q"].shape[-1]), wg, key_s, fact_s, full, free)
        plgpu.commit_smem()  # all have read the queries, whose place dq takes
        tiles.store(dq * plan.scale, own["q"], outputs[0].at[b, rows, h])

    _as_workers(work, lambda: over.load(key_s, fact_s, full, free))


def _key_body(
    plan: Plan,
    group: int,
    parts: int,
    inputs: tuple,
    outputs: dict[str, PyTree],
    *,
    own_s: dict,
    row_s: dict,
    fact_s: dict,
    out_s: dict,
    ready: PyTree,
    full: PyTree,
    free: PyTree,
) -> None:
    """dk, dv and dbias of 128 keys, over a part of the blocks of 64 query rows of all `group` heads that they serve."""
    rows, keys, facts, per_row, words, (codes, counts) = inputs
    b, target, j = (jax.lax.axis_index(name) for name in ("b", "h", "j"))
    h, part = jax.lax.div(target, jnp.int32(parts)), jax.lax.rem(target, jnp.int32(parts))
    heads, choice = keys["k"].shape[2], plan.choice
    g = _group(h, heads, codes)
    per_head = WORKERS * counts[b, g, j]
    share = jax.lax.div(group * per_head + parts - 1, jnp.int32(parts))
    start = jnp.minimum(part * share, group * per_head)
    count = jnp.minimum(start + share, group * per_head) - start

    def place(n: Array) -> tuple[Array, Array]:
        """The n-th block: its first 64 rows, and whether it needs a mask."""
        m = jax.lax.rem(n, per_head)
        code = codes[b, g, j, jax.lax.div(m, jnp.int32(WORKERS))]
        row = jax.lax.shift_right_logical(code, jnp.int32(1)) * ROWS + jax.lax.rem(m, jnp.int32(WORKERS)) * BLOCK
        return row, code & 1 == 1

    def fetch(n: Array, slot: Array, full: PyTree) -> None:
        n = start + n
        head, own = h * group + jax.lax.div(n, per_head), pl.ds(place(n)[0], BLOCK)
        for name, x in rows.items():
            plgpu.copy_gmem_to_smem(x.at[b, own, head], row_s[name].at[slot], full)
        for name, x in per_row.items():
            plgpu.copy_gmem_to_smem(x.at[b, head, own], fact_s[name].at[slot], full)
        for name, x in words.items():
            word = x.at[b, _group(h, heads, x), choice.word(j * ROWS), own]
            plgpu.copy_gmem_to_smem(word, fact_s[name].at[slot], full)

    def work(wg: Array) -> None:
        key0 = j * ROWS + wg * BLOCK
        mine = pl.ds(key0, BLOCK)
        own = _own_rows(keys, own_s, (b, mine, h, wg), ready)
        fact = {name: compat.load(x.at[b, _group(h, heads, x), mine], TILED.reduce(1)) for name, x in facts.items()}

        def step(n: Array, slot: Array, carry: tuple) -> tuple:
            t, edge = place(start + n)
            row = {name: x.at[slot] for name, x in row_s.items()}
            of_row = {name: x.at[slot] for name, x in fact_s.items()}

            def hide(s: Array) -> Array:
                key = tiles.spread(fact["at"]) if "at" in fact else key0 + tiles.index(0)
                query = tiles.per_column(of_row["last"]) if "last" in of_row else _token(plan, t + tiles.index(1))
                s = jnp.where((key <= query) & (key >= tiles.per_column(of_row["first"])), s, MASKED)
                if "end" in fact:
                    s = jnp.where(tiles.spread(fact["end"]) >= query, s, MASKED)
                if words:
                    s = jnp.where(_has(tiles.per_column(of_row["chosen"]), choice.bit(key0)), s, MASKED)
                return s

            pairs = [[(own[x], compat.transpose(row[y]))] for x, y in (("k", "q"), ("v", "do"))]
            s, dp = tiles.accumulate([tiles.zeros()] * 2, pairs)
            s = s * plan.scale
            if "bias" in fact:
                s = s + tiles.spread(fact["bias"])
            s = jax.lax.cond(edge, hide, lambda s: s, s)
            p = jnp.exp2((s - tiles.per_column(of_row["lse"])) * LOG2E)
            dz = p * (dp - tiles.per_column(of_row["delta"]))
            low = dz.astype(row["q"].dtype)
            products = [[(low, row["q"])], [(p.astype(low.dtype), row["do"])]]
            dk, dv, *dbias = carry
            return *tiles.accumulate([dk, dv], products), *(x + dz.sum(1) for x in dbias)

        carry = tuple(tiles.zeros(x.shape[-1]) for x in (own["k"], own["v"]))
        if "bias" in fact:
            carry = *carry, tiles.row_vector(0.0)
        dk, dv, *dbias = ring.work(step, carry, count, full.shape[0], full, free)
        tiles.store(dk * plan.scale, out_s["k"].at[wg], outputs["k"].at[b, mine, target])
        tiles.store(dv, out_s["v"].at[wg], outputs["v"].at[b, mine, target])
        for x in dbias:
            tiles.store(x, out_s["bias"].at[wg], outputs["bias"].at[b, target, mine])

    _as_workers(work, lambda: ring.load_all([(fetch, full, free)], count))
