"""Lower bounds of forget gates that rise with the depth."""

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.typing import Array, Float
from hydrax.nn.param import param


class LowerBounds(nnx.Module):
    """γ [layers,W] of HGRN (arXiv 2311.04823): γ^l = Σ_{i<=l} P_i - P_0 for P = softmax of Γ over the layers.

    Γ is 0 at first, so γ^l = l / layers. The first layer may forget everything.
    """

    def __init__(self, layers: int, width: int, *, rngs: nnx.Rngs):
        self.width = width
        self.weight = param(rngs, jax.nn.initializers.zeros, (layers, width), ("depth", "gates"))

    def __call__(self) -> Float[Array, "L W"]:
        shares = jax.nn.softmax(self.weight[...], axis=0)
        return jnp.cumsum(shares.at[0].set(0), axis=0)
