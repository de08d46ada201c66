"""DHSA (arXiv 2510.24606): the past is cut into chunks where keys change; a query reads the best of them.

    score of token j = q_t · (Σ_{i in its chunk} k_i) / √|chunk|

A predictor, trained on the similarity of keys to the left and right, says where chunks begin.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hydrax.core.build import ConfigError, Positive
from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array, Bool, Float, PyTree
from hydrax.infer.policy.base import Choice, Policy, Seen, by_query_head, near, top
from hydrax.nn.attention import AttentionConfig
from hydrax.ops.softmax.forms import MASKED

Predictor = dict[str, Array]
"""Parameters of the boundary predictor: the query of its pooling, and two layers."""


@dataclasses.dataclass(frozen=True)
class DHSA(Policy):
    """A chunk ends where the predictor finds a boundary, or after `longest` tokens. A query reads the `count` tokens of
    the highest chunk scores, the last `window`, and chunks whose end it cannot know yet.

    A boundary before key j shows in the keys up to j + reach - 1, so that a query later than that knows of it: what a
    token reads depends on no later one. Queries are not pooled, for the same reason. Without a file of parameters, the
    similarity itself, which the predictor is trained on, decides.
    """

    ABOUT: ClassVar[str] = "chunks of variable length, chosen by their summed keys"

    count: Positive = 512  # tokens of chosen chunks
    window: Positive = 64  # last tokens, which are read besides
    longest: Positive = 64  # tokens of a chunk at most
    reach: Positive = 8  # keys on either side of a boundary that it is found by
    below: float = 0.5  # similarity below which there is a boundary, without a predictor
    predictor: str | None = None  # file of its parameters; None: the similarity itself decides

    def check(self, layers: Sequence[AttentionConfig]) -> None:
        if self.predictor is not None and not pathlib.Path(self.predictor).is_file():
            raise ConfigError("predictor", self.predictor, "expected a file of `dhsa.save`")

    def select(self, seen: Seen, layer: int, handed: PyTree, memory: PyTree) -> Choice:
        H, S, index = seen.q.shape[2], seen.slots, jnp.arange(seen.slots)
        held = index <= jnp.where(seen.real, seen.positions, -1).max(1, keepdims=True)
        keys = jnp.where(held[..., None, None], fp32(seen.k), 0)
        chunk, ends = _chunks(self._boundaries(keys), held, self.longest)
        sums = jax.vmap(lambda x, c: jax.ops.segment_sum(x, c, num_segments=S))
        total = sums(keys, chunk)
        size = sums(held.astype(jnp.float32), chunk)
        mean = total / jnp.sqrt(jnp.maximum(size, 1))[..., None, None]
        z = einsum("bthk,bhsk->bhts", seen.q, by_query_head(mean, H))
        z = jax.vmap(lambda z, c: z[..., c])(z, chunk)  # of the chunk, for each of its tokens
        known = (ends[:, None] + self.reach - 1 <= seen.positions[..., None])[:, None]
        z = jnp.where(known & seen.visible(), z, MASKED)
        return Choice(top(z, self.count) | ~known | near(seen, self.window))

    def _boundaries(self, keys: Float[Array, "B S Hk K"]) -> Bool[Array, "B S"]:
        if self.predictor is None:
            return similarity(keys, self.reach) < self.below
        with np.load(self.predictor) as file:
            params = {name: jnp.asarray(x) for name, x in file.items()}
        return boundary_logits(params, keys, self.reach) > 0


def similarity(keys: Float[Array, "B S Hk K"], reach: int) -> Float[Array, "B S"]:
    """Mean over heads of the cosine between the means of the `reach` keys before j and of those from j on."""
    left, right = (x.mean(2) for x in _sides(keys, reach))
    norms = jnp.linalg.norm(left, axis=-1) * jnp.linalg.norm(right, axis=-1)
    return ((left * right).sum(-1) / jnp.maximum(norms, 1e-6)).mean(-1)


def boundary_logits(params: Predictor, keys: Float[Array, "B S Hk K"], reach: int) -> Float[Array, "B S"]:
    """Where a chunk begins: both sides pooled by attention with a learned query, then two layers on the pair."""

    def pooled(x: Array) -> Array:
        weight = jax.nn.softmax(einsum("bsrgk,gk->bsrg", x, params["pool"]), axis=2)
        return (weight[..., None] * x).sum(2)

    left, right = (pooled(x) for x in _sides(keys, reach))
    pair = jnp.concatenate([left, right, left * right, jnp.abs(left - right)], axis=-1)
    hidden = jax.nn.gelu(pair.reshape(*pair.shape[:2], -1) @ params["in"] + params["in_bias"])
    return hidden @ params["out"] + params["out_bias"]


def train_predictor(
    keys: Float[Array, "B S Hk K"], *, reach: int, below: float, hidden: int = 32, steps: int = 200, seed: int = 0
) -> tuple[Predictor, Array]:
    """A predictor of `similarity` < `below` on keys of a layer, and its losses (mean cross-entropy) by step."""
    G, K = keys.shape[2:]
    first, second, third = jax.random.split(jax.random.key(seed), 3)
    params = {
        "pool": 0.02 * jax.random.normal(first, (G, K)),
        "in": jax.random.normal(second, (4 * G * K, hidden)) * (4 * G * K) ** -0.5,
        "in_bias": jnp.zeros(hidden),
        "out": jax.random.normal(third, (hidden,)) * hidden**-0.5,
        "out_bias": jnp.zeros(()),
    }
    labels = similarity(keys, reach) < below
    optimiser = optax.adam(1e-2)

    def loss(params: Predictor) -> Array:
        return optax.sigmoid_binary_cross_entropy(boundary_logits(params, keys, reach), labels).mean()

    def step(carry: tuple, _: None) -> tuple:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimiser.init(params)), length=steps))
    (params, _), losses = run(params)
    return params, losses


def save(params: Predictor, path: str | pathlib.Path) -> None:
    """Writes the parameters to a file for `DHSA.predictor` (.npz)."""
    np.savez(path, **jax.device_get(params))


def _sides(keys: Array, reach: int) -> tuple[Array, Array]:
    """The `reach` keys before each, and those from it on, [B,S,reach,Hk,K]; zeros beyond the ends."""
    x = jnp.pad(fp32(keys), ((0, 0), (reach, reach), (0, 0), (0, 0)))
    at = jnp.arange(keys.shape[1])[:, None] + jnp.arange(reach)
    return x[:, at], x[:, at + reach]


def _chunks(starts: Bool[Array, "B S"], held: Bool[Array, "B S"], longest: int) -> tuple[Array, Array]:
    """The chunk of every key, and the index of the first key behind that chunk."""
    index = jnp.arange(starts.shape[1])

    def one(since: Array, begins: Array) -> tuple[Array, Array]:
        begins = begins | (since + 1 >= longest)
        return jnp.where(begins, 0, since + 1), begins

    _, begins = jax.lax.scan(one, jnp.full(starts.shape[:1], -1), jnp.moveaxis(starts, 1, 0))
    begins = jnp.moveaxis(begins, 0, 1) & (index > 0)
    chunk = jnp.cumsum(begins, axis=1)
    following = jnp.where(begins, index, starts.shape[1])
    behind = jnp.flip(jax.lax.cummin(jnp.flip(following, 1), axis=1), 1)  # the first start at or after each key
    behind = jnp.pad(behind[:, 1:], ((0, 0), (0, 1)), constant_values=starts.shape[1])
    return chunk, behind
