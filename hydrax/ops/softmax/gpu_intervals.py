"""Softmax attention on Hopper GPUs over documents and windows, forward and backward, without a mask in memory.

`gpu` serves these and more, from lists of blocks; these kernels stay the default until it has been run beside them.

In a row of documents, within a window, the keys that a query sees are an interval that ends at the query:

    o_t = Σ_s p_ts v_s,      p_ts = e^{z_ts - lse_t},      z_ts = scale · q_t·k_s,      first_t <= s <= t

`first` never decreases, so blocks of keys that no query of a block sees are never loaded, and only those at the ends of
the intervals need a mask. The forward pass is that of arXiv 2205.14135. The backward pass forms p again, once for dq
by blocks of queries and once for dk and dv by blocks of keys, so that no two thread blocks add to one gradient:

    dz_ts = p_ts (do_t·v_s - δ_t),    δ_t = do_t·o_t - dlse_t,
    dq_t = scale Σ_s dz_ts k_s,    dk_s = scale Σ_t dz_ts q_t,    dv_s = Σ_t p_ts do_t

with the sums over t also over all query heads of a key's head.
"""

import functools
import math
from collections.abc import Callable

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

WORKERS = 2
"""Warpgroups of a thread block that multiply, each for 64 rows."""

ROWS = WORKERS * BLOCK
"""Queries, or keys, that a thread block is for."""

LOG2E = math.log2(math.e)
MASKED = -1e30
"""Score of an invisible key. What a query gathers before it meets a visible one is forgotten when it does."""


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


def attend(q: Array, k: Array, v: Array, first: Array, scale: float, tuning: Tuning | None = None) -> tuple:
    """o [B,T,H,V] and lse fp32 [B,T,H] of q [B,T,H,K], k [B,T,Hk,K], v [B,T,Hk,V] and `first` int32 [B,T]."""
    T = q.shape[1]
    more = -T % ROWS
    q, k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (q, k, v))
    own = jnp.broadcast_to(jnp.arange(T, T + more, dtype=jnp.int32), (first.shape[0], more))
    o, lse = _attend(scale, tuning or TUNING[jax.devices()[0].device_kind], q, k, v, jnp.concatenate([first, own], 1))
    return o[:, :T], jnp.moveaxis(lse, 1, 2)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale: float, tuning: Tuning, q: Array, k: Array, v: Array, first: Array) -> tuple[Array, Array]:
    return _outputs(scale, tuning, q, k, v, first)


def _forward(scale: float, tuning: Tuning, *inputs: Array) -> tuple[tuple, tuple]:
    found = checkpoint_name(_outputs(scale, tuning, *inputs), KERNEL)
    return found, (*inputs, *found)


def _backward(scale: float, tuning: Tuning, saved: tuple, cotangents: tuple) -> tuple:
    return *_gradients(scale, tuning, saved, *cotangents), None


