"""What a model says of given tokens, for many sequences at once.

Sequences are sorted by length and padded on the right to a power of two, so that a few programs serve all of them; what
is added is told apart by segment ids, and changes no real token's score beyond rounding.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hydrax.core.typing import Array, Bool, Float, Int, PyTree
from hydrax.data.landmarks import Landmarks
from hydrax.infer.sample import known_landmarks
from hydrax.models.lm import LM

SHORTEST = 16
"""Places of the shortest rows; below, programs would cost more to compile than they save."""

CHUNK = 256
"""Places of a row whose logits exist at the same time."""

Tokens = Int[np.ndarray, "T"]
Advance = Callable[[int], None]
"""Told how many more sequences are done."""


class Score(NamedTuple):
    """Of every target of a sequence."""

    nll: Float[np.ndarray, "T"]  # -log p, nats
    right: Bool[np.ndarray, "T"]  # no other token is likelier


class Scorer:
    """Scores sequences with a model, about `tokens_at_once` places at a time.

    Landmarks are put between the tokens of a model that was trained with some, as of `infer.sample.known_landmarks`.
    """

    def __init__(self, model: LM, tokens_at_once: int = 2**14, landmarks: Landmarks | None = None):
        graph, self._params = nnx.split(model)
        self.model, self.tokens_at_once = model, tokens_at_once
        self.landmarks = known_landmarks(model, landmarks)
        self._score = jax.jit(functools.partial(_score, graph))

    def texts(self, sequences: Sequence[Tokens], advance: Advance | None = None) -> list[Score]:
        """Each sequence [T+1] read from its first token: the scores of the T tokens behind it."""
        return self([s[:-1] for s in sequences], [s[1:] for s in sequences], advance)

    def __call__(
        self, inputs: Sequence[Tokens], targets: Sequence[Tokens], advance: Advance | None = None
    ) -> list[Score]:
        """Scores of targets[i][t] after inputs[i][: t + 1], in the order given; a negative target's mean nothing."""
        if self.landmarks is not None:
            return self._between_landmarks(self.landmarks, inputs, targets, advance)
        return self._scores(inputs, targets, advance)

    def _between_landmarks(
        self, landmarks: Landmarks, inputs: Sequence[Tokens], targets: Sequence[Tokens], advance: Advance | None
    ) -> list[Score]:
        laid = [landmarks.lay(np.asarray(x)) for x in inputs]
        places = [landmarks.places(len(x)) for x in inputs]
        wanted = [landmarks._replace(token=-1).lay(np.asarray(y)) for y in targets]
        found = self._scores(laid, wanted, advance)
        return [Score(score.nll[at], score.right[at]) for score, at in zip(found, places, strict=True)]

    def _scores(self, inputs: Sequence[Tokens], targets: Sequence[Tokens], advance: Advance | None) -> list[Score]:
        scores: list[Score | None] = [None] * len(inputs)
        for rows, width, chosen in batches([len(x) for x in inputs], self.tokens_at_once):
            lengths = np.ones(rows, np.int32)  # rows without a sequence: one token, since some ops need any
            lengths[: len(chosen)] = [len(inputs[i]) for i in chosen]
            x, y = (padded([some[i] for i in chosen], rows, width) for some in (inputs, targets))
            nll, right = jax.device_get(self._score(self._params, x, y, lengths))
            for row, i in enumerate(chosen):
                scores[i] = Score(nll[row, : len(inputs[i])], right[row, : len(inputs[i])])
            if advance is not None:
                advance(len(chosen))
        return [score for score in scores if score is not None]


def bucket(length: int) -> int:
    """The power of two that rows of this length are padded to."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


def batches(lengths: Sequence[int], tokens_at_once: int) -> Iterator[tuple[int, int, list[int]]]:
    """Rows and width of one batch after the other, and its sequences by number, at most as many as rows.

    The longest come first, since what does not fit into memory should fail at the start.
    """
    by_width: dict[int, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        by_width.setdefault(bucket(lengths[i]), []).append(i)
    for width, members in by_width.items():
        rows = min(max(tokens_at_once // width, 1), 1 << (len(members) - 1).bit_length())
        for first in range(0, len(members), rows):
            yield rows, width, members[first : first + rows]


def padded(sequences: Sequence[Tokens], rows: int, width: int) -> Int[np.ndarray, "rows width"]:
    """The sequences, each in a row filled up with zeros."""
    result = np.zeros((rows, width), np.int32)
    for row, sequence in zip(result, sequences, strict=False):
        row[: len(sequence)] = sequence
    return result


def _score(
    graph: nnx.GraphDef, params: PyTree, tokens: Array, targets: Array, lengths: Array
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    model = nnx.merge(graph, params)
    prefix, T = model.cfg.prefix.meta_tokens, tokens.shape[1]
    real = jnp.arange(prefix + T) < prefix + lengths[:, None]
    x = model.hidden(jnp.pad(tokens, ((0, 0), (prefix, 0))), real.astype(jnp.int32))[:, prefix:]
    chunk = min(CHUNK, T)  # both are powers of two

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    def some(part: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = model.logits(part[0])[..., : model.vocabulary]
        target = jnp.take_along_axis(logits, jnp.maximum(part[1], 0)[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - target, target >= jnp.max(logits, axis=-1)

    nll, right = jax.lax.map(some, (split(x), split(targets)))
    return tuple(jnp.moveaxis(part, 0, 1).reshape(-1, T) for part in (nll, right))  # type: ignore[return-value]
