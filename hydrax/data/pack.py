"""Documents laid end to end and cut into rows, with random access to every row.

Documents follow one another in a fixed shuffled order. Row i holds the tokens [i·T, i·T + T] of that stream: T inputs
and, one further, T targets, so that every token is a target exactly once. A document that is cut continues in the
next row as a fresh segment from position 0: the model sees nothing of the row before.
"""

import numpy as np

from hydrax.data.source import Corpus
from hydrax.data.tokenizer import Tokenizer

Row = dict[str, np.ndarray]


class PackedRows:
    """Rows of `seq_len` predictions; len() and [i] as Grain expects them. A row costs O(T + log documents).

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

    def span(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 of the stream's places [start, stop) and, for each, the rank of its document."""
        first, last = np.searchsorted(self.starts, start, "right") - 1, np.searchsorted(self.starts, stop, "left")
        lengths = np.diff(np.clip(self.starts[first : last + 1], start, stop))
        document = np.repeat(np.arange(first, last), lengths)
        return self.tokens[np.arange(start, stop) + self.shift[document]].astype(np.int32), document

    def __getitem__(self, row: int) -> Row:
        """tokens, targets, segment_ids, positions int32 [T], weights fp32 [T], bytes fp32 scalar (counted targets)."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        start = row * self.seq_len
        stop = min(start + self.seq_len + 1, self.stream_length)
        tokens, document = self.span(start, stop)
        positions = np.arange(start, stop) - np.maximum(self.starts[document], start)
        weights = document[1:] == document[:-1]
        batch = self.empty()
        values = (tokens[:-1], tokens[1:], document[:-1] - document[0] + 1, positions[:-1], weights)
        for key, value in zip(("tokens", "targets", "segment_ids", "positions", "weights"), values, strict=True):
            batch[key][: value.size] = value
        return batch | {"bytes": np.float32(self.token_bytes[tokens[1:]] @ weights)}

    def empty(self) -> Row:
        """A row of padding, to fill up a batch."""
        row = {k: np.zeros(self.seq_len, np.int32) for k in ("segment_ids", "positions")}
        row |= {k: np.full(self.seq_len, self.pad, np.int32) for k in ("tokens", "targets")}
        return row | {"weights": np.zeros(self.seq_len, np.float32), "bytes": np.float32(0)}
