"""Channel mixing: feed-forward networks, gated or plain."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.typing import Array, Float
from hydrax.nn.linear import Linear

ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], bool]] = {
    "swiglu": (jax.nn.silu, True),
    "geglu": (jax.nn.gelu, True),
    "reglu": (jax.nn.relu, True),
    "sglu": (lambda x: x, True),
    "mlp": (jax.nn.gelu, False),
    "relu2": (lambda x: jnp.square(jax.nn.relu(x)), False),
}
"""Kind -> (activation, whether it gates a second projection)."""


def default_width(kind: str, d_model: int) -> int:
    """4 D, or 8 D / 3 where there are three matrices (equal parameters), rounded up to a multiple of 256."""
    width = d_model * 8 / 3 if ACTIVATIONS[kind][1] else d_model * 4
    return int(-(-width // 256) * 256)


class FFN(nnx.Module):
    """y = W_down (act(W_gate x) ⊙ W_up x), or W_down act(W_up x) (arXiv 2002.05202), with biases if `bias`."""

    def __init__(self, d_model: int, width: int, kind: str, *, bias: bool = False, rngs: nnx.Rngs):
        self.kind = kind
        gated = ACTIVATIONS[kind][1]
        self.gate = Linear(d_model, width, axes=("embed", "mlp"), bias=bias, rngs=rngs) if gated else None
        self.up = Linear(d_model, width, axes=("embed", "mlp"), bias=bias, rngs=rngs)
        self.down = Linear(width, d_model, axes=("mlp", "embed"), bias=bias, residual=True, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        act = ACTIVATIONS[self.kind][0]
        inner = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return self.down(inner)
