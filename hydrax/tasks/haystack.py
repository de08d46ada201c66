"""Haystacks: runs of sentences into which other sentences are put."""

import ast
import functools
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hydrax.core.build import ConfigError
from hydrax.tasks import words

NOISE = (
    b"The rain came down on the small town all night.",
    b"A train left for the coast before the sun was up.",
    b"Nobody on the square looked at the clock.",
    b"The river ran high and the lamps burned low.",
)

# Modules of the standard library with much prose in their docstrings, in files that every installation has.
MODULES = words.table(
    "_pydecimal argparse collections configparser contextlib difflib doctest functools heapq inspect logging optparse "
    "pickletools random shutil statistics tarfile textwrap threading typing"
)


class Haystack:
    """Sentences as one text, each ended by a space, repeated so that a run of `reach` bytes starts at any of them."""

    def __init__(self, sentences: Sequence[bytes], reach: int):
        self.sentences = len(sentences)
        text = b"".join(sentence + b" " for sentence in sentences)
        times = 1 + -(-reach // len(text))
        self.text = text * times
        self.offsets = np.cumsum([0] + [len(sentence) + 1 for sentence in sentences] * times)

    def around(
        self, rng: np.random.Generator, needles: Sequence[bytes], depths: np.ndarray, room: int
    ) -> tuple[bytes, np.ndarray]:
        """As many sentences from a random one on as fit into `room` bytes with the needles, and the needles.

        Needle i goes before the sentence that is nearest to the fraction depths[i] of the haystack; needles at one
        place keep their order. Returns the text, without a space at its end, and the depths as they came out.
        """
        left = room + 1 - sum(len(needle) + 1 for needle in needles)
        start = int(rng.integers(self.sentences))
        count = int(np.searchsorted(self.offsets, self.offsets[start] + max(left, 0), side="right")) - 1 - start
        places = np.rint(depths * count).astype(int)
        pieces, at = [], 0
        for i in np.argsort(places, kind="stable"):
            pieces += [self._run(start + at, start + places[i]), needles[i], b" "]
            at = places[i]
        pieces.append(self._run(start + at, start + count))
        return b"".join(pieces)[:-1], places / max(count, 1)

    def _run(self, first: int, stop: int) -> bytes:
        return self.text[self.offsets[first] : self.offsets[stop]]


@functools.cache
def noise(reach: int) -> Haystack:
    """One short paragraph, over and over."""
    return Haystack(NOISE, reach)


@functools.cache
def essay(paths: tuple[str, ...], reach: int) -> Haystack:
    """The sentences of text files, or of the standard library's documentation where there are none.

    The latter differs a little between versions of Python; files make a task the same everywhere.

    Raises:
      ConfigError: a file cannot be read, or no sentence is in any of them.
    """
    return Haystack(_essay_sentences(paths), reach)


@functools.cache
def _essay_sentences(paths: tuple[str, ...]) -> tuple[bytes, ...]:
    texts = [_read(path) for path in paths] if paths else _docstrings()
    found = tuple(sentence for text in texts for sentence in sentences(text))
    if not found:
        raise ConfigError("essay", paths, "expected files with sentences of 20 to 200 bytes")
    return found


def sentences(text: str) -> list[bytes]:
    """Sentences of 20 to 200 bytes in ASCII, which begin with a capital, end with a full stop and have no other."""
    parts = re.split(r"(?<=[.!?])\s+|\n\s*\n", text)
    parts = [" ".join(part.split()) for part in parts]
    return [part.encode() for part in parts if re.fullmatch(r"[A-Z][ -\-/-<?-~]{18,198}\.", part)]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("essay", path, f"expected a file of UTF-8 text ({error})") from None


def _docstrings() -> list[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = []
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        if spec and spec.origin and Path(spec.origin).suffix == ".py":
            tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
            nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
            texts += [ast.get_docstring(node) or "" for node in nodes]
    return texts
