"""A short depthwise causal convolution with its parameters."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.typing import Array
from hydrax.nn.param import Init, param
from hydrax.parallel.sequence import short_conv
from hydrax.parallel.shards import Shards


class ShortConv(nnx.Module):
    """y_t = act(b + Σ_{i<W} w_i ⊙ x_{t-d(W-1-i)}) for x [B,T,*shape]; its state is the last d(W - 1) inputs.

    w and b are initialised uniformly in ±1/sqrt(W), the fan-in of a depthwise convolution; with `init="normal"`, w as
    N(0, 0.02²); with `init="small"`, w as N(0, 0.01/W) and b as 0.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int,
        *,
        axes: tuple[str, ...],
        rngs: nnx.Rngs,
        bias: bool = False,
        activation: str | None = "silu",
        dilation: int = 1,
        init: Literal["uniform", "normal", "small"] = "uniform",
    ):
        self.shape, self.width, self.activation, self.dilation = shape, width, activation, dilation
        uniform, normal = _uniform(1 / math.sqrt(width)), jax.nn.initializers.normal
        weight, offset = {
            "uniform": (uniform, uniform),
            "normal": (normal(0.02), uniform),
            "small": (normal(0.1 / math.sqrt(width)), jax.nn.initializers.zeros),
        }[init]
        self.weight = param(rngs, weight, (width, *shape), ("conv", *axes), cast=True)
        self.bias = param(rngs, offset, shape, axes, cast=True) if bias else None

    def __call__(
        self,
        x: Array,
        state: Array | None = None,
        *,
        segment_ids: Array | None = None,
        shards: Shards | None = None,
        impl: str | None = None,
    ) -> tuple[Array, Array]:
        bias = None if self.bias is None else self.bias[...]
        return short_conv(
            x,
            self.weight[...],
            bias,
            activation=self.activation,
            dilation=self.dilation,
            initial_state=state,
            segment_ids=segment_ids,
            shards=shards,
            impl=impl,
        )

    def init_state(self, batch: int, dtype: jnp.dtype) -> Array:
        """The inputs before token 0: zeros [B,d(W-1),*shape]."""
        return jnp.zeros((batch, self.dilation * (self.width - 1), *self.shape), dtype)


def _uniform(bound: float) -> Init:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
