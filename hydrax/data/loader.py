"""`open_data`: documents at a path become training and validation batches.

A batch is a dict of [B,T] arrays tokens, targets, segment_ids (0 = padding), positions (int32) and weights (fp32, 1
where a target counts), with bytes fp32 [B]: the UTF-8 bytes the counted targets stand for. With a schedule of modes
(`data.modes`) there are modes int32 [B,T] too. Training batches whose rows are one document each (`data.documents`
False) come without segment_ids and positions.

Of several sources (`data.sources`), each gives whole rows, of T tokens, in proportion to its weight: row n of training
is one of a fixed source for each n, so that every stretch of the run keeps the weights, and a small source repeats.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from hydrax.core.build import Check, ConfigError, Fraction, NonNegative, Positive, PositiveFloat, build
from hydrax.data.corpus import Corpus, sha256
from hydrax.data.landmarks import tokens_per_row, with_landmarks
from hydrax.data.modes import ModesConfig, modes
from hydrax.data.pack import Batch, PackedRows, Rows
from hydrax.data.source import open_corpus
from hydrax.data.tokenizer import Tokenizer, open_tokenizer


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One of `data.sources`."""

    path: str | None = None  # as data.path
    weight: PositiveFloat = 1.0  # tokens of training, relative to the other sources


Threads = Annotated[int, Check("an integer from 1 to 256", lambda x: 1 <= x <= 256)]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    path: str | None = None  # file, folder, glob or prepared folder; None: the source of Python's standard library
    tokenizer: str = "byte"  # "byte" or the path of a tokenizer.json (needs the extra `hf`)
    sources: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # name -> path and weight; in place of path
    seq_len: Positive = 512  # predictions per row (and, with a model of meta tokens, places of these), T
    val_fraction: Fraction = 0.05  # share of the documents held out, chosen by a hash of their names
    seed: NonNegative = 0  # order in which documents are laid end to end
    documents: bool = True  # the model is told where documents begin; False: to it a row is one document
    doc_align: Positive = 1  # places of a document are a multiple, by padding; for kernels of key blocks
    landmark_every: NonNegative = 0  # tokens of a document per landmark, an id behind all others; 0: no landmarks
    threads: Threads = 4  # that prepare training batches; batches do not depend on it
    modes: ModesConfig = dataclasses.field(default_factory=ModesConfig)  # of layers that read tokens in two modes
    task: str | None = None  # a synthetic task, in place of text: its rows have seq_len tokens, seed is of validation
    task_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the task

    def __post_init__(self) -> None:
        if self.task is not None:
            for name in ("path", "sources"):
                if value := getattr(self, name):
                    raise ConfigError(name, value, f"expected none with data.task = {self.task}")
        elif self.task_options:
            raise ConfigError("task_options", dict(self.task_options), "expected none without data.task")
        if self.doc_align > 1:
            self._check_align()
        if self.sources and self.path is not None:
            raise ConfigError("path", self.path, "expected None with data.sources")
        for name, values in self.sources.items():
            build(SourceConfig, values, f"sources.{name}")

    def _check_align(self) -> None:
        others = {"documents": True, "landmark_every": 0, "task": None}
        for name, value in others.items():
            if getattr(self, name) != value:
                raise ConfigError("doc_align", self.doc_align, f"expected 1 with data.{name} = {getattr(self, name)}")
        if self.seq_len % self.doc_align:
            raise ConfigError("doc_align", self.doc_align, f"expected a divisor of data.seq_len = {self.seq_len}")


FACTS = ("segment_ids", "positions")
"""What a batch says of the documents in its rows."""


@dataclasses.dataclass(frozen=True)
class Split:
    """The rows of training or of validation, and the text that they are made of."""

    rows: Rows
    documents: int
    bytes: int  # of text, before tokenisation
    sha256: str  # over the documents' names and contents


@dataclasses.dataclass(frozen=True)
class Data:
    """Text in rows of tokens: what a run reads."""

    tokenizer: Tokenizer
    train: Split
    val: Split
    weights: tuple[float, ...]  # of the sources
    sha256: str  # over all documents' names and contents
    threads: int
    modes: ModesConfig
    documents: bool = True  # of the config
    seq_len: int = 0  # places of a row with landmarks
    landmark_every: int = 0

    slices = ()
    """Parts of the validation data with names."""

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size + (self.landmark_every > 0)

    def train_batches(
        self, batch_size: int, seed: int, start_step: int = 0, part: slice = slice(None)
    ) -> Iterator[Batch]:
        """Endless batches, each epoch's rows in a new order; batch n is a function of (seed, n) and found in O(1).

        With `part`, only these rows of every batch: what one of several processes makes.
        """
        import grain  # takes seconds to import

        def batch(n: int, rows: np.ndarray) -> Batch:
            numbers = n * batch_size + np.arange(batch_size)
            whole = self._batch(self.train, rows[part], numbers[part], seed)
            # Full rows of one document need neither: without them every op takes its fastest form.
            return whole if self.documents else {k: x for k, x in whole.items() if k not in FACTS}

        ranges = itertools.starmap(grain.MapDataset.range, itertools.pairwise(self.train.rows.first))
        numbers = grain.MapDataset.mix([rows.seed(seed).shuffle().repeat() for rows in ranges], self.weights)
        # There is no remainder to drop, but with one to keep grain rounds the length of endless data beyond 64 bits.
        batches = numbers.batch(batch_size, drop_remainder=True).map_with_index(batch).slice(slice(start_step, None))
        return iter(batches.to_iter_dataset(grain.ReadOptions(self.threads, prefetch_buffer_size=2 * self.threads)))

    def val_batches(self, batch_size: int, rows: int | None = None, part: slice = slice(None)) -> Iterator[Batch]:
        """Once over `rows` validation rows (None: all), the last batch filled up with rows of padding.

        Each source gives its share by weight, or all it has, spread evenly over its rows. With `part`, only these rows
        of every batch.
        """
        edges = np.cumsum([0.0, *self.weights]) / sum(self.weights)
        shares = np.full(len(edges) - 1, len(self.val.rows)) if rows is None else np.diff(np.round(edges * rows))
        chosen = np.concatenate(
            [
                first + np.arange(count := int(min(share, size))) * size // max(count, 1)
                for first, size, share in zip(self.val.rows.first, np.diff(self.val.rows.first), shares, strict=False)
            ]
        )
        chosen = np.pad(chosen, (0, -len(chosen) % batch_size), constant_values=len(self.val.rows))
        for numbers in chosen.reshape(-1, batch_size)[:, part]:
            yield self._batch(self.val, numbers, numbers, seed=0)

    def _batch(self, split: Split, rows: np.ndarray, numbers: np.ndarray, seed: int) -> Batch:
        """Rows of a split; their modes depend on (seed, numbers)."""
        batch = split.rows.batch(rows)
        if self.landmark_every:
            ids = {"landmark": self.tokenizer.vocab_size, "pad": self.tokenizer.pad}
            batch = with_landmarks(batch, self.landmark_every, **ids, length=self.seq_len)
        chosen = modes(self.modes, batch, numbers, seed=seed)
        return batch if chosen is None else {**batch, "modes": chosen}


