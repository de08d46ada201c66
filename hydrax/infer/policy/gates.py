"""Which heads retrieve: gates of LycheeDecode (arXiv 2602.04541), trained for a short time beside frozen weights.

    o = z·o_full + (1 - z)·o_sparse,      z = clip(lo + (hi - lo)·x, 0, 1),      x = (1 - (1 - u)^{1/b})^{1/a}

with u uniform: the HardKuma distribution, of which a gate is 0 with probability 1 - (1 - x0^a)^b, x0 = -lo / (hi - lo).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hydrax.core.typing import Array, Float, Int
from hydrax.infer.policy.base import Seen, masked, same_heads
from hydrax.infer.policy.reuse import heaviest
from hydrax.infer.policy.serve import attending, served_layers, walk
from hydrax.mixers import Context
from hydrax.models.lm import LM

LOW, HIGH = -0.1, 1.1
"""The stretch of a gate beyond [0,1], which puts mass on both ends."""

Gates = dict[str, Array]
"""Logarithms of a and b of every gate, [layers - 1, heads]: in the first layer all heads retrieve."""


def sample(gates: Gates, u: Float[Array, "L H"]) -> Float[Array, "L H"]:
    """z of uniform u."""
    a, b = jnp.exp(gates["a"]), jnp.exp(gates["b"])
    u = jnp.clip(u, 1e-4, 1 - 1e-4)  # the powers have no gradient at the ends
    x = (1 - (1 - u) ** (1 / b)) ** (1 / a)
    return jnp.clip(LOW + (HIGH - LOW) * x, 0, 1)


def median(gates: Gates) -> Float[Array, "L H"]:
    """z of u = 1/2, which decides after training."""
    return sample(gates, jnp.full(gates["a"].shape, 0.5))


def open_probability(gates: Gates) -> Float[Array, "L H"]:
    """P(z > 0) = (1 - x0^a)^b."""
    a, b = jnp.exp(gates["a"]), jnp.exp(gates["b"])
    return (1 - (-LOW / (HIGH - LOW)) ** a) ** b


def gated_logits(model: LM, tokens: Int[Array, "B T"], z: Float[Array, "L H"], count: int) -> Float[Array, "B T vocab"]:
    """Logits with every head between full attention (z = 1) and the keys that it inherits (z = 0)."""
    handed: Any = None

    def attend(seen: Seen, layer: int) -> Array:
        nonlocal handed
        own, full = heaviest(seen, count), masked(seen, seen.visible())
        if layer == 0:
            handed = own
            return full
        gate = z[layer - 1]
        inherited = masked(seen, handed & seen.visible())
        handed = jnp.where((gate > 0.5)[:, None, None], own, handed)
        return (gate[:, None] * full + (1 - gate[:, None]) * inherited).astype(full.dtype)

    x, _ = walk(model, tokens, Context.of(tokens), attending(model, attend))
    return model.logits(x)[..., : model.vocabulary]


def train_gates(
    model: LM,
    tokens: Int[Array, "B T"],
    *,
    count: int,
    retrieval: float,
    steps: int = 100,
    lr: float = 0.1,
    seed: int = 0,
) -> tuple[tuple[tuple[int, ...], ...], Gates, Array]:
    """The heads for `Lychee.retrieval`, the gates, and the losses by step.

    Minimises KL(full model || gated model) + m · (E[retrieval heads] - budget), with a multiplier m >= 0 that grows
    where the budget is exceeded (its gradient is ascended). The model stays as it is.

    Args:
      count: keys that a retrieval head hands on.
      retrieval: the budget, as a part of the heads of all layers but the first.
    """
    layers = served_layers(model)
    same_heads(layers, "lychee")
    shape = (len(layers) - 1, layers[0].heads)
    gates = {"a": jnp.zeros(shape), "b": jnp.zeros(shape)}
    full = jax.lax.stop_gradient(jax.nn.log_softmax(model(tokens)))
    optimiser = optax.adam(lr)

    def loss(gates: Gates, multiplier: Array, key: Array) -> tuple[Array, tuple[Array, Array]]:
        z = sample(gates, jax.random.uniform(key, shape))
        gated = jax.nn.log_softmax(gated_logits(model, tokens, z, count))
        distance = (jnp.exp(full) * (full - gated)).sum(-1).mean()
        excess = open_probability(gates).mean() - retrieval
        return distance + multiplier * excess, (distance, excess)

    def step(carry: tuple, key: Array) -> tuple:
        gates, state, multiplier = carry
        (_, (distance, excess)), gradient = jax.value_and_grad(loss, has_aux=True)(gates, multiplier, key)
        updates, state = optimiser.update(gradient, state)
        return (optax.apply_updates(gates, updates), state, jnp.maximum(multiplier + lr * excess, 0)), distance

    keys = jax.random.split(jax.random.key(seed), steps)
    run = jax.jit(lambda gates: jax.lax.scan(step, (gates, optimiser.init(gates), jnp.float32(0)), keys))
    (gates, _, _), losses = run(gates)
    heads = np.asarray(median(gates)) > 0.5
    return tuple(tuple(int(h) for h in np.flatnonzero(own)) for own in heads), gates, losses
