"""One token of the ops with a matrix state on Hopper GPUs: a kernel that reads the state once and writes it once.

    S̃ = diag(exp g) S,      u = v  or  beta (v - S̃ᵀ k),      S ← S̃ + k uᵀ,      o = scale · Sᵀ q

A thread block holds all rows of 64 columns of a state in registers; columns need nothing of one another. All arithmetic
is fp32, as in the definition. The state is updated in place: XLA copies one that is neither donated nor carried by a
loop before.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, PyTree
from hydrax.ops import layout
from hydrax.ops.pallas import compat
from hydrax.ops.pallas.tuning import TUNING

COLUMNS = 64
"""Columns of a thread block."""
ROWS = 8
"""Rows that its 128 threads hold with four neighbouring columns each; then follow the next ones."""
MOST_ROWS = 256
LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((ROWS, COLUMNS), (2, COLUMNS), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
DTYPES = ("bfloat16", "float32")


def refusal(
    q: Array, k: Array, v: Array, log_decay: Array | None = None, device: jax.Device | None = None
) -> str | None:
    """Why this kernel cannot serve, or None; it serves every decay."""
    kind = (device or jax.devices()[0]).device_kind
    if not {x.dtype.name for x in (q, k, v)} <= set(DTYPES):
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: expected {' or '.join(DTYPES)}"
    K, V = q.shape[-1], v.shape[-1]
    if K % ROWS or K > MOST_ROWS or V % COLUMNS:
        return f"K, V = {K}, {V}: expected a multiple of {ROWS} up to {MOST_ROWS}, a multiple of {COLUMNS}"
    if kind not in TUNING:
        return f"the device is {kind!r}: expected one of {', '.join(TUNING)}"
    return None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def step(form: Callable, scale: float, q: Array, k: Array, v: Array, *others: Array | None) -> tuple[Array, Array]:
    """o [B,1,Hv,V] and the new state [B,Hv,K,V]; where it is differentiated, `form` of the same inputs instead.

    Args:
      q, k: [B,1,H,K].
      v: [B,1,Hv,V].
      others: beta [B,1,Hv] of the delta rule only; then log-decay None, [Hv], [B,1,Hv] or [B,1,H,K]; segment ids
        [B,1] or None; the state or None.
    """
    *beta, g, seg, S = others
    return _run(scale, q, k, v, beta[0] if beta else None, g, seg, S)


@step.defjvp
def _(form: Callable, scale: float, primals: tuple, tangents: tuple) -> tuple:
    return jax.jvp(form, primals, tangents)


@functools.partial(jax.jit, static_argnums=0)  # equal layers share a trace
def _run(
    scale: float,
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None,
    g: Array | None,
    seg: Array | None,
    S: Array | None,
) -> tuple[Array, Array]:
    B, _, Hv, V = v.shape
    K = q.shape[-1]
    if seg is not None and g is not None and g.ndim == 1:
        g = jnp.broadcast_to(g, v.shape[:3])
    inputs = {"q": q, "k": k, "v": v} | {name: fp32(x) for name, x in {"beta": beta, "g": g}.items() if x is not None}
    _, valid, padded = layout.at_padding(seg, *inputs.values())
    inputs = dict(zip(inputs, padded, strict=True))
    S = jnp.zeros((B, Hv, K, V), jnp.float32) if S is None else fp32(S)
    o, S = compat.in_place(
        functools.partial(_body, scale),
        inputs,
        jax.ShapeDtypeStruct(v.shape, v.dtype),
        S,
        {"columns": V // COLUMNS, "h": Hv, "b": B},
    )
    return o if valid is None else o * valid[:, :, None, None], S


def _body(scale: float, inputs: Mapping[str, PyTree], old: PyTree, new: PyTree, output: PyTree) -> None:
    """One thread block: some columns of the state of a row and a value head."""
    b, h = (jax.lax.axis_index(name) for name in ("b", "h"))
    columns = pl.ds(jax.lax.axis_index("columns") * COLUMNS, COLUMNS)
    key_head = jax.lax.div(h, jnp.int32(output.shape[2] // inputs["k"].shape[2]))
    shape = (old.shape[2], COLUMNS)

    def load(ref: PyTree, layout: Any) -> Array:
        return compat.load(ref, layout).astype(jnp.float32)

    def spread(x: Array, axis: int) -> Array:
        return plgpu.layout_cast(jax.lax.broadcast_in_dim(x, shape, [axis]), LAYOUT)

    def per_row(name: str) -> Array:
        return spread(load(inputs[name].at[b, 0, key_head], LAYOUT.reduce(1)), 0)

    def decay() -> Array:
        g = inputs["g"]
        if len(g.shape) == 4:
            return jnp.exp(per_row("g"))
        return jnp.exp(g[h] if len(g.shape) == 1 else g[b, 0, h])

    S = load(old.at[b, h, :, columns], LAYOUT)
    k, q = per_row("k"), per_row("q")
    u = load(inputs["v"].at[b, 0, h, columns], LAYOUT.reduce(0))
    if "g" in inputs:
        S *= decay()
    if "beta" in inputs:
        u = inputs["beta"][b, 0, h] * (u - (k * S).sum(0))
    S += k * spread(u, 1)
    new[b, h, :, columns] = S
    output[b, 0, h, columns] = (scale * (q * S).sum(0)).astype(output.dtype)
