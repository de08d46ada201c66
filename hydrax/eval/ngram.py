"""The baseline a trained byte model has to beat: an interpolated trigram of bytes.

Witten-Bell interpolation, from the uniform distribution up through contexts of none, one and two tokens:
p(y | c) = (count(c, y) + kinds(c) · p(y | shorter c)) / (count(c) + kinds(c)), where kinds(c) is the number of
different tokens seen after c (Witten & Bell 1991, doi:10.1109/18.87000).
"""

from collections.abc import Iterable

import numpy as np

from hydrax.data.loader import Data
from hydrax.data.pack import Batch, Rows
from hydrax.data.tokenizer import ByteTokenizer
from hydrax.train.source import Source

MAX_TOKENS = 2**26  # counted at most, spread evenly over the split; a byte trigram has long converged by then
CHUNK = 2**20  # tokens counted at a time


class Trigram:
    """Trigram model of the counted targets of `rows`; contexts stay inside a segment of a row."""

    def __init__(self, rows: Rows, tokenizer: ByteTokenizer):
        self.vocab, self.absent = tokenizer.vocab_size, tokenizer.pad
        V, total = self.vocab, min(len(rows), -(-MAX_TOKENS // rows.seq_len))
        chosen = np.arange(total) * len(rows) // total
        counts = np.zeros(V**3, np.int32)
        for numbers in np.array_split(chosen, -(-total * rows.seq_len // CHUNK)):
            first, second, target = self._trigrams(rows.batch(numbers))
            counts += np.bincount((first * V + second) * V + target, minlength=V**3).astype(np.int32)
        self.counts = counts.reshape(V, V, V)
        self.seen, self.kinds = self.counts.sum(-1), np.count_nonzero(self.counts, axis=-1)
        pairs = self.counts.sum(0)
        singles = pairs.sum(0)
        unigram = _interpolate(singles, int(singles.sum()), int(np.count_nonzero(singles)), 1 / V)
        self.bigram = _interpolate(pairs, pairs.sum(-1)[:, None], np.count_nonzero(pairs, axis=-1)[:, None], unigram)

    def bits(self, batch: Batch) -> float:
        """-log2 p of all counted targets of a batch, summed."""
        first, second, target = self._trigrams(batch)
        context, lower = (first, second), self.bigram[second, target]
        p = _interpolate(self.counts[first, second, target], self.seen[context], self.kinds[context], lower)
        return float(-np.log2(p).sum())

    def _trigrams(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The two tokens before every counted target (the first may be absent), and the target."""
        before = np.where(batch["positions"] > 0, np.roll(batch["tokens"], 1, axis=-1), self.absent)
        counted = batch["weights"] > 0
        return before[counted].astype(np.int64), batch["tokens"][counted], batch["targets"][counted]


def bits_per_byte(data: Source, batches: Iterable[Batch]) -> float | None:
    """Bits per byte of `batches` under a trigram of the training split; None unless all tokens are bytes."""
    if not isinstance(data, Data) or not isinstance(data.tokenizer, ByteTokenizer) or data.landmark_every:
        return None
    model, bits, size = Trigram(data.train.rows, data.tokenizer), 0.0, 0.0
    for batch in batches:
        bits += model.bits(batch)
        size += float(batch["bytes"].sum(dtype=np.float64))
    return bits / size


def _interpolate(
    count: np.ndarray, seen: np.ndarray | int, kinds: np.ndarray | int, lower: np.ndarray | float
) -> np.ndarray:
    """Witten-Bell; an unseen context leaves the shorter one's probability."""
    return np.where(np.greater(seen, 0), (count + kinds * lower) / np.maximum(seen + kinds, 1), lower)
