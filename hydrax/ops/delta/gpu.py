"""`delta_rule` with scalar decays on Hopper GPUs: forward and backward as Pallas kernels.

Vector decays have kernels of their own (`gpu_vector`).

In a chunk of C = 64 tokens, G is the cumulative log-decay, Γ_ij = e^{G_i - G_j} for j <= i in one document, else 0;
a token reads with r_i = e^{G_i} the incoming state S, if that belongs to its document, and writes with
w_i = e^{G_C - G_i} to the outgoing one, which keeps λ = e^{G_C} of it. With the system of the chunk

    M = (I + strict_tril(β KKᵀ))^-1 ⊙ Γ

(the inverse needs no gates: they scale its rows and columns, arXiv 2412.06464 §3),

    U = M β (V - r K S),      O = scale (r Q S + (QKᵀ ⊙ Γ) U),      S ← λ S + (w K)ᵀ U

from the first chunk to the last; and the gradient dS of the state, from the last chunk to the first,

    dY = Mᵀ (scale (QKᵀ ⊙ Γ)ᵀ dO + w K dS),      dS ← λ dS + scale (r Q)ᵀ dO - (β r K)ᵀ dY.

Columns of values do not mix in either: a warpgroup takes 64 of them, with its part of the state in registers. M comes
from a kernel of its own, with several chunks at a time on a multiprocessor to hide the latency of its small products.
The forward pass keeps M and the S before every chunk, the backward one dY and the dS after every chunk, all in bf16,
for the kernel of the gradients, in which chunks are independent: with R = V - r K S,
D = -strict_tril(dY Uᵀ) ⊙ Γ and W = scale (dO Uᵀ) ⊙ Γ,

    dV = β dY        dQ = scale r (dO Sᵀ) + W K        dβ_i = dY_i·R_i + Σ_j (D ⊙ KKᵀ)_ij
    dK = [βD K - β r (dY Sᵀ)] + [Wᵀ Q + (βD)ᵀ K] + [w (U dSᵀ)]

The gate of token t decays what passes t: what i >= t reads, of S or of tokens j < t, what j < t writes for later
chunks, and S itself if it outlives the chunk. Leaving out the diagonal of W, with the three brackets of dK in order,

    dg_t = Σ_{i >= t} (q_i·dQ_i + k_i·dK¹_i - k_i·dK²_i) + Σ_{j < t} k_j·dK³_j + λ <S, dS>.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hydrax.core.numerics import clamp_decay, fp32
from hydrax.core.typing import Array, PyTree
from hydrax.ops.delta import gpu_vector
from hydrax.ops.delta.segments import before_segments, between_segments, segments
from hydrax.ops.dispatch import KERNEL
from hydrax.ops.linear import gpu as linear
from hydrax.ops.pallas import chunks, compat, ring, tiles
from hydrax.ops.pallas.chunks import KEEP, READS, WRITER, WRITES
from hydrax.ops.pallas.sweep import sweep
from hydrax.ops.pallas.tiles import BLOCK, per_row
from hydrax.ops.pallas.tuning import TUNING, Tuning

READ, WRITTEN, KEPT, STRENGTH = range(4)
"""Rows of the sums of a chunk [4,C]: the three of dg, and dβ."""

SLOTS = {"k": 2, "v": 2}
"""Chunks in shared memory at once, of what the kernel of the gradients needs first; one of the rest."""


refusal = linear.refusal
"""Why these kernels cannot serve, or None: for the same reasons."""


def fused(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    g: Array | None,
    seg: Array | None,
    S: Array | None,
    *,
    scale: float,
    tuning: Tuning | None = None,
) -> tuple[Array, Array]:
    """o [B,T,Hv,V] and the final state [B,Hv,K,V] of q, k [B,T,H,K], v [B,T,Hv,V], beta [B,T,Hv], g like it or [Hv]."""
    tuning = tuning or TUNING[jax.devices()[0].device_kind]
    if g is not None and g.ndim == 4:
        return gpu_vector.fused(scale, tuning, q, k, v, beta, g, seg, S)
    g = jnp.broadcast_to(jnp.zeros_like(beta) if g is None else clamp_decay(fp32(g)), v.shape[:3])
    beta, g = (jnp.repeat(fp32(x), chunks.parts_of(v), axis=-1) for x in (beta, g))
    return chunks.by_whole_chunks(functools.partial(_fused, scale, tuning), q, k, v, beta, g, seg, S=S)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(scale: float, tuning: Tuning, *inputs: Any) -> tuple[Array, Array]:
    return _run(scale, tuning, ("y", "Z"), *inputs)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # equal layers share a trace: it takes longer than all else
def _run(
    scale: float,
    tuning: Tuning,
    wanted: Sequence[str],
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    g: Array,
    seg: Array | None,
    S: Array | None,
) -> tuple[tuple[Array, Array], tuple]:
    """o and the final state; the facts, the maps of the segments, all that is wanted of the chunks."""
    facts = jnp.concatenate([chunks.chunk_facts(g, seg, 1.0), chunks.by_chunk(beta)[..., None, :]], -2)
    n, systems = segments(v, tuning), solve(k, facts)
    run = functools.partial(sweep, functools.partial(_forward, scale), facts=facts, systems=systems, n=n, tuning=tuning)
    maps, S = before_segments(run, {"k": k}, v, facts, S, n)
    found = run({"q": q, "k": k, "v": v}, Z=S, wanted=wanted)
    return (found["y"], found["Z"][n - 1 :: n]), (facts, systems, maps, found.get("states"))


def _vjp_forward(scale: float, tuning: Tuning, *inputs: Any) -> tuple[tuple, tuple]:
    outputs, kept = checkpoint_name(_run(scale, tuning, ("y", "Z", "states"), *inputs), KERNEL)
    q, k, v, _, _, seg, S = inputs
    return outputs, (q, k, v, seg, S, *kept)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _vjp_backward(scale: float, tuning: Tuning, saved: tuple, cotangents: tuple) -> tuple:
    q, k, v, seg, S, facts, systems, maps, states = saved
    do, dS = cotangents
    n, step = segments(v, tuning), functools.partial(_backward, scale)
    run = functools.partial(sweep, step, {"q": q, "k": k, "v": do}, facts, systems, n, tuning, reverse=True)
    if n > 1:
        dS = between_segments(jnp.swapaxes(maps, -1, -2), run()["Z"], dS, n, reverse=True)
    back = run(Z=dS, wanted=("y", "Z", "states"))
    rows = {"q": q, "k": k, "v": v, "do": do, "dy": back["y"]}
    dq, dk, dv, sums = gradients(scale, rows, facts, systems, states, back["states"], tuning)
    dbeta, dg = chunks.by_token(sums[..., STRENGTH, :]), chunks.by_token(_decay_gradient(sums))
    if seg is not None:
        dg *= (seg != 0)[..., None]
    return chunks.ungroup(dq, q), chunks.ungroup(dk, k), dv, dbeta, dg, None, None if S is None else back["Z"][::n]


_fused.defvjp(_vjp_forward, _vjp_backward)


def _decay_gradient(sums: Array) -> Array:
    """dg [B,N,Hv,C]."""
    read, written, kept = (sums[..., row, :] for row in (READ, WRITTEN, KEPT))
    before = jnp.pad(jnp.cumsum(written, -1)[..., :-1], [(0, 0)] * 3 + [(1, 0)])
    return jax.lax.cumsum(read, axis=3, reverse=True) + before + kept.sum(-1, keepdims=True)


def solve(k: Array, facts: Array) -> Array:
    """M of every chunk [B,N,Hv,C,C]."""
    B, N, Hv = facts.shape[:3]
    return compat.launch(
        _solve_body,
        (k, facts),
        jax.ShapeDtypeStruct((B, N, Hv, *tiles.SQUARE), k.dtype),
        scratch={
            "row_s": {"k": tiles.scratch(k.dtype, 1, BLOCK, k.shape[3])},
            "fact_s": plgpu.SMEM(facts.shape[3:], jnp.float32),
            "factor_s": tiles.scratch(jnp.dtype(jnp.float16), 2, *tiles.SQUARE),
            "system_s": tiles.scratch(k.dtype, *tiles.SQUARE),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=(1,)),
        },
        grid={"b": B, "h": Hv, "n": N},
        warpgroups=1,
    )


def _solve_body(
    inputs: tuple,
    system: PyTree,
    *,
    row_s: dict[str, PyTree],
    fact_s: PyTree,
    factor_s: PyTree,
    system_s: PyTree,
    full: PyTree,
) -> None:
    k, facts = inputs
    at = tuple(jax.lax.axis_index(name) for name in ("b", "n", "h"))
    ring.fetch_rows({"k": k}, row_s, at, facts.shape[2], 0, full.at[0])
    plgpu.copy_gmem_to_smem(facts.at[at], fact_s, full.at[0])
    plgpu.barrier_wait(full.at[0])
    keys = tiles.blocks(row_s["k"].at[0])
    L = tiles.mm(*((x, compat.transpose(x)) for x in keys)) * per_row(_beta(fact_s))
    X = tiles.inverse(jnp.where(tiles.index(0) > tiles.index(1), L, 0), factor_s)
    tiles.store(X.astype(jnp.float32) * _decay(fact_s), system_s, system.at[at])
    plgpu.wait_smem_to_gmem(0)


def _beta(facts: PyTree) -> PyTree:
    return facts.at[facts.shape[0] - 1]


def _decay(facts: PyTree, **which: bool) -> Array:
    """Γ; the last of the facts are the betas."""
    return chunks.decay(facts, packed=facts.shape[0] > WRITER + 1, **which)


def _forward(
    scale: float,
    rows: Mapping[str, PyTree],
    facts: PyTree,
    system: PyTree,
    state: Sequence[PyTree],
    own_s: PyTree,
    outputs: Mapping[str, PyTree],
    S: Sequence[Array],
) -> list[Array]:
    """The columns of o of one chunk, and S after it."""
    q, k, v = rows.get("q"), rows["k"], rows.get("v")
    y_s = own_s if v is None else v
    held, *read = tiles.accumulate(
        [tiles.zeros() for x in (k, q) if x], [list(zip(x, state, strict=True)) for x in (k, q) if x]
    )
    Y = -per_row(facts.at[READS]) * held
    if v is not None:
        Y += tiles.load(v)
    y_s[...] = (per_row(_beta(facts)) * Y).astype(y_s.dtype)
    plgpu.commit_smem()
    products = [[(system, y_s)]]
    if q:
        products.append([(x, compat.transpose(y)) for x, y in zip(q, k, strict=True)])
    U, *scores = tiles.accumulate([tiles.zeros() for _ in products], products)
    low = [(x * _decay(facts) * scale).astype(y_s.dtype) for x in scores]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    own_s[...] = (per_row(facts.at[WRITES]) * U).astype(own_s.dtype)
    if q:
        y_s[...] = U.astype(y_s.dtype)
    plgpu.commit_smem()
    after = tiles.accumulate(
        [*(scale * per_row(facts.at[READS]) * x for x in read), *(facts[KEEP, 0] * z for z in S)],
        [*([(x, y_s)] for x in low), *([(compat.transpose(x), own_s)] for x in k)],
    )
    if q:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tiles.store(after[0], own_s, outputs["y"])
    return list(after[len(low) :])


def _backward(
    scale: float,
    rows: Mapping[str, PyTree],
    facts: PyTree,
    system: PyTree,
    state: Sequence[PyTree],
    own_s: PyTree,
    outputs: Mapping[str, PyTree],
    dS: Sequence[Array],
) -> list[Array]:
    """The columns of dY of one chunk, and dS before it."""
    q, k, do = (rows[name] for name in "qkv")
    reads = per_row(facts.at[READS])
    dU, scores = tiles.accumulate(
        [tiles.zeros(), tiles.zeros()],
        [list(zip(k, state, strict=True)), [(x, compat.transpose(y)) for x, y in zip(k, q, strict=True)]],
    )
    low = (scores * _decay(facts, transposed=True) * scale).astype(do.dtype)
    (dU,) = tiles.accumulate([per_row(facts.at[WRITES]) * dU], [[(low, do)]])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    own_s[...] = dU.astype(own_s.dtype)
    do[...] = (scale * reads * tiles.load(do)).astype(do.dtype)
    plgpu.commit_smem()
    dY = tiles.mm((compat.transpose(system), own_s))
    state[0][...] = (-per_row(_beta(facts)) * reads * dY).astype(do.dtype)
    plgpu.commit_smem()
    if "y" in outputs:
        tiles.store(dY, own_s, outputs["y"])
    init = [facts[KEEP, 0] * z for z in dS]
    products = [[(compat.transpose(x), state[0]), (compat.transpose(y), do)] for x, y in zip(k, q, strict=True)]
    dS = list(tiles.accumulate(init, products))
    plgpu.commit_smem()  # all have read what is stored next
    return dS


def gradients(
    scale: float,
    rows: Mapping[str, Array],
    facts: Array,
    systems: Array,
    S: Array,
    dS: Array,
    tuning: Tuning,
) -> tuple[Array, Array, Array, Array]:
    """dQ, dK [B,T,Hv,K], dV [B,T,Hv,V] and the sums [B,N,Hv,4,C], from q, k, v, do, dy and what is kept by chunk."""
    B, T, _, K = rows["k"].shape
    V, Hv, dtype = rows["v"].shape[-1], facts.shape[2], rows["k"].dtype
    n = chunks.segments(rows["v"], tuning)
    Bn, N = B * n, T // BLOCK // n
    rows = {name: x.reshape(Bn, T // n, *x.shape[2:]) for name, x in rows.items()}
    facts, systems, S, dS = (x.reshape(Bn, N, *x.shape[-3:]) for x in (facts, systems, S, dS))
    workers = max(K, V) // BLOCK
    copies = {"first": 3, "states": 2, "cotangents": 2, "last": 2}
    dq, dk, dv, sums = compat.launch(
        functools.partial(_gradients_body, scale, workers),
        (rows, facts, S, dS, systems),
        (
            *(jax.ShapeDtypeStruct((*rows["v"].shape[:2], Hv, D), dtype) for D in (K, K, V)),
            jax.ShapeDtypeStruct((Bn, N, Hv, workers, 4, BLOCK), jnp.float32),
        ),
        scratch={
            "row_s": {name: tiles.scratch(dtype, SLOTS.get(name, 1), BLOCK, x.shape[-1]) for name, x in rows.items()},
            "fact_s": plgpu.SMEM((SLOTS["k"], *facts.shape[3:]), jnp.float32),
            "state_s": tiles.scratch(dtype, K, V),
            "dstate_s": tiles.scratch(dtype, K, V),
            "system_s": tiles.scratch(dtype, *tiles.SQUARE),
            "score_s": tiles.scratch(dtype, 2, *tiles.SQUARE),
            "diagonal_s": plgpu.SMEM((BLOCK,), jnp.float32),
            "out_s": tiles.scratch(dtype, workers, *tiles.SQUARE),
            "sum_s": plgpu.SMEM((workers, 4, BLOCK), jnp.float32),
            "rings": {
                name: ring.barriers(SLOTS["k"] if name == "first" else 1, n, workers) for name, n in copies.items()
            },
            "met": plgpu.Barrier(num_arrivals=workers, num_barriers=2),
        },
        grid={"h": Hv, "b": Bn},
        warpgroups=workers + 1,
    )
    dq, dk, dv = (x.reshape(B, T, *x.shape[2:]) for x in (dq, dk, dv))
    return dq, dk, dv, sums.sum(3).reshape(B, -1, Hv, 4, BLOCK)


def _square(matrix_s: PyTree, j: int, c: int) -> PyTree:
    """The j-th rows and c-th columns, by blocks."""
    return matrix_s.at[tiles.block(j), tiles.block(c)]


def _gradients_body(
    scale: float,
    workers: int,
    inputs: tuple,
    outputs: tuple,
    *,
    row_s: dict[str, PyTree],
    fact_s: PyTree,
    state_s: PyTree,
    dstate_s: PyTree,
    system_s: PyTree,
    score_s: PyTree,
    diagonal_s: PyTree,
    out_s: PyTree,
    sum_s: PyTree,
    rings: dict[str, dict[str, PyTree]],
    met: PyTree,
) -> None:
    """One thread block: a (segment of a) row and a value head; what is needed first is loaded two chunks ahead."""
    rows, facts, S, dS, systems = inputs
    dq_ref, dk_ref, dv_ref, sum_ref = outputs
    b, h, wg = (jax.lax.axis_index(name) for name in ("b", "h", "wg"))
    N, (nk, nv) = facts.shape[1], (x // BLOCK for x in state_s.shape)

    def fetch_rows(*names: str) -> Callable:
        def fetch(n: Array, slot: Array | int, full: PyTree) -> None:
            ring.fetch_rows({x: rows[x] for x in names}, row_s, (b, n, h), facts.shape[2], slot, full)

        return fetch

    def first(n: Array, slot: Array | int, full: PyTree) -> None:
        fetch_rows("k", "v")(n, slot, full)
        plgpu.copy_gmem_to_smem(facts.at[b, n, h], fact_s.at[slot], full)

    def states(n: Array, slot: Array | int, full: PyTree) -> None:
        plgpu.copy_gmem_to_smem(S.at[b, n, h], state_s, full)
        plgpu.copy_gmem_to_smem(systems.at[b, n, h], system_s, full)

    def last(n: Array, slot: Array | int, full: PyTree) -> None:
        fetch_rows("q")(n, slot, full)
        plgpu.copy_gmem_to_smem(dS.at[b, n, h], dstate_s, full)

    fetches = {"first": first, "states": states, "cotangents": fetch_rows("do", "dy"), "last": last}

    def worker(w: int) -> None:
        """Owns the w-th columns of values, and the w-th columns of keys, as far as there are."""
        if workers > 1:
            plgpu.set_max_registers(232, action="increase")
        column, key = (range(w, min(w + 1, x)) for x in (nv, nk))

        def put(x: Array, ref: PyTree, n: Array) -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            tiles.store(x, out_s.at[w], ref.at[b, tiles.block(n), h, tiles.block(w)])

        def meet(i: int) -> None:
            plgpu.commit_smem()
            plgpu.barrier_arrive(met.at[i])
            plgpu.barrier_wait(met.at[i])

        @pl.loop(0, N)
        def _(n: Array) -> None:
            slot = jax.lax.rem(n, jnp.int32(SLOTS["k"]))

            full, free = (
                {name: rings[name][way].at[slot if name == "first" else 0] for name in rings}
                for way in ("full", "free")
            )
            own_rows = {name: tiles.blocks(x.at[slot if name in SLOTS else 0]) for name, x in row_s.items()}
            q, k, u, do, dy = (own_rows[name] for name in ("q", "k", "v", "do", "dy"))
            fact = fact_s.at[slot]
            sums: list[list[Array]] = [[], [], [], []]

            plgpu.barrier_wait(full["first"])
            plgpu.barrier_wait(full["states"])
            plgpu.barrier_wait(full["cotangents"])
            # As many products at a time as are ready: their latency is what this kernel waits for.
            keyed = [[compat.transpose(_square(state_s, j, c)) for c in range(nv)] for j in key]
            products = [[(x, _square(state_s, j, c)) for j, x in enumerate(k)] for c in column]
            products += [list(zip(rows, x, strict=True)) for x in keyed for rows in (do, dy)]
            found = tiles.accumulate([tiles.zeros() for _ in products], products)
            held, dqk = found[: len(column)], found[len(column) :]
            for c in column:
                R = tiles.load(u[c]) - per_row(fact.at[READS]) * held[0]
                sums[STRENGTH].append((tiles.load(dy[c]) * R).sum(1))
                u[c][...] = (per_row(_beta(fact)) * R).astype(u[c].dtype)
                plgpu.commit_smem()
                U = tiles.mm((system_s, u[c]))
                plgpu.commit_smem()  # all have read what is stored next
                u[c][...] = U.astype(u[c].dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(met.at[0])
            for c in column:
                put(per_row(_beta(fact)) * tiles.load(dy[c]), dv_ref, n)
            if key:
                dq = scale * per_row(fact.at[READS]) * dqk[0]
                dk = -per_row(_beta(fact)) * per_row(fact.at[READS]) * dqk[1]
            plgpu.barrier_wait(full["last"])
            for j, c in itertools.product(key, range(nv)):
                kept = tiles.load(_square(state_s, j, c)) * tiles.load(_square(dstate_s, j, c))
                sums[KEPT].append(fact[KEEP, 0] * kept.sum(1))
            plgpu.barrier_arrive(free["states"])
            plgpu.barrier_wait(met.at[0])

            turned = [compat.transpose(x) for x in u]
            if w == 0:
                D = -_decay(fact, strict=True) * tiles.mm(*zip(dy, turned, strict=True))
                score_s.at[0][...] = (per_row(_beta(fact)) * D).astype(score_s.dtype)
                overlaps = tiles.mm(*((x, compat.transpose(x)) for x in k))
                sums[STRENGTH].append((D * overlaps).sum(1))
            if w == workers - 1:
                W = scale * _decay(fact, strict=True) * tiles.mm(*zip(do, turned, strict=True))
                score_s.at[1][...] = W.astype(score_s.dtype)
                own = sum((tiles.load(x) * tiles.load(y)).sum(1) for x, y in zip(do, u, strict=True))
                diagonal_s[...] = scale * own
            meet(1)
            plgpu.barrier_arrive(free["cotangents"])

            # One result at a time: registers are scarce.
            D, W = score_s.at[0], score_s.at[1]
            for j in key:
                own = per_row(diagonal_s)
                (dq,) = tiles.accumulate([dq], [[(W, k[j])]])
                sums[READ].append((tiles.load(q[j]) * dq).sum(1))
                put(dq + own * tiles.load(k[j]), dq_ref, n)
                dk, later = tiles.accumulate(
                    [dk, tiles.zeros()], [[(D, k[j])], [(compat.transpose(W), q[j]), (compat.transpose(D), k[j])]]
                )
                sums[READ].append((tiles.load(k[j]) * (dk - later)).sum(1))
                dk += later + own * tiles.load(q[j])
                turned = [compat.transpose(_square(dstate_s, j, c)) for c in range(nv)]
                written = per_row(fact.at[WRITES]) * tiles.mm(*zip(u, turned, strict=True))
                sums[WRITTEN].append((tiles.load(k[j]) * written).sum(1))
                put(dk + written, dk_ref, n)
            plgpu.barrier_arrive(free["last"])
            plgpu.barrier_arrive(free["first"])
            for row, terms in enumerate(sums):
                sum_s.at[w, row][...] = sum(terms) if terms else tiles.zeros().sum(1)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sum_s.at[w], sum_ref.at[b, n, h, w])

        plgpu.wait_smem_to_gmem(0)

    for w in range(workers):
        pl.when(wg == w)(functools.partial(worker, w))

    @pl.when(wg == workers)
    def _() -> None:
        if workers > 1:
            plgpu.set_max_registers(40, action="decrease")
        ring.load_all([(fetches[name], rings[name]["full"], rings[name]["free"]) for name in fetches], N)
