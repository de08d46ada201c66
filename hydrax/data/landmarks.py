"""Landmarks in packed rows: a token of its own behind every so many tokens of a document (arXiv 2305.16300).

Tokens keep their targets, which a landmark does not come between; a landmark has none. Behind token p of a document
there is one where p + 1 is a multiple of `every`, so that landmarks stand at the positions every, 2·every + 1, ...
"""

from typing import NamedTuple

import numpy as np

from hydrax.data.pack import Batch
from hydrax.data.tokenizer import Tokenizer


class Landmarks(NamedTuple):
    """Where landmarks stand in a document, and what they are."""

    every: int  # tokens per landmark
    token: int  # id

    def due(self, position: np.ndarray) -> np.ndarray:
        """Whether a landmark is what comes at that position."""
        return position % (self.every + 1) == self.every

    def places(self, count: int) -> np.ndarray:
        """int64 [count], the positions of the first tokens of a document."""
        return np.arange(count) + np.arange(count) // self.every

    def lay(self, tokens: np.ndarray) -> np.ndarray:
        """Starts of documents [...,T], T > 0, with the landmarks between their tokens, of which none is the last."""
        place = self.places(tokens.shape[-1])
        row = np.full((*tokens.shape[:-1], place[-1] + 1), self.token, tokens.dtype)
        row[..., place] = tokens
        return row


def landmarks_of(every: int, tokenizer: Tokenizer) -> Landmarks | None:
    """Those of `data.landmark_every`, behind the ids of the tokenizer; None for 0."""
    return Landmarks(every, tokenizer.vocab_size) if every else None


def tokens_per_row(length: int, every: int) -> int:
    """How many tokens a row of `length` places holds beside their landmarks, whatever its documents."""
    return length - length // (every + 1)


def with_landmarks(batch: Batch, every: int, *, landmark: int, pad: int, length: int) -> Batch:
    """The rows of a `PackedRows.batch` with landmarks, padded to `length`; one that would be its last + 1 is left out.

    Args:
      every: tokens per landmark.
      landmark, pad: token ids.
    """
    real, position = batch["segment_ids"] != 0, batch["positions"]
    marked = real & (position % every == every - 1)
    place = np.arange(real.shape[1]) + np.cumsum(marked, axis=1) - marked  # of every token in the longer row
    own = np.nonzero(real)
    behind = np.nonzero(marked & (place + 1 < length))
    to, at = (own[0], place[own]), (behind[0], place[behind] + 1)

    def laid(name: str, of_landmarks: np.ndarray | int, empty: int = 0, x: np.ndarray | None = None) -> np.ndarray:
        x = batch[name] if x is None else x
        row = np.full((len(x), length), empty, x.dtype)
        row[to], row[at] = x[own], of_landmarks
        return row

    moved = position + position // every
    return {
        **batch,
        "tokens": laid("tokens", landmark, pad),
        "targets": laid("targets", pad, pad),
        "segment_ids": laid("segment_ids", batch["segment_ids"][behind]),
        "positions": laid("positions", moved[behind] + 1, x=moved),
        "weights": laid("weights", 0),
    }
