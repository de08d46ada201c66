"""Documents laid end to end and cut into rows, with random access to every row.

Documents follow one another in a fixed shuffled order. Row i holds the tokens [i·T, i·T + T] of that stream: T inputs
and, one further, T targets, so that every token is a target exactly once. A document that is cut continues in the
next row as a fresh segment from position 0: the model sees nothing of the row before.
"""

import numpy as np

from hydrax.data.source import Corpus
from hydrax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


class PackedRows:
    """Rows of `seq_len` predictions. The cost of a row does not depend on its number, and little on the documents'.

    Args:
      corpus: tokenised documents; a memory-mapped one stays on disk.
      documents: int [n], the documents of this split.
      seed: decides their order.
      partial: keep the last, padded row. Training drops it, validation must not.
    """

    def __init__(
        self,
        corpus: Corpus,
        documents: np.ndarray,
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        seed: int,
        partial: bool,
    ):
        order = np.random.default_rng(seed).permutation(documents)
        lengths = np.diff(corpus.offsets)[order]
        self.tokens, self.pad, self.token_bytes = corpus.tokens, tokenizer.pad, tokenizer.token_bytes
        self.seq_len = seq_len
        self.starts = np.concatenate([[0], np.cumsum(lengths)])  # of each document in the stream; its length last
        self.shift = corpus.offsets[order] - self.starts[:-1]  # from a place in the stream to one in the corpus
        predictions = max(0, self.stream_length - 1)
        self.length = -(-predictions // seq_len) if partial else predictions // seq_len

    @property
    def stream_length(self) -> int:
        """Tokens of the split, BOS and EOS included."""
        return int(self.starts[-1])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, row: int) -> Batch:
        """One row: the arrays of `batch` without their first axis."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.batch(np.asarray(row))

    def batch(self, rows: np.ndarray) -> Batch:
        """Rows by number, int [B]; a number past the end gives a row of padding.

        Returns tokens, targets, segment_ids (from 1; 0 is padding), positions int32 [B,T], weights fp32 [B,T]
        (1 where the target is in its input's document) and bytes fp32 [B] that the counted targets stand for.
        """
        start = rows[..., None] * self.seq_len
        places = start + np.arange(self.seq_len + 1)
        real = places < self.stream_length
        places = np.minimum(places, self.stream_length - 1)
        document = np.searchsorted(self.starts, places, "right") - 1
        tokens = np.where(real, self.tokens[places + self.shift[document]], self.pad).astype(np.int32)
        position = places - np.maximum(self.starts[document], start)
        real = real[..., 1:]  # an input without a target is padding too
        weights = real & (document[..., 1:] == document[..., :-1])
        return {
            "tokens": np.where(real, tokens[..., :-1], self.pad),
            "targets": tokens[..., 1:],
            "segment_ids": np.where(real, document[..., :-1] - document[..., :1] + 1, 0).astype(np.int32),
            "positions": np.where(real, position[..., :-1], 0).astype(np.int32),
            "weights": weights.astype(np.float32),
            "bytes": (self.token_bytes[tokens[..., 1:]] * weights).sum(-1).astype(np.float32),
        }
