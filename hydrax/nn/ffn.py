"""Channel mixing: feed-forward networks, gated or plain."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.typing import Array, Float
from hydrax.nn.linear import Linear
from hydrax.ops import rowwise

GLU: dict[str, str | None] = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "sglu": None}
"""Kinds that gate a second projection, and the activation of the gate."""

PLAIN: dict[str, Callable[[Array], Array]] = {"mlp": jax.nn.gelu, "relu2": lambda x: jnp.square(jax.nn.relu(x))}
"""The others, and their activation."""

KINDS = (*GLU, *PLAIN)


def default_width(kind: str, d_model: int) -> int:
    """4 D, or 8 D / 3 where there are three matrices (equal parameters), rounded up to a multiple of 256."""
    width = d_model * 8 / 3 if kind in GLU else d_model * 4
    return int(-(-width // 256) * 256)


def activated(kind: str, up: Array, gate: Array | None, *, impl: str | None = "chunked") -> Array:
    """act(gate) ⊙ up, or act(up) where nothing gates it; by XLA unless a caller passes the `impl` of a model."""
    return PLAIN[kind](up) if gate is None else rowwise.glu(gate, up, activation=GLU[kind], impl=impl)


class FFN(nnx.Module):
    """y = W_down (act(W_gate x) ⊙ W_up x), or W_down act(W_up x) (arXiv 2002.05202), with biases if `bias`."""

    def __init__(self, d_model: int, width: int, kind: str, *, bias: bool = False, rngs: nnx.Rngs):
        self.kind = kind
        self.gate = Linear(d_model, width, axes=("embed", "mlp"), bias=bias, rngs=rngs) if kind in GLU else None
        self.up = Linear(d_model, width, axes=("embed", "mlp"), bias=bias, rngs=rngs)
        self.down = Linear(width, d_model, axes=("mlp", "embed"), bias=bias, residual=True, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], *, impl: str | None = "chunked") -> Float[Array, "B T D"]:
        gate = None if self.gate is None else self.gate(x)
        return self.down(activated(self.kind, self.up(x), gate, impl=impl))
