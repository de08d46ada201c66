"""`delta_rule` with vector decays (Kimi Delta Attention, arXiv 2510.26692) on Hopper GPUs, as Pallas kernels.

With the rows Q̂, K̂, K̄, the matrices A and T and the decay λ of every chunk, which `ops.pallas.vector` prepares,

    U = T β (V - K̄ S)              O = Q̂ S + A U        S ← λ S + K̂ᵀ U                 from the first chunk to the last
    dY = Tᵀ (Aᵀ dO + K̂ dS)         dV = β dY            dS ← λ dS + Q̂ᵀ dO - K̄ᵀ β dY    from the last to the first

U, dY, the S before every chunk, and the dS after it, are kept in bf16 for the gradients of q, k, g and β, in which
chunks are independent.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, PyTree
from hydrax.ops.delta.segments import before_segments, between_segments, segments
from hydrax.ops.dispatch import KERNEL
from hydrax.ops.pallas import chunks, compat, tiles, vector
from hydrax.ops.pallas.sweep import sweep
from hydrax.ops.pallas.tiles import per_row
from hydrax.ops.pallas.tuning import Tuning


def fused(
    scale: float,
    tuning: Tuning,
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    g: Array,
    seg: Array | None,
    S: Array | None,
) -> tuple[Array, Array]:
    """o [B,T,Hv,V] and the final state [B,Hv,K,V] of q, k, g [B,T,H,K], v [B,T,Hv,V], beta [B,T,Hv], S [B,Hv,K,V]."""
    beta = jnp.repeat(fp32(beta), chunks.parts_of(v), axis=-1)
    return chunks.by_whole_chunks(functools.partial(_fused, scale, tuning), q, k, v, beta, fp32(g), seg, S=S)


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
    """o and the final state; what the chunks need, the maps of the segments, all that is wanted of the chunks."""
    strengths = chunks.by_chunk(beta)
    rows, decay, systems = vector.prepare(scale, q, k, g, vector.facts_of(seg), strengths)
    facts = jnp.concatenate([decay, strengths[..., None, :]], -2)
    n = segments(v, tuning)
    run = functools.partial(sweep, _forward, facts=facts, systems=systems, n=n, tuning=tuning)
    maps, S = before_segments(run, {name: rows[name] for name in "kr"}, v, facts, S, n)
    found = run({**rows, "v": v}, Z=S, wanted=wanted)
    return (found["y"], found["Z"][n - 1 :: n]), (rows, facts, systems, maps, found.get("u"), found.get("states"))


def _vjp_forward(scale: float, tuning: Tuning, *inputs: Any) -> tuple[tuple, tuple]:
    outputs, kept = checkpoint_name(_run(scale, tuning, ("y", "u", "Z", "states"), *inputs), KERNEL)
    return outputs, (*inputs, kept)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _vjp_backward(scale: float, tuning: Tuning, saved: tuple, cotangents: tuple) -> tuple:
    q, k, v, beta, g, seg, S, (rows, facts, systems, maps, u, states) = saved
    do, dS = cotangents
    n = segments(v, tuning)
    run = functools.partial(sweep, _backward, {**rows, "v": do}, facts, systems, n, tuning, reverse=True)
    if n > 1:
        dS = between_segments(jnp.swapaxes(maps, -1, -2), run()["Z"], dS, n, reverse=True)
    back = run(Z=dS, wanted=("y", "Z", "states"))
    dy = back["y"]
    inputs = {"q": q, "k": k, "g": g, "u": u, "do": do, "dy": dy}
    found = vector.gradients(scale, inputs, vector.facts_of(seg), chunks.by_chunk(beta), states, back["states"])
    dq, dk, dg = (chunks.ungroup(found[name], inputs[name]) for name in "qkg")
    dv = (beta[..., None] * fp32(dy)).astype(v.dtype)
    dbeta = chunks.by_token(found["beta"]) + (fp32(dy) * fp32(v)).sum(-1)
    return dq, dk, dv, dbeta, dg, None, None if S is None else back["Z"][::n]


_fused.defvjp(_vjp_forward, _vjp_backward)


def _forward(
    rows: Mapping[str, PyTree],
    facts: PyTree,
    system: PyTree,
    state: Sequence[PyTree],
    own_s: PyTree,
    outputs: Mapping[str, PyTree],
    S: Sequence[Array],
) -> list[Array]:
    """The columns of o of one chunk, if there are rows "q" to read the state, and S after it."""
    q, k, r, v = rows.get("q"), rows["k"], rows["r"], rows.get("v")
    A, T = system.at[tiles.block(0)], system.at[tiles.block(1)]
    y_s = own_s if v is None else v
    held, *read = tiles.accumulate(
        [tiles.zeros() for x in (r, q) if x], [list(zip(x, state, strict=True)) for x in (r, q) if x]
    )
    Y = -held if v is None else tiles.load(v) - held
    y_s[...] = (per_row(facts.at[len(S)]) * Y).astype(y_s.dtype)
    plgpu.commit_smem()
    U = tiles.mm((T, y_s))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    own_s[...] = U.astype(own_s.dtype)
    plgpu.commit_smem()
    if "u" in outputs:
        plgpu.copy_smem_to_gmem(own_s, outputs["u"])
    after = tiles.accumulate(
        [*read, *(per_row(facts.at[j]) * z for j, z in enumerate(S))],
        [*([(A, own_s)] for _ in read), *([(compat.transpose(x), own_s)] for x in k)],
    )
    if q:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tiles.store(after[0], own_s, outputs["y"])
    return list(after[len(read) :])


def _backward(
    rows: Mapping[str, PyTree],
    facts: PyTree,
    system: PyTree,
    state: Sequence[PyTree],
    own_s: PyTree,
    outputs: Mapping[str, PyTree],
    dS: Sequence[Array],
) -> list[Array]:
    """The columns of dY of one chunk, and dS before it."""
    q, k, r, do = (rows[name] for name in "qkrv")
    A, T = system.at[tiles.block(0)], system.at[tiles.block(1)]
    dU = tiles.mm((compat.transpose(A), do), *zip(k, state, strict=True))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    own_s[...] = dU.astype(own_s.dtype)
    plgpu.commit_smem()
    dY = tiles.mm((compat.transpose(T), own_s))
    state[0][...] = (-per_row(facts.at[len(dS)]) * dY).astype(do.dtype)
    plgpu.commit_smem()
    if "y" in outputs:
        tiles.store(dY, own_s, outputs["y"])
    init = [per_row(facts.at[j]) * z for j, z in enumerate(dS)]
    products = [[(compat.transpose(y), do), (compat.transpose(x), state[0])] for x, y in zip(r, q, strict=True)]
    dS = list(tiles.accumulate(init, products))
    plgpu.commit_smem()  # all have read what is stored next
    return dS