_attend.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=(0, 1))  # equal layers share a trace: it takes longer than all else
def _outputs(scale: float, tuning: Tuning, q: Array, k: Array, v: Array, first: Array) -> tuple[Array, Array]:
    (B, T, H, K), V = q.shape, v.shape[-1]
    widths = (K + V) // BLOCK
    stages = tuning.stages_of(WORKERS * widths, WORKERS * widths, 0)
    o, lse = compat.launch(
        functools.partial(_output_body, scale * LOG2E),
        ({"q": q}, {"k": k, "v": v}, first, _first_blocks(first)),
        (jax.ShapeDtypeStruct((B, T, H, V), v.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)),
        scratch={
            "own_s": {"q": tiles.scratch(q.dtype, WORKERS, BLOCK, K)},
            "key_s": {"k": tiles.scratch(k.dtype, stages, ROWS, K), "v": tiles.scratch(v.dtype, stages, ROWS, V)},
            "out_s": tiles.scratch(v.dtype, WORKERS, BLOCK, V),
            "lse_s": plgpu.SMEM((WORKERS, BLOCK), jnp.float32),
            "ready": plgpu.Barrier(num_arrivals=1, num_barriers=(WORKERS,)),
            **ring.barriers(stages, 2, WORKERS),
        },
        grid={"h": H, "i": T // ROWS, "b": B},
        warpgroups=WORKERS + 1,
    )
    return o, lse


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(scale: float, tuning: Tuning, saved: tuple, do: Array, dlse: Array) -> tuple[Array, Array, Array]:
    q, k, v, first, o, lse = saved
    (B, T, H, K), (Hk, V) = q.shape, v.shape[2:]
    delta = jnp.einsum("bthv,bthv->bht", fp32(do), fp32(o)) - dlse
    widths = (K + V) // BLOCK
    stages = tuning.stages_of(WORKERS * widths, WORKERS * (widths + K // BLOCK), 0)
    (dq,) = compat.launch(
        functools.partial(_query_body, scale),
        ({"q": q, "do": do}, {"k": k, "v": v}, first, _first_blocks(first), lse, delta),
        (jax.ShapeDtypeStruct(q.shape, q.dtype),),
        scratch={
            "own_s": {"q": tiles.scratch(q.dtype, WORKERS, BLOCK, K), "do": tiles.scratch(v.dtype, WORKERS, BLOCK, V)},
            "key_s": {"k": tiles.scratch(k.dtype, stages, ROWS, K), "v": tiles.scratch(v.dtype, stages, ROWS, V)},
            "out_s": tiles.scratch(q.dtype, WORKERS, BLOCK, K),
            "ready": plgpu.Barrier(num_arrivals=2, num_barriers=(WORKERS,)),
            **ring.barriers(stages, 2, WORKERS),
        },
        grid={"h": H, "i": T // ROWS, "b": B},
        warpgroups=WORKERS + 1,
    )
    stages = tuning.stages_of(widths, 2 * WORKERS * widths, 3)
    facts = {"lse": lse, "delta": delta, "first": jnp.broadcast_to(first[:, None], lse.shape)}
    dk, dv = compat.launch(
        functools.partial(_key_body, scale, H // Hk),
        ({"q": q, "do": do}, {"k": k, "v": v}, facts, _last_blocks(first)),
        (jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch={
            "own_s": {"k": tiles.scratch(k.dtype, WORKERS, BLOCK, K), "v": tiles.scratch(v.dtype, WORKERS, BLOCK, V)},
            "row_s": {"q": tiles.scratch(q.dtype, stages, BLOCK, K), "do": tiles.scratch(v.dtype, stages, BLOCK, V)},
            "fact_s": {name: plgpu.SMEM((stages, BLOCK), x.dtype) for name, x in facts.items()},
            "out_s": {"k": tiles.scratch(k.dtype, WORKERS, BLOCK, K), "v": tiles.scratch(v.dtype, WORKERS, BLOCK, V)},
            "ready": plgpu.Barrier(num_arrivals=2, num_barriers=(WORKERS,)),
            **ring.barriers(stages, 5, WORKERS),
        },
        grid={"h": Hk, "j": T // ROWS, "b": B},
        warpgroups=WORKERS + 1,
    )
    return dq, dk, dv


def _first_blocks(first: Array) -> Array:
    """[B,N,2] for N blocks of queries: the first block of keys that any of them sees, and the first that needs no mask
    for what lies before the intervals."""
    blocks = first.reshape(first.shape[0], -1, ROWS)
    return jnp.stack([blocks[..., 0] // ROWS, -(-blocks[..., -1] // ROWS)], axis=-1)


def _last_blocks(first: Array) -> Array:
    """[B,N] for N blocks of keys: the number of 64-blocks of queries up to the last that sees any of them."""
    ends = jnp.arange(ROWS - 1, first.shape[1], ROWS, dtype=first.dtype)
    seeing = jax.vmap(lambda row: jnp.searchsorted(row, ends, side="right"))(first)
    return -(-seeing // BLOCK).astype(jnp.int32)


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


def _over_keys(step: Callable, carry: PyTree, at: tuple, key_s: dict, full: PyTree, free: PyTree) -> PyTree:
    """`step(keys, mask, carry)` over the blocks of keys that queries see; `mask` hides the scores of the others."""
    i, wg, low, solid, begin = at
    stages = full.shape[0]

    def block(n: Array, slot: Array, carry: PyTree) -> PyTree:
        j = low + n

        def hide(s: Array) -> Array:
            key, query = j * ROWS + tiles.index(1, ROWS), i * ROWS + wg * BLOCK + tiles.index(0, ROWS)
            seen = (key <= query) & (key >= tiles.spread(begin, ROWS))
            return jnp.where(seen, s, MASKED)

        def mask(s: Array) -> Array:
            return jax.lax.cond((j == i) | (j < solid), hide, lambda s: s, s)

        return step({name: x.at[slot] for name, x in key_s.items()}, mask, carry)

    return ring.work(block, carry, i + 1 - low, stages, full, free)


def _load_keys(keys: dict, key_s: dict, at: tuple, heads: int, full: PyTree, free: PyTree) -> None:
    """What `_over_keys` waits for; for the loading warpgroup."""
    b, h, i, low = at

    def fetch(n: Array, slot: Array, full: PyTree) -> None:
        for name, x in keys.items():
            rows = pl.ds((low + n) * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(x.at[b, rows, ring.head(h, heads, x)], key_s[name].at[slot], full)

    ring.load_all([(fetch, full, free)], i + 1 - low)


def _row_block(blocks: PyTree) -> tuple[Array, Array, Array, Array, Array]:
    """Of the thread block: row, head, block of queries (those with the most keys come first), bounds of its keys."""
    b, h, i = (jax.lax.axis_index(name) for name in ("b", "h", "i"))
    i = blocks.shape[1] - 1 - i
    return b, h, i, blocks[b, i, 0], blocks[b, i, 1]


def _output_body(
    scale: float,
    inputs: tuple,
    outputs: tuple,
    *,
    own_s: dict,
    key_s: dict,
    out_s: PyTree,
    lse_s: PyTree,
    ready: PyTree,
    full: PyTree,
    free: PyTree,
) -> None:
    """o and lse of 128 queries of a head; `scale` is in units of log2."""
    queries, keys, first, blocks = inputs
    b, h, i, low, solid = _row_block(blocks)
    V = out_s.shape[-1]

    def work(wg: Array) -> None:
        rows = pl.ds(i * ROWS + wg * BLOCK, BLOCK)
        own = _own_rows(queries, own_s, (b, rows, h, wg), ready)
        begin = compat.load(first.at[b, rows], TILED.reduce(1))

        def step(key: dict, mask: Callable, carry: tuple) -> tuple:
            o, top, total = carry
            s = mask(tiles.mm((own["q"], compat.transpose(key["k"])), width=ROWS) * scale)
            before, top = top, jnp.maximum(top, s.max(1))
            p = jnp.exp2(s - tiles.spread(top, ROWS))
            keep = jnp.exp2(before - top)
            (o,) = tiles.accumulate([o * tiles.spread(keep, V)], [[(p.astype(out_s.dtype), key["v"])]])
            return o, top, total * keep + p.sum(1)

        carry = tiles.zeros(V), tiles.row_vector(MASKED), tiles.row_vector(0.0)
        o, top, total = _over_keys(step, carry, (i, wg, low, solid, begin), key_s, full, free)
        out_s.at[wg][...] = (o / tiles.spread(total, V)).astype(out_s.dtype)
        lse_s.at[wg][...] = top / LOG2E + jnp.log(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s.at[wg], outputs[0].at[b, rows, h])
        plgpu.copy_smem_to_gmem(lse_s.at[wg], outputs[1].at[b, h, rows])

    _as_workers(work, lambda: _load_keys(keys, key_s, (b, h, i, low), queries["q"].shape[2], full, free))


def _query_body(
    scale: float,
    inputs: tuple,
    outputs: tuple,
    *,
    own_s: dict,
    key_s: dict,
    out_s: PyTree,
    ready: PyTree,
    full: PyTree,
    free: PyTree,
) -> None:
    """dq of 128 queries of a head."""
    queries, keys, first, blocks, lse, delta = inputs
    b, h, i, low, solid = _row_block(blocks)

    def work(wg: Array) -> None:
        rows = pl.ds(i * ROWS + wg * BLOCK, BLOCK)
        own = _own_rows(queries, own_s, (b, rows, h, wg), ready)
        begin = compat.load(first.at[b, rows], TILED.reduce(1))
        top, mean = (compat.load(x.at[b, h, rows], TILED.reduce(1)) for x in (lse, delta))
        top = top * LOG2E

        def step(key: dict, mask: Callable, dq: Array) -> Array:
            pairs = [[(own[x], compat.transpose(key[y]))] for x, y in (("q", "k"), ("do", "v"))]
            s, dp = tiles.accumulate([tiles.zeros(ROWS)] * 2, pairs)
            p = jnp.exp2(mask(s * (scale * LOG2E)) - tiles.spread(top, ROWS))
            dz = p * (dp - tiles.spread(mean, ROWS))
            (dq,) = tiles.accumulate([dq], [[(dz.astype(out_s.dtype), key["k"])]])
            return dq

        dq = _over_keys(step, tiles.zeros(out_s.shape[-1]), (i, wg, low, solid, begin), key_s, full, free)
        tiles.store(dq * scale, out_s.at[wg], outputs[0].at[b, rows, h])

    _as_workers(work, lambda: _load_keys(keys, key_s, (b, h, i, low), queries["q"].shape[2], full, free))


def _key_body(
    scale: float,
    group: int,
    inputs: tuple,
    outputs: tuple,
    *,
    own_s: dict,
    row_s: dict,
    fact_s: dict,
    out_s: dict,
    ready: PyTree,
    full: PyTree,
    free: PyTree,
) -> None:
    """dk and dv of 128 keys, over the blocks of 64 queries of all `group` heads that they serve."""
    rows, keys, facts, blocks = inputs
    b, h, j = (jax.lax.axis_index(name) for name in ("b", "h", "j"))
    start = WORKERS * j
    per_head = blocks[b, j] - start

    def fetch(n: Array, slot: Array, full: PyTree) -> None:
        head, part = h * group + jax.lax.div(n, per_head), tiles.block(start + jax.lax.rem(n, per_head))
        for name, x in rows.items():
            plgpu.copy_gmem_to_smem(x.at[b, part, head], row_s[name].at[slot], full)
        for name, x in facts.items():
            plgpu.copy_gmem_to_smem(x.at[b, head, part], fact_s[name].at[slot], full)

    def work(wg: Array) -> None:
        place = pl.ds(j * ROWS + wg * BLOCK, BLOCK)
        own = _own_rows(keys, own_s, (b, place, h, wg), ready)
        key0 = j * ROWS + wg * BLOCK

        def step(n: Array, slot: Array, carry: tuple) -> tuple:
            dk, dv = carry
            t = (start + jax.lax.rem(n, per_head)) * BLOCK
            row = {name: x.at[slot] for name, x in row_s.items()}
            fact = {name: x.at[slot] for name, x in fact_s.items()}

            def hide(s: Array) -> Array:
                key, query = key0 + tiles.index(0), t + tiles.index(1)
                return jnp.where((key <= query) & (key >= tiles.per_column(fact["first"])), s, MASKED)

            pairs = [[(own[x], compat.transpose(row[y]))] for x, y in (("k", "q"), ("v", "do"))]
            s, dp = tiles.accumulate([tiles.zeros()] * 2, pairs)
            edge = (t < key0 + BLOCK) | (fact["first"][BLOCK - 1] > key0)
            s = jax.lax.cond(edge, hide, lambda s: s, s * scale)
            p = jnp.exp2((s - tiles.per_column(fact["lse"])) * LOG2E)
            dz = (p * (dp - tiles.per_column(fact["delta"]))).astype(row["q"].dtype)
            return tuple(tiles.accumulate([dk, dv], [[(dz, row["q"])], [(p.astype(dz.dtype), row["do"])]]))

        carry = tuple(tiles.zeros(x.shape[-1]) for x in (own["k"], own["v"]))
        dk, dv = ring.work(step, carry, group * per_head, full.shape[0], full, free)
        tiles.store(dk * scale, out_s["k"].at[wg], outputs[0].at[b, place, h])
        tiles.store(dv, out_s["v"].at[wg], outputs[1].at[b, place, h])

    _as_workers(work, lambda: ring.load_all([(fetch, full, free)], group * per_head))
