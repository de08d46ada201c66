"""Parameters that say how they are sharded and optimised.

Every `nnx.Param` of hydrax carries `axes` (a logical axis per dimension, resolved by `parallel.rules`), `decay`
(weight decay applies), `matrix` (input and output dimensions for matrix optimisers such as Muon, as negative
indices; None: the parameter is left to Adam), `cast` (used in the compute dtype; otherwise always fp32), `residual`
(writes into the residual stream: scaled by 1/sqrt(2·depth) at initialisation) and `rule` (how its gradient moves it:
"gradient", by the optimiser; "balance", by a fixed rate against the sign of what is no derivative of the loss but a
count, see `nn.moe`, and so belongs in no gradient norm; "average", by a mean of what tokens say of it: its last
dimension has n numbers and one empty place, in which the gradient counts what it sums, see `summed`).
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.typing import Array

Init = Callable[[Array, tuple[int, ...], jnp.dtype], Array]
Matrix = tuple[tuple[int, ...], tuple[int, ...]]

TRUNCATED = 0.87962566
"""Standard deviation of a standard normal distribution that is cut at -2 and 2."""


def param(
    rngs: nnx.Rngs,
    init: Init,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    *,
    decay: bool = False,
    matrix: Matrix | None = None,
    cast: bool = False,
    residual: bool = False,
    rule: Literal["gradient", "balance", "average"] = "gradient",
) -> nnx.Param:
    """An fp32 parameter with the metadata described above."""
    if len(axes) != len(shape):
        raise ValueError(f"axes {axes} do not name the dimensions of {shape}")
    value = init(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=axes, decay=decay, matrix=matrix, cast=cast, residual=residual, rule=rule)


def fan_in(n: int, scale: float = 1.0) -> Init:
    """A normal distribution of standard deviation `scale`/sqrt(n), cut at two deviations of what it was before."""
    return jax.nn.initializers.truncated_normal(scale / math.sqrt(n) / TRUNCATED)


@jax.custom_vjp
def summed(y: Array, value: Array, grad: Array) -> Array:
    """y; a parameter of this value gets `grad` for a gradient, whatever the loss.

    Gradients add up over microbatches and devices, and are then divided by one number: so must `grad`. For the rule
    "average" it is the sum of moves and, in the last place, their number: the ratio, which is the step, is exact.
    """
    return y


summed.defvjp(lambda y, value, grad: (y, grad.astype(value.dtype)), lambda grad, dy: (dy, grad, None))
