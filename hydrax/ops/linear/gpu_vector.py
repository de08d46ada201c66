"""`linear_attention` with vector decays on Hopper GPUs: forward and backward as Pallas kernels.

With the rows Q̂, K̂, the matrix A and the decay λ of every chunk, which `ops.pallas.vector` prepares, a sweep is

    O = A V + Q̂ S          S ← λ S + K̂ᵀ V            from the first chunk to the last
    dV = Aᵀ dO + K̂ dS      dS ← λ dS + Q̂ᵀ dO         from the last to the first

The S before every chunk, and the dS after it, are kept in bf16 for the gradients of q, k and g, in which chunks are
independent.
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
from hydrax.ops.dispatch import KERNEL
from hydrax.ops.pallas import chunks, compat, tiles, vector
from hydrax.ops.pallas.sweep import sweep
from hydrax.ops.pallas.tiles import per_row
from hydrax.ops.pallas.tuning import Tuning


def fused(
    scale: float, tuning: Tuning, q: Array, k: Array, v: Array, g: Array, seg: Array | None, S: Array | None
) -> tuple[Array, Array]:
    """o [B,T,Hv,V] and the final state [B,Hv,K,V] of q, k, g [B,T,H,K], v [B,T,Hv,V], S [B,Hv,K,V]."""
    return chunks.by_whole_chunks(functools.partial(_fused, scale, tuning), q, k, v, fp32(g), seg, S=S)


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
    g: Array,
    seg: Array | None,
    S: Array | None,
) -> tuple[tuple[Array, Array], tuple]:
    """o and the final state; what the chunks need, and all that is wanted of them."""
    rows, decay, A = vector.prepare(scale, q, k, g, vector.facts_of(seg))
    n = chunks.segments(v, tuning)
    S, _ = _between({"k": rows["k"], "v": v}, decay, A, S, n, tuning)
    found = sweep(_forward, {**rows, "v": v}, decay, A, n, tuning, Z=S, wanted=wanted)
    return (found["y"], found["Z"][n - 1 :: n]), (rows, decay, A, found.get("states"))


def _vjp_forward(scale: float, tuning: Tuning, *inputs: Any) -> tuple[tuple, tuple]:
    outputs, kept = checkpoint_name(_run(scale, tuning, ("y", "Z", "states"), *inputs), KERNEL)
    return outputs, (*inputs, kept)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _vjp_backward(scale: float, tuning: Tuning, saved: tuple, cotangents: tuple) -> tuple:
    q, k, v, g, seg, S, (rows, decay, A, states) = saved
    do, dS = cotangents
    n = chunks.segments(v, tuning)
    dS, dS0 = _between({"k": rows["q"], "v": do}, decay, A, dS, n, tuning, reverse=True)
    turned = {"q": rows["k"], "k": rows["q"], "v": do}
    back = sweep(_backward, turned, decay, A, n, tuning, Z=dS, wanted=("y", "Z", "states"), reverse=True)
    inputs = {"q": q, "k": k, "g": g, "u": v, "do": do}
    found = vector.gradients(scale, inputs, vector.facts_of(seg), None, states, back["states"])
    dq, dk, dg = (chunks.ungroup(found[name], inputs[name]) for name in "qkg")
    if S is not None and n == 1:
        dS0 = back["Z"]
    return dq, dk, back["y"], dg, None, None if S is None else dS0


_fused.defvjp(_vjp_forward, _vjp_backward)


def _between(
    rows: Mapping[str, Array],
    decay: Array,
    A: Array,
    Z: Array | None,
    n: int,
    tuning: Tuning,
    *,
    reverse: bool = False,
) -> tuple[Array | None, Array | None]:
    """The states before the n segments of every row [B·n,Hv,K,V], and the final one; for one segment, `Z` and None."""
    if n == 1:
        return Z, None
    updates = sweep(_forward, rows, decay, A, n, tuning, reverse=reverse)["Z"]
    keeps = jnp.repeat(decay.reshape(*decay.shape[:3], -1), updates.shape[1] // decay.shape[2], axis=2)
    return chunks.between_segments(updates, keeps, Z, reverse=reverse)


def _step(
    transposed: bool,
    rows: Mapping[str, PyTree],
    decay: PyTree,
    A: PyTree,
    state: Sequence[PyTree],
    own_s: PyTree,
    outputs: Mapping[str, PyTree],
    Z: Sequence[Array],
) -> list[Array]:
    """The columns of y of one chunk, if there are rows "q" to read the state, and Z after it."""
    v = rows["v"]
    init = [per_row(decay.at[j]) * z for j, z in enumerate(Z)]
    products = [[(compat.transpose(x), v)] for x in rows["k"]]
    if "q" not in rows:
        return list(tiles.accumulate(init, products))
    read = [(compat.transpose(A) if transposed else A, v), *zip(rows["q"], state, strict=True)]
    y, *Z = tiles.accumulate([tiles.zeros(), *init], [read, *products])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    tiles.store(y, own_s, outputs["y"])
    return list(Z)


_forward = functools.partial(_step, False)
_backward = functools.partial(_step, True)