def open_data(cfg: DataConfig, prefix: int = 0) -> Data:
    """Reads, tokenises and splits the documents of `cfg`, each behind `prefix` places of the model's meta tokens.

    Raises:
      ConfigError: nothing to read, a split without documents, rows that the prefix fills, a prefix of documents that
        are aligned, not told apart or with landmarks, or fewer training tokens than one row.
    """
    if prefix >= cfg.seq_len:
        raise ConfigError("model.prefix.meta_tokens", prefix, f"expected less than data.seq_len = {cfg.seq_len}")
    if prefix and cfg.doc_align > 1:
        raise ConfigError("data.doc_align", cfg.doc_align, f"expected 1 with model.prefix.meta_tokens = {prefix}")
    if prefix and not cfg.documents:
        raise ConfigError("data.documents", False, f"expected True with model.prefix.meta_tokens = {prefix}")
    if prefix and cfg.landmark_every:
        raise ConfigError(
            "data.landmark_every", cfg.landmark_every, f"expected 0 with model.prefix.meta_tokens = {prefix}"
        )
    tokenizer = open_tokenizer(cfg.tokenizer)
    sources = {f"data.sources.{name}": build(SourceConfig, values) for name, values in sorted(cfg.sources.items())}
    sources = sources or {"data": SourceConfig(cfg.path)}
    opened = [_open(key, source, cfg, tokenizer) for key, source in sources.items()]
    train = _split(cfg, [(corpus, ~held_out) for corpus, held_out in opened], tokenizer, prefix, partial=False)
    val = _split(cfg, opened, tokenizer, prefix, partial=True)
    for key, rows in zip(sources, train.rows.sources, strict=True):
        if len(rows) == 0:
            tokens = rows.stream_length
            allowed = f"expected at most {tokens - 1}, the training split has only {tokens} tokens"
            raise ConfigError("data.seq_len", cfg.seq_len, f"{allowed}{_named(key)}")
    weights = tuple(source.weight for source in sources.values())
    names = sha256(corpus.records for corpus, _ in opened)
    landmarks = {"seq_len": cfg.seq_len, "landmark_every": cfg.landmark_every}
    return Data(tokenizer, train, val, weights, names, cfg.threads, cfg.modes, cfg.documents, **landmarks)


def _open(key: str, source: SourceConfig, cfg: DataConfig, tokenizer: Tokenizer) -> tuple[Corpus, np.ndarray]:
    """The documents of the source that has that key, and which of them are held out."""
    try:
        corpus = open_corpus(source.path, tokenizer, cfg.val_fraction)
        return corpus, _held_out(corpus, cfg.val_fraction)
    except ConfigError as error:
        if error.key == "data.path":
            raise ConfigError(f"{key}.path", error.value, error.allowed) from None
        raise ConfigError(error.key, error.value, f"{error.allowed}{_named(key)}") from None


def _named(key: str) -> str:
    """What says in a message which of several sources it is about."""
    return "" if key == "data" else f" ({key})"


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
    cfg: DataConfig,
    corpora: Sequence[tuple[Corpus, np.ndarray]],
    tokenizer: Tokenizer,
    prefix: int,
    *,
    partial: bool,
) -> Split:
    """The documents of corpora that belong to a split."""
    documents = [np.flatnonzero(members) for _, members in corpora]
    records = [corpus.records[chosen] for (corpus, _), chosen in zip(corpora, documents, strict=True)]
    rows = Rows(
        [
            PackedRows(
                corpus,
                chosen,
                tokenizer,
                tokens_per_row(cfg.seq_len, cfg.landmark_every) if cfg.landmark_every else cfg.seq_len,
                seed=cfg.seed,
                partial=partial,
                prefix=prefix,
                align=cfg.doc_align,
                joined=not cfg.documents,
            )
            for (corpus, _), chosen in zip(corpora, documents, strict=True)
        ]
    )
    counted = sum(len(some) for some in records), sum(int(some["bytes"].sum()) for some in records)
    return Split(rows, *counted, sha256(records))
