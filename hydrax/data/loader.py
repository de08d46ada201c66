"""`open_data`: documents at a path become training and validation batches.

A batch is a dict of [B,T] arrays tokens, targets, segment_ids (0 = padding), positions (int32) and weights (fp32, 1
where a target counts), with bytes fp32 [B]: the UTF-8 bytes the counted targets stand for. With a schedule of modes
(`data.modes`) there are modes int32 [B,T] too. Training batches whose rows are one document each (`data.documents`
False) come without segment_ids and positions.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from hydrax.core.build import ConfigError, Fraction, NonNegative, Positive
from hydrax.data.modes import ModesConfig, modes
from hydrax.data.pack import Batch, PackedRows
from hydrax.data.source import Corpus, open_corpus
from hydrax.data.tokenizer import Tokenizer, open_tokenizer


@dataclasses.dataclass(frozen=True)
class DataConfig:
    path: str | None = None  # file, folder, glob or token folder; None: the source of Python's standard library
    tokenizer: str = "byte"  # "byte" or the path of a tokenizer.json (needs the extra `hf`)
    seq_len: Positive = 512  # predictions per row (and, with a model of meta tokens, places of these), T
    val_fraction: Fraction = 0.05  # share of the documents held out, chosen by a hash of their names
    seed: NonNegative = 0  # order in which documents are laid end to end
    documents: bool = True  # the model is told where documents begin; False: to it a row is one document
    threads: Positive = 4  # that prepare training batches; batches do not depend on it
    modes: ModesConfig = dataclasses.field(default_factory=ModesConfig)  # of layers that read tokens in two modes


FACTS = ("segment_ids", "positions")
"""What a batch says of the documents in its rows."""


@dataclasses.dataclass(frozen=True)
class Split:
    rows: PackedRows
    documents: int
    bytes: int  # of text, before tokenisation
    sha256: str  # over the documents' names and contents


@dataclasses.dataclass(frozen=True)
class Data:
    tokenizer: Tokenizer
    train: Split
    val: Split
    files: int
    sha256: str  # over all documents' names and contents
    threads: int
    modes: ModesConfig
    documents: bool = True  # of the config

    def train_batches(
        self, batch_size: int, seed: int, start_step: int = 0, part: np.ndarray | None = None
    ) -> Iterator[Batch]:
        """Endless batches, each epoch's rows in a new order; batch n is a function of (seed, n) and found in O(1).

        `part`, int [n], are the rows of each batch to load (None: all), those of one of several processes.
        """
        import grain  # takes seconds to import

        def batch(n: int, rows: np.ndarray) -> Batch:
            chosen = np.arange(batch_size) if part is None else part
            whole = self._batch(self.train, rows[chosen], n * batch_size + chosen, seed)
            # Full rows of one document need neither: without them every op takes its fastest form.
            return whole if self.documents else {k: x for k, x in whole.items() if k not in FACTS}

        numbers = grain.MapDataset.range(len(self.train.rows)).seed(seed).shuffle().repeat()
        # There is no remainder to drop, but with one to keep grain rounds the length of endless data beyond 64 bits.
        batches = numbers.batch(batch_size, drop_remainder=True).map_with_index(batch).slice(slice(start_step, None))
        return iter(batches.to_iter_dataset(grain.ReadOptions(self.threads, prefetch_buffer_size=2 * self.threads)))

    def val_batches(self, batch_size: int, rows: int | None = None, part: np.ndarray | None = None) -> Iterator[Batch]:
        """Once over `rows` validation rows spread evenly over the split (None: all), the last batch filled up with
        rows of padding; of each batch the rows in `part` (None: all)."""
        source = self.val.rows
        count = len(source) if rows is None else min(rows, len(source))
        chosen = np.arange(count) * len(source) // max(count, 1)
        chosen = np.pad(chosen, (0, -count % batch_size), constant_values=len(source))
        for whole in chosen.reshape(-1, batch_size):
            numbers = whole if part is None else whole[part]
            yield self._batch(self.val, numbers, numbers, seed=0)

    def _batch(self, split: Split, rows: np.ndarray, numbers: np.ndarray, seed: int) -> Batch:
        """Rows of a split; their modes depend on (seed, numbers)."""
        batch = split.rows.batch(rows)
        chosen = modes(self.modes, batch, numbers, seed=seed)
        return batch if chosen is None else {**batch, "modes": chosen}


def open_data(cfg: DataConfig, prefix: int = 0) -> Data:
    """Reads, tokenises and splits the documents at `cfg.path`, each behind `prefix` places of the model's meta tokens.

    Raises:
      ConfigError: nothing to read, a split without documents, rows that the prefix fills, a prefix of documents that
        are not told apart, or fewer training tokens than one row.
    """
    if prefix >= cfg.seq_len:
        raise ConfigError("model.prefix.meta_tokens", prefix, f"expected less than data.seq_len = {cfg.seq_len}")
    if prefix and not cfg.documents:
        raise ConfigError("data.documents", False, f"expected True with model.prefix.meta_tokens = {prefix}")
    tokenizer = open_tokenizer(cfg.tokenizer)
    corpus = open_corpus(cfg.path, tokenizer, cfg.val_fraction)
    held_out = _held_out(corpus, cfg.val_fraction)
    train = _split(cfg, corpus, tokenizer, ~held_out, prefix, partial=False)
    val = _split(cfg, corpus, tokenizer, held_out, prefix, partial=True)
    if len(train.rows) == 0:
        tokens = train.rows.stream_length
        allowed = f"expected at most {tokens - 1}, the training split has only {tokens} tokens"
        raise ConfigError("data.seq_len", cfg.seq_len, allowed)
    return Data(tokenizer, train, val, corpus.files, corpus.sha256(), cfg.threads, cfg.modes, cfg.documents)


def _held_out(corpus: Corpus, fraction: float) -> np.ndarray:
    """bool [documents]: whether each belongs to validation."""
    places = corpus.records["place"]
    held_out = places < fraction
    if held_out.any() and not held_out.all():
        return held_out
    empty = "training" if held_out.all() else "validation"
    remedy = "expected at least two documents (lines of the .jsonl file)"
    if places.size > 1:
        # Four digits, rounded inwards: whoever types the number must not land outside again.
        low, high = np.ceil(places.min() * 1e4 + 1) / 1e4, np.floor(places.max() * 1e4) / 1e4
        remedy = f"expected {f'at most {high:.4f}' if held_out.all() else f'at least {low:.4f}'}, or more documents"
    why = f"a hash of their names leaves none of the {places.size} documents for {empty}"
    raise ConfigError("data.val_fraction", fraction, f"{remedy}; {why}")


def _split(
    cfg: DataConfig, corpus: Corpus, tokenizer: Tokenizer, members: np.ndarray, prefix: int, *, partial: bool
) -> Split:
    documents = np.flatnonzero(members)
    rows = PackedRows(
        corpus,
        documents,
        tokenizer,
        cfg.seq_len,
        seed=cfg.seed,
        partial=partial,
        prefix=prefix,
        joined=not cfg.documents,
    )
    return Split(rows, documents.size, int(corpus.records["bytes"][documents].sum()), corpus.sha256(documents))
