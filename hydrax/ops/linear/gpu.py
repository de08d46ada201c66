"""`linear_attention` with scalar decays on Hopper GPUs: forward and backward as Pallas kernels of one body.

Vector decays have kernels of their own (`gpu_vector`).

In a chunk of C = 64 tokens, G is the cumulative log-decay and Γ_ij = e^{G_i - G_j} for j <= i in one document, else 0.
A token i reads with r_i = scale · e^{G_i} the incoming state, if that belongs to its document, and writes with
w_i = e^{G_C - G_i} to the outgoing one. The output and the three gradients are then the same map of rows a, b, c,

    y_i = scale Σ_j Γ_ij (a_i·b_j) c_j + r_i Zᵀa_i,        Z ← λ Z + Σ_j w_j b_j c_jᵀ,        λ = e^{G_C}

    o:   a, b, c = q, k, v        Z = S        from the first chunk to the last
    dq:  a, b, c = do, v, k       Z = Sᵀ
    dv:  a, b, c = k, q, do       Z = dS       from the last to the first: Γ transposed, r and w exchanged
    dk:  a, b, c = v, do, q       Z = dSᵀ

Nothing but its inputs is kept for the backward pass, which forms the states again; where log-decays are learned, also
the state S before every chunk, in bf16. With it their gradient needs no sum beyond a chunk: in that of token t

    dg_t = <S, dS> - Σ_i (q_i·dq_i - k_i·dk_i)    over the tokens i < t of the chunk,

both from fp32 values; with documents, <S, dS> counts if t reads S, and i stays in the document of t.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from hydrax.core import tree
from hydrax.core.numerics import clamp_decay, fp32
from hydrax.core.typing import Array, PyTree
from hydrax.ops.dispatch import KERNEL
from hydrax.ops.linear import gpu_vector
from hydrax.ops.pallas import chunks, compat, ring, tiles
from hydrax.ops.pallas.chunks import KEEP, READS, WIDEST, WIDTHS, WRITER, WRITES
from hydrax.ops.pallas.tiles import BLOCK, per_row
from hydrax.ops.pallas.tuning import TUNING, Tuning


@dataclasses.dataclass(frozen=True)
class Product:
    """One y of a sweep, by the names of its rows; without `a`, only its Z is formed.

    Also wanted are, with `x`, the sums x_i·y_i, with `end`, Z after the last chunk, with `keep`, copies of Z before
    every chunk, with `meets`, the sums of Z times the copies of another sweep, after every chunk.
    """

    a: str | None
    b: str
    c: str
    x: str | None = None
    end: bool = False
    keep: bool = False
    meets: bool = False

    @property
    def sums(self) -> bool:
        """Whether it gives sums, of one kind or the other."""
        return self.x is not None or self.meets


def refusal(q: Array, k: Array, v: Array, log_decay: Array | None, device: jax.Device | None = None) -> str | None:
    """Why these kernels cannot serve, or None."""
    kind = (device or jax.devices()[0]).device_kind
    if {x.dtype for x in (q, k, v)} != {jnp.dtype(jnp.bfloat16)}:
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: these kernels multiply bfloat16"
    K, V = q.shape[-1], v.shape[-1]
    if K not in WIDTHS or (V not in WIDTHS and V % WIDEST):
        return f"K, V = {K}, {V}: expected 64 or 128, V also a multiple of 128"
    if kind not in TUNING:
        return f"the device is {kind!r}: expected one of {', '.join(TUNING)}"
    return None


def fused(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    seg: Array | None,
    S: Array | None,
    *,
    scale: float,
    form: Callable,
    tuning: Tuning | None = None,
) -> tuple[Array, Array]:
    """o [B,T,Hv,V] and the final state [B,Hv,K,V] of q, k [B,T,H,K], v [B,T,Hv,V], S [B,Hv,K,V];
    g [Hv], [B,T,Hv] or, for `gpu_vector`, [B,T,H,K].

    The gradient of constant decays is a sum over all tokens, in which the bf16 states of these kernels would lose what
    remains: where it is wanted, `form` of the same inputs takes their place.
    """
    tuning = tuning or TUNING[jax.devices()[0].device_kind]
    if g is not None and g.ndim == 4:
        return gpu_vector.fused(scale, tuning, q, k, v, g, seg, S)
    run = functools.partial(_padded, scale, tuning)
    if g is None or g.ndim > 1:
        return run(q, k, v, g, seg, S)
    return _unless_learned(run, form, q, k, v, g, seg, S)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _unless_learned(run: Callable, form: Callable, *inputs: Array | None) -> tuple[Array, Array]:
    return run(*inputs)


def _either(run: Callable, form: Callable, *inputs: Any) -> tuple:
    learned = inputs[3].perturbed
    q, k, v, g, seg, S = custom_vjp_primal_tree_values(inputs)

    def op(q: Array, k: Array, v: Array, g: Array, S: Array | None) -> tuple[Array, Array]:
        return form(q, k, v, g, seg, S) if learned else run(q, k, v, jax.lax.stop_gradient(g), seg, S)

    return jax.vjp(op, q, k, v, g, S)


def _its_derivative(run: Callable, form: Callable, pullback: Callable, cotangents: tuple) -> tuple:
    filled = tuple(jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in cotangents)
    *gradients, dS = pullback(tree.alike(filled))
    return *gradients, None, dS


_unless_learned.defvjp(_either, _its_derivative, symbolic_zeros=True)


def _padded(
    scale: float, tuning: Tuning, q: Array, k: Array, v: Array, g: Array | None, seg: Array | None, S: Array | None
) -> tuple[Array, Array]:
    """With decays by value head, and by token where chunks differ."""
    g = jnp.zeros(v.shape[2], jnp.float32) if g is None else clamp_decay(fp32(g))
    if g.ndim == 1 and v.shape[1] % BLOCK:
        g = jnp.broadcast_to(g, v.shape[:3])
    g = jnp.repeat(g, chunks.parts_of(v), axis=-1)
    return chunks.by_whole_chunks(functools.partial(_fused, scale, tuning), q, k, v, g, seg, S=S)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(scale: float, tuning: Tuning, *inputs: Any) -> tuple[Array, Array]:
    return _run_forward(scale, tuning, False, *inputs)[:2]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # equal layers share a trace: it takes longer than all else
def _run_forward(
    scale: float, tuning: Tuning, keep: bool, q: Array, k: Array, v: Array, g: Array, seg: Array | None, S: Array | None
) -> tuple[Array, Array, Array | None, Array | None]:
    """o, the final state, the states before the segments, and if asked for those before the chunks."""
    facts, n, rows = chunks.chunk_facts(g, seg, scale), chunks.segments(v, tuning), {"q": q, "k": k, "v": v}
    starts, end = segment_states("k", "v", rows, facts, S, n, tuning)
    (o,) = sweep((Product("q", "k", "v", end=n == 1, keep=keep),), rows, facts, (starts,), n, tuning, scale=scale)
    return o["y"], o["Z"] if end is None else end, starts, o.get("kept")


def _forward(scale: float, tuning: Tuning, *inputs: Any) -> tuple[tuple, tuple]:
    learned = inputs[3].perturbed
    inputs = custom_vjp_primal_tree_values(inputs)
    o, final, starts, kept = checkpoint_name(_run_forward(scale, tuning, learned, *inputs), KERNEL)
    return (o, final), (*inputs, starts, kept)


def _backward(scale: float, tuning: Tuning, saved: tuple, cotangents: tuple) -> tuple:
    do, dS = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    return _gradients(scale, tuning, saved, jnp.zeros_like(saved[2]) if do is None else do, dS)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(scale: float, tuning: Tuning, saved: tuple, do: Array, dS: Array | None) -> tuple:
    q, k, v, g, seg, S, starts, kept = saved
    facts = chunks.chunk_facts(g, seg, scale)
    n = chunks.segments(v, tuning)
    rows = {"q": q, "k": k, "v": v, "do": do}
    learned = kept is not None
    x = ("q", "k") if learned else (None, None)

    (dq,) = sweep((Product("do", "v", "k", x[0]),), rows, facts, (chunks.flip(starts),), n, tuning, scale=scale)
    ends, dS0 = segment_states("q", "do", rows, facts, dS, n, tuning, reverse=True)
    products = Product("k", "q", "do", end=n == 1 and S is not None, meets=learned), Product("v", "do", "q", x[1])
    dv, dk = sweep(products, rows, facts, (ends, chunks.flip(ends)), n, tuning, scale=scale, reverse=True, kept=kept)
    dS0 = None if S is None else dv.get("Z", dS0)
    dg = jnp.zeros_like(g)
    if learned:
        dg = chunks.decay_gradient(dq["sums"] - dk["sums"], dv["sums"], seg)
    return chunks.ungroup(dq["y"], q), chunks.ungroup(dk["y"], k), dv["y"], dg, None, dS0


_fused.defvjp(_forward, _backward, symbolic_zeros=True)


def segment_states(
    b: str,
    c: str,
    rows: dict[str, Array],
    facts: Array,
    Z: Array | None,
    n: int,
    tuning: Tuning,
    *,
    reverse: bool = False,
) -> tuple[Array | None, Array | None]:
    """The states before the n segments of every row [B·n,Hv,K,V], and the final one; for one segment, `Z` and None."""
    if n == 1:
        return Z, None
    B, T = rows[b].shape[:2]
    (found,) = sweep((Product(None, b, c, end=True),), rows, facts, (None,), n, tuning, reverse=reverse)
    keeps = jnp.broadcast_to(facts[:, :, :, KEEP, :1], (B, T // BLOCK, facts.shape[2], 1))
    return chunks.between_segments(found["Z"], keeps, Z, reverse=reverse)


def sweep(
    products: Sequence[Product],
    rows: dict[str, Array],
    facts: Array,
    states: Sequence[Array | None],
    n: int,
    tuning: Tuning,
    *,
    scale: float = 1.0,
    reverse: bool = False,
    kept: Array | None = None,
) -> list[dict[str, Array]]:
    """All products over all chunks of every row, cut in n segments, the states before which are `states`.

    Returns for every product, as far as it is wanted, "y" [B,T,Hv,D], the states "Z" after each segment [B·n,Hv,K,V],
    "sums" [B,Hv,T], and "kept" [B·n,N,Hv,K,V], which another sweep meets.
    """
    names = sorted({name for p in products for name in (p.a, p.b, p.c, p.x) if name})
    B, T = rows[names[0]].shape[:2]
    Hv, dtype = facts.shape[2], rows[names[0]].dtype
    inputs = {name: rows[name].reshape(B * n, T // n, *rows[name].shape[2:]) for name in names}
    facts = facts if facts.shape[:2] == (1, 1) else facts.reshape(B * n, -1, *facts.shape[2:])
    width = {name: x.shape[-1] // BLOCK for name, x in inputs.items()}
    # One warpgroup per product, or per block of columns of the only one.
    workers = [(i, tuple(range(width[p.c]))) for i, p in enumerate(products)]
    if len(workers) == 1:
        workers = [(0, (column,)) for column in workers[0][1]]

    depth = max(width[p.b] for p in products)
    stages = tuning.stages_of(sum(width.values()), len(workers) * (depth + 2), WRITER + 1)

    def wanted(i: int, p: Product) -> dict[str, jax.ShapeDtypeStruct]:
        parts, (K, V) = sum(w[0] == i for w in workers), (width[p.b] * BLOCK, width[p.c] * BLOCK)
        y = {"y": jax.ShapeDtypeStruct((B * n, T // n, Hv, V), dtype)} if p.a else {}
        Z = {"Z": jax.ShapeDtypeStruct((B * n, Hv, K, V), jnp.float32)} if p.end else {}
        sums = {"sums": jax.ShapeDtypeStruct((B * n, Hv, parts, T // n), jnp.float32)} if p.sums else {}
        copies = {"kept": jax.ShapeDtypeStruct((B * n, T // n // BLOCK, Hv, K, V), dtype)} if p.keep else {}
        return y | Z | sums | copies

    outputs = compat.launch(
        functools.partial(_body, products, workers, scale, reverse),
        (inputs, facts, tuple(states), kept),
        tuple(wanted(i, p) for i, p in enumerate(products)),
        scratch={
            "row_s": {name: tiles.scratch(dtype, stages, BLOCK, w * BLOCK) for name, w in width.items()},
            "fact_s": plgpu.SMEM((stages, *facts.shape[3:]), jnp.float32),
            "state_s": tiles.scratch(dtype, len(workers), depth, *tiles.SQUARE),
            "write_s": tiles.scratch(dtype, len(workers), *tiles.SQUARE),
            "y_s": tiles.scratch(dtype, len(workers), *tiles.SQUARE),
            "sum_s": plgpu.SMEM((len(workers), BLOCK), jnp.float32),
            **ring.barriers(stages, 1 + len(names), len(workers)),
        },
        grid={"h": Hv, "b": B * n},
        warpgroups=len(workers) + 1,
    )
    for found in outputs:
        if "y" in found:
            found["y"] = found["y"].reshape(B, T, Hv, -1)
        if "sums" in found:
            found["sums"] = found["sums"].sum(2).reshape(B, n, Hv, -1).swapaxes(1, 2).reshape(B, Hv, T)
    return list(outputs)


def _body(
    products: Sequence[Product],
    workers: Sequence[tuple[int, tuple[int, ...]]],
    scale: float,
    reverse: bool,
    inputs: tuple,
    outputs: Sequence[dict[str, PyTree]],
    *,
    row_s: dict[str, PyTree],
    fact_s: PyTree,
    full: PyTree,
    free: PyTree,
    **scratch: PyTree,
) -> None:
    """One thread block: a (segment of a) row and a value head; the last warpgroup loads chunks, the others work."""
    rows, facts, states, kept = inputs
    b, h, wg = (jax.lax.axis_index(name) for name in ("b", "h", "wg"))
    stages = fact_s.shape[0]
    first = next(iter(rows.values()))
    N = first.shape[1] // BLOCK

    def place(n: Array) -> Array:
        return N - 1 - n if reverse else n

    def fetch(n: Array, slot: Array, full: PyTree) -> None:
        ring.fetch_rows(rows, row_s, (b, place(n), h), facts.shape[2], slot, full)
        source = facts.at[0, 0, h] if facts.shape[:2] == (1, 1) else facts.at[b, place(n), h]
        plgpu.copy_gmem_to_smem(source, fact_s.at[slot], full)

    for w, (i, columns) in enumerate(workers):

        @pl.when(wg == w)
        def _(w: int = w, i: int = i, columns: tuple[int, ...] = columns) -> None:
            if len(workers) > 1:
                plgpu.set_max_registers(232, action="increase")
            own = {name: ref.at[w] for name, ref in scratch.items()}
            where = (b, h, place, sum(x == i for x, _ in workers[:w]))
            chunk = functools.partial(_chunk, products[i], columns, scale, reverse, own, kept, outputs[i], where)

            def step(n: Array, slot: Array, Z: list) -> list:
                blocks = {
                    name: [ref.at[slot, :, tiles.block(j)] for j in range(ref.shape[2] // BLOCK)]
                    for name, ref in row_s.items()
                }
                return chunk(n, blocks, fact_s.at[slot], Z)

            depth = row_s[products[i].b].shape[2] // BLOCK
            places = [[(b, h, tiles.block(j), tiles.block(c)) for j in range(depth)] for c in columns]
            Z = jax.tree.map(
                lambda at: tiles.zeros() if states[i] is None else tiles.load(states[i].at[at]),
                places,
                is_leaf=lambda x: isinstance(x, tuple),
            )
            Z = ring.work(step, Z, N, stages, full, free)
            if products[i].end:
                for at, z in zip(itertools.chain(*places), itertools.chain(*Z), strict=True):
                    outputs[i]["Z"][at] = z
            plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == len(workers))
    def _() -> None:
        if len(workers) > 1:
            plgpu.set_max_registers(40, action="decrease")
        ring.load(fetch, N, stages, full, free)


def _chunk(
    p: Product,
    columns: Sequence[int],
    scale: float,
    reverse: bool,
    own: dict[str, PyTree],
    kept: PyTree,
    outputs: dict[str, PyTree],
    where: tuple,
    n: Array,
    rows: Mapping[str, Sequence[PyTree]],
    facts: PyTree,
    Z: list,
) -> list:
    """The columns of y of one chunk, and Z after it."""
    b, h, place, part = where
    reads, writes = (WRITES, READS) if reverse else (READS, WRITES)
    state_s, write_s, y_s, sum_s = (own[name] for name in ("state_s", "write_s", "y_s", "sum_s"))
    dtype = rows[p.b][0].dtype
    keep = facts[KEEP, 0]
    if p.a:
        scores = tiles.mm(*((x, compat.transpose(y)) for x, y in zip(rows[p.a], rows[p.b], strict=True)))
        scores *= chunks.decay(facts, packed=facts.shape[0] > WRITER, transposed=reverse) * scale
        low = scores.astype(dtype)
    after, sums = [], []
    for c, z in zip(columns, Z, strict=True):
        if p.a:
            if p.keep:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for j, block in enumerate(z):
                state_s.at[j][...] = block.astype(dtype)
            plgpu.commit_smem()
            if p.keep:
                for j in range(len(z)):
                    target = outputs["kept"].at[b, n, h, tiles.block(j), tiles.block(c)]
                    plgpu.copy_smem_to_gmem(state_s.at[j], target)
            y = tiles.mm(*((x, state_s.at[j]) for j, x in enumerate(rows[p.a])))
            y *= per_row(facts.at[reads])
        else:
            plgpu.commit_smem()
        write_s[...] = _scaled(rows[p.c][c], facts, writes)
        plgpu.commit_smem()
        init, pairs = [keep * block for block in z], [[(compat.transpose(x), write_s)] for x in rows[p.b]]
        if p.a:
            y, *z = tiles.accumulate([y, *init], [[(low, rows[p.c][c])], *pairs])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            y_s[...] = y.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y_s, outputs["y"].at[b, tiles.block(place(n)), h, tiles.block(c)])
        else:
            z = tiles.accumulate(init, pairs)
        after.append(list(z))
        if p.x:
            sums.append((tiles.load(rows[p.x][c]) * y).sum(1))
        if p.meets:
            source = kept.at[b, place(n), h]
            sums += [(tiles.load(source.at[tiles.block(j), tiles.block(c)]) * x).sum(1) for j, x in enumerate(z)]
    if sums:
        sum_s[...] = sum(sums)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sum_s, outputs["sums"].at[b, h, part, tiles.block(place(n))])
    return after


def _scaled(rows: PyTree, facts: PyTree, weight: int) -> Array:
    return (tiles.load(rows) * per_row(facts.at[weight])).astype(rows.dtype)
