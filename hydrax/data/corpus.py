"""Tokenised documents, and what is kept of each besides its tokens."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hydrax.data.formats import Document
from hydrax.data.tokenizer import Tokenizer

RECORD = np.dtype([("tokens", np.int64), ("bytes", np.int64), ("place", np.float64), ("digest", np.uint8, 32)])
"""Of a document: its tokens, BOS and EOS included; UTF-8 bytes; place in [0, 1); sha256 of its name and text."""


class Tokens(Protocol):
    """The tokens of all documents, end to end: an array, or files that are read where it is indexed."""

    def __getitem__(self, at: Any, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenised documents; document d is tokens[offsets[d] : offsets[d + 1]]."""

    tokens: Tokens  # uint16 or uint32, BOS and EOS of every document included
    offsets: np.ndarray  # int64 [documents + 1]
    records: np.ndarray  # RECORD [documents]


def sha256(records: Iterable[np.ndarray]) -> str:
    """Hash over the names and contents of all documents, from their `RECORD`s."""
    digest = hashlib.sha256()
    for some in records:
        digest.update(some["digest"].tobytes())
    return digest.hexdigest()


def offsets(sizes: npt.ArrayLike) -> np.ndarray:
    """Where things of these sizes begin, end to end, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def encode(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, tuple]]:
    """Tokens (BOS first, EOS last) and `RECORD` of every document."""
    dtype = token_dtype(tokenizer)
    for document in documents:
        tokens = np.empty((body := tokenizer.encode(document.text)).size + 2, dtype)
        tokens[0], tokens[1:-1], tokens[-1] = tokenizer.bos, body, tokenizer.eos
        digest = hashlib.sha256(document.name + b"\0" + document.text).digest()
        yield tokens, (tokens.size, len(document.text), document.place, np.frombuffer(digest, np.uint8))


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
