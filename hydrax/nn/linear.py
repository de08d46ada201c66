"""A bias-free or biased linear map between groups of named axes."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array
from hydrax.nn.param import fan_in, param


class Linear(nnx.Module):
    """y = x · W (+ b), contracting the last dimensions of x named by `shape_in` into `shape_out`.

    W is initialised as a truncated normal with standard deviation `scale`/sqrt(fan-in), b as `bias_init`.
    `residual` marks the projections that write into the residual stream.
    """

    def __init__(
        self,
        shape_in: int | tuple[int, ...],
        shape_out: int | tuple[int, ...],
        *,
        axes: tuple[str, ...],
        rngs: nnx.Rngs,
        bias: bool = False,
        bias_init: float = 0.0,
        scale: float = 1.0,
        residual: bool = False,
    ):
        self.shape_in = (shape_in,) if isinstance(shape_in, int) else shape_in
        self.shape_out = (shape_out,) if isinstance(shape_out, int) else shape_out
        dims = len(self.shape_in) + len(self.shape_out)
        inputs = tuple(range(-dims, -len(self.shape_out)))
        self.kernel = param(
            rngs,
            fan_in(math.prod(self.shape_in), scale),
            self.shape_in + self.shape_out,
            axes,
            decay=True,
            matrix=(inputs, tuple(range(-len(self.shape_out), 0))),
            cast=True,
            residual=residual,
        )
        constant = jax.nn.initializers.constant(bias_init)
        self.bias = param(rngs, constant, self.shape_out, axes[len(self.shape_in) :], cast=True) if bias else None

    def __call__(self, x: Array, *, exact: bool = False) -> Array:
        """y in the dtype of x, or `exact`: in fp32, not rounded to it."""
        n = len(self.shape_in)
        contract = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
        kernel = self.kernel[...].astype(x.dtype)
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        if exact and jax.default_backend() == "cpu":
            # The same products; XLA refuses some layouts of BF16 x BF16 = F32 on CPUs.
            x, kernel = fp32(x), fp32(kernel)
        kind = wide(x.dtype) if exact else None
        y = jax.lax.dot_general(x, kernel, (contract, ((), ())), precision=precision, preferred_element_type=kind)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)
