"""HyLRA (arXiv 2602.00777): few layers read everything and choose keys; the layers after each read these alone.

Which layers those are is planned on calibration text. Details are hydrax's own: the source gives them in outline.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from hydrax.core.build import ConfigError, NonNegative, Positive
from hydrax.core.typing import Array, Int, PyTree
from hydrax.infer.policy.base import Choice, Policy, Seen, masked, relative_error, same_heads, top
from hydrax.infer.policy.serve import attending, served_layers, walk
from hydrax.mixers import Context
from hydrax.models.lm import LM
from hydrax.nn.attention import AttentionConfig


@dataclasses.dataclass(frozen=True)
class HyLRA(Policy):
    """Anchor layers read all keys and hand on, per head, the `count` with the highest weight."""

    ABOUT: ClassVar[str] = "anchor layers read everything, the others the keys that these weigh most"

    anchors: tuple[NonNegative, ...] = (0,)  # layers that read all keys, counted among those of softmax
    count: Positive = 512  # keys that one hands on, per head

    def __post_init__(self) -> None:
        if self.anchors[:1] != (0,) or list(self.anchors) != sorted(set(self.anchors)):
            raise ConfigError("anchors", self.anchors, "expected softmax layers in rising order, the first of them 0")

    def check(self, layers: Sequence[AttentionConfig]) -> None:
        same_heads(layers, "hylra")
        if self.anchors[-1] >= len(layers):
            raise ConfigError("anchors", self.anchors, f"expected softmax layers below {len(layers)}")

    def select(self, seen: Seen, layer: int, handed: PyTree, memory: PyTree) -> Choice:
        if layer in self.anchors:
            return Choice(seen.visible(), handed=heaviest(seen, self.count))
        return Choice(handed, handed=handed)


def heaviest(seen: Seen, count: int) -> Array:
    """The `count` keys of highest score for every query and head, the query's own always among them."""
    return top(jnp.where(seen.distance() == 0, jnp.inf, seen.scores()), count)


def plan_anchors(
    sensitivity: np.ndarray, overlap: np.ndarray, *, cost: float, threshold: float = np.inf
) -> tuple[int, ...]:
    """The anchors of least cost, by dynamic programming over the last anchor.

    f(l) = min_{a<l} f(a) + cost + Σ_{a<m<l} (1 - overlap[a,m]) · sensitivity[m]

    Args:
      sensitivity: [L], error of the layer's output if it reads its own best keys alone.
      overlap: [L,L], part of the best keys of layer m that those of layer a are.
      cost: of reading all keys in one layer, in units of that error.
      threshold: layers of higher sensitivity are anchors.
    """
    L = len(sensitivity)
    best, last = np.full(L + 1, np.inf), np.zeros(L + 1, int)
    best[0] = 0.0  # layer 0 is an anchor, L stands for the end
    for end in range(1, L + 1):
        for a in range(end):
            between = np.arange(a + 1, end)
            if (sensitivity[between] > threshold).any():
                continue
            total = best[a] + cost + ((1 - overlap[a, between]) * sensitivity[between]).sum()
            if total < best[end]:
                best[end], last[end] = total, a
    anchors, at = [], L
    while at > 0:
        at = int(last[at])
        anchors.append(at)
    return tuple(reversed(anchors))


def profile(model: LM, tokens: Int[Array, "B T"], *, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Sensitivity [L] and overlap [L,L] of the softmax layers for `plan_anchors`, on calibration text.

    The overlap is the part of the `count` best keys of a layer that are among those of another, over heads and queries.
    """

    def run(tokens: Array) -> tuple[list, list]:
        errors, best = [], []

        def attend(seen: Seen, layer: int) -> Array:
            own = heaviest(seen, count) & seen.visible()
            full = masked(seen, seen.visible())
            errors.append(relative_error(masked(seen, own), full))
            best.append(own)
            return full

        walk(model, tokens, Context.of(tokens), attending(model, attend))
        return errors, [[(a & b).sum() / b.sum() for b in best] for a in best]

    same_heads(served_layers(model), "hylra")
    errors, overlap = jax.jit(run)(tokens)
    return np.asarray(errors), np.asarray(overlap)
