"""What is done to every row by itself, forward and backward in one pass over memory: gated products, norms.

    glu:       y = act(gate) ⊙ x
    rms_norm:  y = x / sqrt(c Σ x² + eps) ⊙ weight ⊙ act(gate),      c = 1 / D, or 1 for the L2 norm

Papers: gated linear units arXiv 2002.05202, RMSNorm 1910.07467, its gated form 2307.08621.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Float
from hydrax.ops.dispatch import select_fast

ACTIVATIONS: dict[str | None, Callable[[Array], Array]] = {
    None: lambda x: x,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
}


def _glu(gate: Array, x: Array, activation: str | None) -> Array:
    return ACTIVATIONS[activation](gate) * x


def _fused_glu(gate: Array, x: Array, activation: str | None) -> Array:
    from hydrax.ops.rowwise import gpu_glu

    return gpu_glu.fused(activation, *tree.alike((gate, x)))


def _rms_norm(
    x: Array, weight: Array | None, gate: Array | None, *, activation: str | None, mean: bool, eps: float
) -> Array:
    y = fp32(x)
    y = y * jax.lax.rsqrt((jnp.mean if mean else jnp.sum)(y * y, axis=-1, keepdims=True) + eps)
    y = y if weight is None else y * weight
    return (y if gate is None else y * ACTIVATIONS[activation](fp32(gate))).astype(x.dtype)


def _fused_rms_norm(*inputs: Any, **how: Any) -> Array:
    from hydrax.ops.rowwise import gpu_norm

    return gpu_norm.fused(*tree.alike(inputs), **how)


GLU: dict[str, Callable] = {"recurrent": _glu, "chunked": _glu, "pallas_gpu": _fused_glu}
NORM: dict[str, Callable] = {"recurrent": _rms_norm, "chunked": _rms_norm, "pallas_gpu": _fused_rms_norm}


def glu(
    gate: Float[Array, "B T *C"], x: Float[Array, "B T *C"], *, activation: str | None = "silu", impl: str | None = None
) -> Float[Array, "B T *C"]:
    """act(gate) ⊙ x.

    Args:
      activation: None, "silu", "sigmoid", "relu" or "gelu" (its tanh approximation).
      impl: "recurrent" or "chunked" (the same here), "pallas_gpu" (a Hopper GPU, a multiple of 1024 entries; both
        gradients in one pass), or None to choose.

    Raises:
      ValueError: shapes that differ, an unknown activation, or an `impl` that is unknown or cannot serve.
    """
    _check(x, gate, activation)
    form = select_fast("glu", impl, GLU, "hydrax.ops.rowwise.gpu_glu", gate, x)
    return form(gate, x, activation)


def rms_norm(
    x: Float[Array, "B *C D"],
    weight: Float[Array, "D"] | None = None,
    gate: Float[Array, "B *C D"] | None = None,
    *,
    activation: str | None = "silu",
    mean: bool = True,
    eps: float = 1e-6,
    impl: str | None = None,
) -> Float[Array, "B *C D"]:
    """x / sqrt(c Σ x² + eps) ⊙ weight ⊙ act(gate) over the last dimension, formed in fp32, in the dtype of x.

    Args:
      activation: of the gate: None, "silu", "sigmoid", "relu" or "gelu" (its tanh approximation).
      mean: c = 1 / D (root mean square); False: c = 1 (L2 norm).
      impl: "recurrent" or "chunked" (the same here), "pallas_gpu" (a Hopper GPU, bfloat16, D = 64 or 128, a multiple
        of 64 rows), or None to choose.

    Raises:
      ValueError: shapes that do not fit, an unknown activation, or an `impl` that is unknown or cannot serve.
    """
    if gate is not None:
        _check(x, gate, activation)
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {weight.shape}: expected {x.shape[-1:]} for x {x.shape}")
    form = select_fast("rms_norm", impl, NORM, "hydrax.ops.rowwise.gpu_norm", x, gate)
    return form(x, weight, gate, activation=activation, mean=mean, eps=eps)


def _check(x: Array, gate: Array, activation: str | None) -> None:
    if gate.shape != x.shape:
        raise ValueError(f"gate {gate.shape}: expected {x.shape}, the shape of x")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}: expected one of {', '.join(map(str, ACTIVATIONS))}")
