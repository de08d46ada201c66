"""Channel mixing: feed-forward networks, gated or plain."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError
from hydrax.core.typing import Array, Float
from hydrax.nn.linear import Linear
from hydrax.ops import rowwise

GLU: dict[str, str | None] = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "sglu": None}
"""Kinds that gate a second projection, and the activation of the gate."""

PLAIN: dict[str, Callable[[Array], Array]] = {
    "mlp": jax.nn.gelu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "boom": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
"""The others, and their activation."""

FOLDED = ("boom",)
"""Of these the kinds without a matrix at the end: their channels are added up."""

KINDS = (*GLU, *PLAIN)


def default_width(kind: str, d_model: int) -> int:
    """4 D, or 8 D / 3 where there are three matrices (equal parameters), rounded up to a multiple of 256.

    Without rounding where channels are added up.
    """
    if kind in FOLDED:
        return 4 * d_model
    width = d_model * 8 / 3 if kind in GLU else d_model * 4
    return int(-(-width // 256) * 256)


def check_width(kind: str, width: int, d_model: int) -> None:
    """Raises `ConfigError` for channels that cannot be added up to D."""
    if kind in FOLDED and width % d_model:
        raise ConfigError("ffn_dim", width, f"expected a multiple of d_model = {d_model} for ffn = {kind}")


def activated(kind: str, up: Array, gate: Array | None, *, impl: str | None = "chunked") -> Array:
    """act(gate) ⊙ up, or act(up) where nothing gates it; by XLA unless a caller passes the `impl` of a model."""
    return PLAIN[kind](up) if gate is None else rowwise.glu(gate, up, activation=GLU[kind], impl=impl)


class FFN(nnx.Module):
    """y = W_down (act(W_gate x) ⊙ W_up x), or W_down act(W_up x) (arXiv 2002.05202), with biases if `bias`.

    boom (arXiv 1911.11423) has no W_down: y_i = Σ_j a_(jD + i) for a = act(W_up x).
    """

    def __init__(self, d_model: int, width: int, kind: str, *, bias: bool = False, rngs: nnx.Rngs):
        self.kind = kind
        self.gate = Linear(d_model, width, axes=("embed", "mlp"), bias=bias, rngs=rngs) if kind in GLU else None
        folded, axes = kind in FOLDED, ("mlp", "embed")
        self.up = Linear(d_model, width, axes=("embed", "mlp"), bias=bias, residual=folded, rngs=rngs)
        self.down = None if folded else Linear(width, d_model, axes=axes, bias=bias, residual=True, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], *, impl: str | None = "chunked") -> Float[Array, "B T D"]:
        gate = None if self.gate is None else self.gate(x)
        a = activated(self.kind, self.up(x), gate, impl=impl)
        return a.reshape(*x.shape[:-1], -1, x.shape[-1]).sum(-2) if self.down is None else self.down(a)
