"""Where documents come from: the Python standard library, files of text, or a folder made by `launch.prepare`.

A document is a text file, a line of JSON Lines or a row of Parquet. Its place in [0, 1), a hash of its name, decides
its split for ever: adding or editing other documents never moves it. A lone text file becomes two documents, its head
and its tail.
"""

import dataclasses
import glob
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hydrax.core.build import ConfigError
from hydrax.data import shards
from hydrax.data.corpus import RECORD, Corpus, encode, offsets
from hydrax.data.formats import COMPRESSED, JSON_LINES, PARQUET, Bad, Document, Part, form, read
from hydrax.data.tokenizer import Tokenizer

# What is read from a folder, compressed or not. A file or glob that is named is read whatever its suffix.
PROSE = (".txt", ".text", ".md", ".rst", ".tex", JSON_LINES, PARQUET)
CODE = (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".sh", ".jl")
NOT_STDLIB = ("site-packages", "dist-packages")
EXPECTED = "expected files of text"

Found = list[tuple[str, Path]]


def open_corpus(path: str | None, tokenizer: Tokenizer, val_fraction: float = 0.0) -> Corpus:
    """The tokenised documents at `path`: the standard library if None, otherwise a file, folder, glob or prepared
    folder. Only the last stays on disk.

    A lone text is cut so that `val_fraction` of it, its tail, is held out.

    Raises:
      ConfigError: nothing there, not readable, without text, or prepared with another tokenizer.
    """
    if path is not None and shards.is_prepared(path):
        return shards.open_prepared(path, tokenizer)
    found = list(documents(path))
    if len(found) == 1 and found[0].record is None:
        found = cut(found[0], val_fraction)
    encoded = list(encode(found, tokenizer))
    if not encoded:
        raise ConfigError("data.path", path, "expected text, every file there is empty")
    tokens, records = zip(*encoded, strict=True)
    return Corpus(np.concatenate(tokens), offsets([t.size for t in tokens]), np.array(list(records), RECORD))


def documents(path: str | None) -> Iterator[Document]:
    """The documents at `path`, sorted by relative path; empty ones are left out."""
    for name, file in find(path):
        try:
            for item in read(Part(name, str(file))):
                if isinstance(item, Bad):
                    raise ConfigError("data.path", path, str(item))
                if item.text:
                    yield item
        except OSError as error:
            raise ConfigError(
                "data.path", path, f"{name} cannot be read: {error.strerror}; expected files of text"
            ) from None


def find(path: str | None) -> Found:
    """Relative name and location of every file at `path`, sorted by name."""
    found = _find(path)
    for name, file in found:
        # Anything but a regular file (a dangling link, a pipe) would fail or block with an obscure message.
        if not os.path.isfile(file):
            raise ConfigError(
                "data.path", path, f"{name} is not a regular file or its link leads nowhere; expected files of text"
            )
    return found


def _find(path: str | None) -> Found:
    if path is None:
        return _walk(path, Path(sysconfig.get_paths()["stdlib"]), (".py",), NOT_STDLIB)
    pattern = os.path.expanduser(path)
    root = Path(pattern)
    if os.path.isdir(pattern):
        return _walk(path, root, PROSE + CODE)
    if os.path.lexists(pattern):
        return [(root.name, root)]
    if not glob.has_magic(pattern):
        raise ConfigError("data.path", path, "no such file or folder; expected text, or a prepared folder")
    # Names are relative to the folder before the first wildcard, as they would be for that folder itself.
    base = next(p for p in root.parents if not glob.has_magic(str(p)))
    files = [Path(f) for f in glob.glob(pattern, recursive=True) if not os.path.isdir(f)]
    if not files:
        raise ConfigError("data.path", path, f"no file matches this pattern; {EXPECTED}")
    return sorted((file.relative_to(base).as_posix(), file) for file in files)


def _walk(path: str | None, root: Path, suffixes: tuple[str, ...], skip: tuple[str, ...] = ()) -> Found:
    def refuse(error: OSError) -> None:  # os.walk would leave out a folder that cannot be listed
        raise ConfigError(
            "data.path", path, f"{error.filename} cannot be read: {error.strerror}; expected files of text"
        )

    found = []
    for parent, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in ("__pycache__", *skip)]
        files = [Path(parent, name) for name in names if form(name) in suffixes]
        found += [(file.relative_to(root).as_posix(), file) for file in files]
    if not found:
        allowed = f"no text files in this folder; expected any of {' '.join(suffixes)}, or these {' '.join(COMPRESSED)}"
        raise ConfigError("data.path", path, allowed)
    return sorted(found)


def cut(document: Document, fraction: float) -> list[Document]:
    """Head and tail of a text, cut where a line begins if there is one; the tail is first in line for validation."""
    at = round(len(document.text) * (1 - fraction))
    at = document.text.rfind(b"\n", 0, at) + 1 or at
    parts = ((document.text[:at], 1.0 - 2**-48), (document.text[at:], 0.0))
    return [dataclasses.replace(document, text=text, fixed_place=place) for text, place in parts if text]
