"""What inference policies share: what a layer sees, what is chosen of it, and attention over the choice.

A policy decides at inference which keys of a trained softmax layer each query reads. It is a different function than
the one that was trained, and no training code knows of it. `report` tells what it misses.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from hydrax.core.build import ConfigError
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Bool, Float, Int, PyTree
from hydrax.nn.attention import AttentionConfig
from hydrax.ops.softmax import forms
from hydrax.ops.sparse import masked_attention


class Seen(NamedTuple):
    """What the queries of one layer may read: one document per row, key j at position j.

    Attributes:
      q: queries after RoPE.
      k, v: keys after RoPE and values; those beyond the last query's position are empty.
      positions: int32 [B,T], of the queries; consecutive in a row, up to padding.
      real: bool [B,T], false for padding.
      options: those of the layer.
      layers: how many softmax layers the model has.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B S Hk K"]
    v: Float[Array, "B S Hk V"]
    positions: Int[Array, "B T"]
    real: Bool[Array, "B T"]
    options: AttentionConfig
    layers: int

    @property
    def slots(self) -> int:
        """S, the most keys there may be."""
        return self.k.shape[1]

    @property
    def scale(self) -> float:
        """The factor on scores."""
        return self.options.scale or self.q.shape[-1] ** -0.5

    def facts(self) -> dict[str, Any]:
        """What ops are told beside queries, keys and values."""
        return {"positions": self.positions, "scale": self.scale, "softcap": self.options.softcap}

    def distance(self) -> Int[Array, "B 1 T S"]:
        """How far before its query each key is; negative in the future."""
        return (self.positions[:, :, None] - jnp.arange(self.slots))[:, None]

    def visible(self) -> Bool[Array, "B 1 T S"]:
        """The past of each query; nothing for padding."""
        return (self.distance() >= 0) & self.real[:, None, :, None]

    def scores(self) -> Float[Array, "B H T S"]:
        """fp32 scores, `MASKED` outside of the past."""
        (B, T, H, K), G = self.q.shape, self.k.shape[2]
        queries = forms.Queries(self.q.reshape(B, T, G, H // G, K), self.positions)
        keys = forms.Keys(self.k, self.v, jnp.arange(self.slots)[None])
        z = forms.scores(queries, keys, forms.Rules(self.scale, self.options.softcap, None, 0, False))
        return jnp.where(self.visible(), jnp.moveaxis(z, 3, 2).reshape(B, H, T, -1), forms.MASKED)

    def probabilities(self, kept: Array | None = None) -> Float[Array, "B H T S"]:
        """Softmax of the scores over what is kept, everything if None; zeros where that is nothing."""
        z = self.scores()
        z = z if kept is None else jnp.where(kept, z, forms.MASKED)
        return jnp.where(z > forms.MASKED / 2, jax.nn.softmax(z, axis=-1), 0)


class Choice(NamedTuple):
    """What a policy chose.

    Attributes:
      kept: which keys each query reads; entries outside of its past mean nothing.
      handed: what the policy tells the next softmax layer of the same pass.
      memory: what it remembers of this layer for the next tokens.
      plan: how `attend` is to compute it, of the policy's own making.
    """

    kept: Bool[Array, "#B #H T S"]
    handed: PyTree = None
    memory: PyTree = None
    plan: PyTree = None


@dataclasses.dataclass(frozen=True)
class Policy:
    """Which keys a trained softmax layer reads. Fields are the policy's options."""

    ABOUT: ClassVar[str]

    def check(self, layers: Sequence[AttentionConfig]) -> None:
        """Raises `ConfigError` if the softmax layers of a model do not suit."""

    def start(self, layers: Sequence[AttentionConfig], batch: int, slots: int) -> PyTree:
        """What `select` remembers of one layer, before the first token."""
        return None

    def select(self, seen: Seen, layer: int, handed: PyTree, memory: PyTree) -> Choice:
        """The keys that each query reads. `layer` counts softmax layers, and the first is handed None."""
        raise NotImplementedError

    def attend(self, seen: Seen, choice: Choice) -> Float[Array, "B T H V"]:
        """Attention over the choice."""
        return masked(seen, choice.kept & seen.visible())


def masked(seen: Seen, kept: Bool[Array, "B #H T S"]) -> Float[Array, "B T H V"]:
    """Attention over the keys that are kept."""
    return masked_attention(seen.q, seen.k, seen.v, kept, **seen.facts())


def relative_error(actual: Array, expected: Array, real: Array | bool = True) -> Float[Array, ""]:
    """rms(actual - expected) / rms(expected) over what is real."""
    a, e = (jnp.where(real, fp32(x), 0) for x in (actual, expected))
    return jnp.sqrt(jnp.square(a - e).sum() / jnp.maximum(jnp.square(e).sum(), 1e-30))


def top(scores: Float[Array, "... S"], count: int) -> Bool[Array, "... S"]:
    """The `count` highest of each row, the earlier one of equals; what is `MASKED` never."""
    values, index = jax.lax.top_k(scores, min(count, scores.shape[-1]))
    return jnp.put_along_axis(jnp.zeros(scores.shape, bool), index, values > forms.MASKED / 2, axis=-1, inplace=False)


def near(seen: Seen, window: int, sink_tokens: int = 0) -> Bool[Array, "B 1 T S"]:
    """The last `window` keys, the query's own included, and the first of the document."""
    distance = seen.distance()
    return (distance >= 0) & ((distance < window) | (jnp.arange(seen.slots) < sink_tokens))


def blocks_of(x: Array, size: int, value: Any = 0) -> Array:
    """[B,T,...] as [B,N,size,...], the last block filled up with `value`."""
    N = -(-x.shape[1] // size)
    x = jnp.pad(x, [(0, 0), (0, N * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2), constant_values=value)
    return x.reshape(x.shape[0], N, size, *x.shape[2:])


def same_heads(layers: Sequence[AttentionConfig], name: str) -> None:
    """Raises `ConfigError` unless all layers have the same heads, which pass their keys on."""
    found = sorted({(layer.heads, layer.kv_heads or layer.heads) for layer in layers})
    if len(found) > 1:
        raise ConfigError("policy", name, f"expected softmax layers with the same heads and kv_heads, got {found}")


def by_query_head(x: Float[Array, "B S Hk K"], heads: int) -> Float[Array, "B H S K"]:
    """Keys of the head that serves each head of queries, in fp32."""
    return jnp.repeat(jnp.moveaxis(fp32(x), 2, 1), heads // x.shape[2], axis=1)
