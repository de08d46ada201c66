"""Documents laid end to end and cut into rows, with random access to every row.

Documents follow one another in a fixed shuffled order. Row i holds the tokens [i·T, i·T + T] of that stream: T inputs
and, one further, T targets, so that every token is a target exactly once. A document that is cut continues in the
next row as a fresh segment from position 0: the model sees nothing of the row before.

With a prefix of M places (`model.prefix.meta_tokens`), a document of n tokens takes M + n places of the stream, and row
i holds the tokens at the places [M + i·(T - M), M + (i + 1)·(T - M)]. Each segment, a continued one too, is M places of
the prefix and then its tokens, from position M on. Where the edge of a row falls into a prefix, the rows on both sides
of it end in padding, M places in all.

Documents may be `align`ed: each is filled with padding that belongs to it, up to a multiple of so many places. As rows
are as long as a multiple, all segments begin at one, and blocks of a row are blocks of a document. What is filled in
stands behind all tokens and is no target.

Rows may also be `joined`, as many published models were trained: each is one document to the model, whatever it holds.
"""

from collections.abc import Sequence

import numpy as np

from hydrax.data.corpus import Corpus, offsets
from hydrax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


class PackedRows:
    """Rows of `seq_len` places. The cost of a row does not depend on its number, and little on the documents'.

    Args:
      corpus: tokenised documents; a prepared one stays on disk.
      documents: int [n], the documents of this split.
      seed: decides their order.
      partial: keep the last, padded row. Training drops it, validation must not.
      prefix: places M < seq_len in front of every segment's tokens.
      align: of which the places of every document are a multiple, and `seq_len` is one; 1 with a prefix.
      joined: a row is one segment, in which a target may be of the next document; without a prefix only.
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
        prefix: int = 0,
        align: int = 1,
        joined: bool = False,
    ):
        order = np.random.default_rng(seed).permutation(documents)
        lengths = prefix + np.diff(corpus.offsets)[order]
        self.tokens, self.pad, self.token_bytes = corpus.tokens, tokenizer.pad, tokenizer.token_bytes
        self.seq_len, self.prefix, self.joined = seq_len, prefix, joined
        taken = -(-lengths // align) * align
        self.starts = np.concatenate([[0], np.cumsum(taken)])  # of each document in the stream; its length last
        self.ends = self.starts[:-1] + lengths  # of what is not filled in
        # From a place in the stream to one in the corpus.
        self.shift = corpus.offsets[order] - prefix - self.starts[:-1]
        self.stride = seq_len - prefix  # places of the stream from row to row
        predictions = max(0, self.stream_length - 1 - prefix)
        self.length = -(-predictions // self.stride) if partial else predictions // self.stride

    @property
    def stream_length(self) -> int:
        """Tokens of the split, BOS, EOS, every document's prefix and what is filled in included."""
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

        Returns tokens (the prefix: pad), targets, segment_ids (from 1; 0 is padding), positions int32 [B,T], weights
        fp32 [B,T] (1 where the target is a token of its input's segment and the input not in a prefix) and bytes fp32
        [B] that the counted targets stand for.
        """
        first = self.prefix + rows[..., None] * self.stride
        last = np.minimum(first + self.stride, self.stream_length - 1)  # place of the last target
        head = self._head(self._document(first), first)
        places = head - self.prefix + np.arange(self.seq_len + 1)
        document = self._document(places)
        segment = np.zeros_like(document) if self.joined else document
        head = self._head(segment, first)
        position = places - head + self.prefix
        at = np.clip(places, head, self.ends[document] - 1) + self.shift[document]
        filled = places >= self.ends[document]
        tokens = np.where(filled | (position < self.prefix), self.pad, self.tokens[at]).astype(np.int32)
        # An input whose target is not this row's is padding, and so is a prefix without such tokens.
        real = (places[..., 1:] <= last) & (head[..., :-1] < last)
        weights = real & ~filled[..., 1:] & (segment[..., 1:] == segment[..., :-1])
        weights &= position[..., :-1] >= self.prefix
        return {
            "tokens": np.where(real, tokens[..., :-1], self.pad),
            "targets": np.where(real, tokens[..., 1:], self.pad),
            "segment_ids": np.where(real, segment[..., :-1] - segment[..., :1] + 1, 0).astype(np.int32),
            "positions": np.where(real, position[..., :-1], 0).astype(np.int32),
            "weights": weights.astype(np.float32),
            "bytes": (self.token_bytes[tokens[..., 1:]] * weights).sum(-1).astype(np.float32),
        }

    def _document(self, places: np.ndarray) -> np.ndarray:
        """Number in the stream of the document at each place; past the end: the last."""
        return np.searchsorted(self.starts[:-1], places, "right") - 1

    def _head(self, segment: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Place of the first token of each segment in a row from `first`."""
        return np.maximum(self.starts[segment] + self.prefix, first)


class Rows:
    """Rows of several sources under one numbering, those of the second behind those of the first.

    Args:
      sources: of one `seq_len`, at least one.
    """

    def __init__(self, sources: Sequence[PackedRows]):
        self.sources, self.seq_len = sources, sources[0].seq_len
        self.first = offsets([len(source) for source in sources])  # row of each source; their number last

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, row: int) -> Batch:
        """One row: the arrays of `batch` without their first axis."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        return {key: x[0] for key, x in self.batch(np.array([row])).items()}

    def batch(self, rows: np.ndarray) -> Batch:
        """`PackedRows.batch` of rows [B] by number; a number past the end gives a row of padding."""
        of = np.minimum(np.searchsorted(self.first, rows, "right"), len(self.sources)) - 1
        batch: Batch = {}
        for source in np.unique(of):
            members = of == source
            for key, x in self.sources[source].batch(rows[members] - self.first[source]).items():
                batch.setdefault(key, np.empty((len(rows), *x.shape[1:]), x.dtype))[members] = x
        return batch
