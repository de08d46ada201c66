"""Learning-rate schedules: linear warmup to the peak, then a shape that falls from 1 (peak) to 0 (final rate)."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
import optax

from hydrax.core.typing import Array

Name = Literal["constant", "cosine", "wsd", "wsd_sqrt"]


def _decay(x: Array, fraction: float) -> Array:
    """Progress through the last `fraction` of the run, 0 before it."""
    return jnp.clip((x - (1 - fraction)) / fraction, 0.0, 1.0) if fraction else jnp.zeros_like(x)


SHAPES: dict[str, Callable[[Array, float], Array]] = {
    "constant": lambda x, fraction: jnp.ones_like(x),
    "cosine": lambda x, fraction: 0.5 + 0.5 * jnp.cos(jnp.pi * x),
    "wsd": lambda x, fraction: 1.0 - _decay(x, fraction),
    "wsd_sqrt": lambda x, fraction: 1.0 - jnp.sqrt(_decay(x, fraction)),
}
"""Name -> shape(x, decay fraction), x from 0 to 1 through the steps after warmup.

cosine: arXiv 1608.03983. wsd (warmup, stable, decay): arXiv 2404.06395; wsd_sqrt decays as 1 - sqrt: arXiv 2405.18392.
"""


def make_schedule(
    name: Name, *, peak: float, steps: int, warmup: int, decay_fraction: float, final_fraction: float
) -> optax.Schedule:
    """lr(n) for the n-th update, n = 0, 1, ..., as an fp32 scalar.

    Args:
      name: row of `SHAPES`.
      peak: rate after warmup.
      steps: updates in all; the final rate is reached after the last.
      warmup: updates until the peak; the first has peak / warmup.
      decay_fraction: share of the steps after warmup in which the wsd shapes decay.
      final_fraction: final rate / peak.
    """

    def schedule(count: Array) -> Array:
        n = jnp.asarray(count, jnp.float32)
        x = jnp.clip((n - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        shape = final_fraction + (1 - final_fraction) * SHAPES[name](x, decay_fraction)
        return peak * jnp.minimum((n + 1) / max(warmup, 1), 1.0) * shape

    return schedule
