"""Local text as evaluation reads it: documents of a run's splits or of any other place, cut into sequences."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np

from hydrax.core.build import ConfigError, build
from hydrax.data.corpus import Corpus
from hydrax.data.loader import DataConfig, SourceConfig
from hydrax.data.source import open_corpus
from hydrax.data.tokenizer import Tokenizer
from hydrax.eval.scoring import Tokens


@dataclasses.dataclass(frozen=True)
class Texts:
    """Tokenised documents, BOS and EOS included; prepared ones stay on disk."""

    parts: list[tuple[Corpus, np.ndarray]]  # and which of its documents are meant, int [n]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every document."""
        return np.concatenate([np.diff(corpus.offsets)[members] for corpus, members in self.parts])

    def cut(self, length: int, count: int, shortest: int = 2) -> list[Tokens]:
        """At most `count` sequences of `length` + 1 tokens or, at the end of a document, less.

        They are spread evenly over the documents of at least `shortest` tokens. Each begins with the last token of the
        one before it in the document, so that if all are taken, every token but the first is a target once.
        """
        starts = np.concatenate([corpus.offsets[:-1][members] for corpus, members in self.parts])
        lengths, of = self.lengths, np.repeat(np.arange(len(self.parts)), [len(m) for _, m in self.parts])
        per = np.where(lengths >= shortest, -(-(lengths - 1) // length), 0)
        last = np.cumsum(per)
        total = int(last[-1]) if len(last) else 0
        found = []
        for n in np.arange(min(count, total)) * total // max(min(count, total), 1):
            d = int(np.searchsorted(last, n, "right"))
            at = (n - (last[d] - per[d])) * length
            end = min(at + length + 1, lengths[d])
            tokens = self.parts[of[d]][0].tokens[starts[d] + at : starts[d] + end]
            found.append(np.asarray(tokens, np.int32))
        return found

    def __iter__(self) -> Iterator[Tokens]:
        """Document by document."""
        for corpus, members in self.parts:
            for d in members:
                yield np.asarray(corpus.tokens[corpus.offsets[d] : corpus.offsets[d + 1]], np.int64)


def open_texts(
    cfg: DataConfig, tokenizer: Tokenizer, split: Literal["train", "val"] = "val", path: str | None = None
) -> Texts:
    """The documents of a split of a run's data or, if there is a `path`, all that are there.

    Raises:
      ConfigError: nothing to read there.
    """
    if path is not None:
        try:
            corpus = open_corpus(path, tokenizer)
        except ConfigError as error:
            raise ConfigError(error.key.replace("data.path", "data"), error.value, error.allowed) from None
        return Texts([(corpus, np.arange(len(corpus.records)))])
    sources = [build(SourceConfig, values) for _, values in sorted(cfg.sources.items())] or [SourceConfig(cfg.path)]
    corpora = [open_corpus(source.path, tokenizer, cfg.val_fraction) for source in sources]
    held_out = [corpus.records["place"] < cfg.val_fraction for corpus in corpora]
    return Texts(
        [(corpus, np.flatnonzero(h if split == "val" else ~h)) for corpus, h in zip(corpora, held_out, strict=True)]
    )
