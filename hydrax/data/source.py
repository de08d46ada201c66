"""Where documents come from: the Python standard library, text files, or a folder of tokens made by `write_tokens`.

A document is a text file, or a line of a .jsonl file. Its place in [0, 1), a hash of its name, decides its split for
ever: adding or editing other documents never moves it. A lone text file becomes two documents, its head and its tail.
"""

import dataclasses
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hydrax.core.build import ConfigError
from hydrax.data.tokenizer import Tokenizer

# What is read from a folder. A file or glob that is named is read whatever its suffix.
PROSE = (".txt", ".text", ".md", ".rst", ".tex", ".jsonl")
CODE = (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".sh", ".jl")
NOT_STDLIB = ("site-packages", "dist-packages")

Found = list[tuple[str, Path]]

RECORD = np.dtype([("bytes", np.int64), ("place", np.float64), ("digest", np.uint8, 32)])
"""What is kept of a document besides its tokens: UTF-8 bytes, place in [0, 1), sha256 of its name and text."""


@dataclasses.dataclass(frozen=True)
class Document:
    file: str  # path relative to the source, with forward slashes
    line: int | None  # number in a .jsonl file, from 1
    text: bytes
    fixed_place: float | None = None  # instead of the hash of the name

    @property
    def name(self) -> bytes:
        return os.fsencode(self.file if self.line is None else f"{self.file}:{self.line}")

    @property
    def place(self) -> float:
        if self.fixed_place is not None:
            return self.fixed_place
        return int.from_bytes(hashlib.sha256(self.name).digest()[:6]) / 2**48


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenised documents, in memory or memory-mapped; document d is tokens[offsets[d] : offsets[d + 1]]."""

    tokens: np.ndarray  # uint16 or uint32, BOS and EOS of every document included
    offsets: np.ndarray  # int64 [documents + 1]
    records: np.ndarray  # RECORD [documents]
    files: int

    def sha256(self, documents: np.ndarray | slice = slice(None)) -> str:
        """Hash over the names and contents of these documents."""
        return hashlib.sha256(self.records["digest"][documents].tobytes()).hexdigest()


def open_corpus(path: str | None, tokenizer: Tokenizer, val_fraction: float = 0.0) -> Corpus:
    """The tokenised documents at `path`: the standard library if None, otherwise a file, folder, glob or token folder.

    A lone text is cut so that `val_fraction` of it, its tail, is held out.

    Raises:
      ConfigError: nothing there, not readable, without text, or written with another tokenizer.
    """
    if path is not None and os.path.exists(os.path.join(os.path.expanduser(path), "tokens.npy")):
        return _read_tokens(path, tokenizer)
    found = list(documents(path))
    if len(found) == 1 and found[0].line is None:
        found = _cut(found[0], val_fraction)
    encoded = list(_encode(found, tokenizer))
    if not encoded:
        raise ConfigError("data.path", path, "expected text, every file there is empty")
    tokens, records, files = zip(*encoded, strict=True)
    offsets = np.concatenate([[0], np.cumsum([t.size for t in tokens])])
    return Corpus(np.concatenate(tokens), offsets, np.array(list(records), RECORD), len(set(files)))


def documents(path: str | None) -> Iterator[Document]:
    """The documents at `path`, sorted by relative path; empty ones are left out."""
    for name, file in _find(path):
        # Anything but a regular file (a dangling link, a pipe) would fail or block with an obscure message.
        if not os.path.isfile(file):
            raise ConfigError("data.path", path, f"{name} is not a regular file or its link leads nowhere")
        try:
            for document in _lines(name, file, path) if file.suffix.lower() == ".jsonl" else [_whole(name, file)]:
                if document.text:
                    yield document
        except OSError as error:
            raise ConfigError("data.path", path, f"{name} cannot be read: {error.strerror}") from None


def write_tokens(folder: str | Path, documents: Iterable[Document], tokenizer: Tokenizer) -> None:
    """Writes a token folder, one document in memory at a time.

    tokens.npy uint16 or uint32 (all documents, BOS and EOS included), offsets.npy int64 [documents + 1],
    documents.npy (`RECORD` per document) and meta.json, written last: without it the folder is incomplete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)
    dtype, sizes, records, files = _dtype(tokenizer), [0], [], set()
    with open(folder / "tokens.npy", "wb") as out:
        _header(out, dtype, 0)
        for tokens, record, file in _encode(documents, tokenizer):
            out.write(tokens.tobytes())
            sizes.append(tokens.size)
            records.append(record)
            files.add(file)
        out.seek(0)
        _header(out, dtype, sum(sizes))  # numpy pads headers so that a growing length keeps their size
    np.save(folder / "offsets.npy", np.cumsum(sizes))
    np.save(folder / "documents.npy", np.array(records, RECORD))
    meta = {"tokenizer": tokenizer.name, "fingerprint": tokenizer.fingerprint, "files": len(files)}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _header(out: BinaryIO, dtype: np.dtype, length: int) -> None:
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(out, fields)


def _read_tokens(path: str, tokenizer: Tokenizer) -> Corpus:
    folder = Path(path).expanduser()
    try:
        meta = json.loads((folder / "meta.json").read_text())
        tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        offsets, records = np.load(folder / "offsets.npy"), np.load(folder / "documents.npy")
        fits = tokens.dtype == _dtype(tokenizer) and records.dtype == RECORD and offsets[-1] == tokens.size
        name, fingerprint, files = meta["tokenizer"], meta["fingerprint"], meta["files"]
    except (OSError, ValueError, EOFError, KeyError, TypeError, IndexError) as error:
        raise ConfigError("data.path", path, f"expected a folder made by write_tokens ({error})") from None
    if fingerprint != tokenizer.fingerprint:
        raise ConfigError("data.tokenizer", tokenizer.name, f"{path} was written with another tokenizer, {name!r}")
    if not fits or len(offsets) != len(records) + 1:
        raise ConfigError("data.path", path, "its arrays do not fit together, write the folder again")
    if not len(records):
        raise ConfigError("data.path", path, "expected text, it holds no documents")
    return Corpus(tokens, offsets, records, files)


def _encode(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, tuple, str]]:
    """Tokens (BOS first, EOS last), record and file of every document."""
    dtype = _dtype(tokenizer)
    for document in documents:
        tokens = np.empty((body := tokenizer.encode(document.text)).size + 2, dtype)
        tokens[0], tokens[1:-1], tokens[-1] = tokenizer.bos, body, tokenizer.eos
        digest = hashlib.sha256(document.name + b"\0" + document.text).digest()
        yield tokens, (len(document.text), document.place, np.frombuffer(digest, np.uint8)), document.file


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def _find(path: str | None) -> Found:
    """Relative name and location of every file at `path`, sorted by name."""
    if path is None:
        return _walk(path, Path(sysconfig.get_paths()["stdlib"]), (".py",), NOT_STDLIB)
    pattern = os.path.expanduser(path)
    root = Path(pattern)
    if os.path.isdir(pattern):
        return _walk(path, root, PROSE + CODE)
    if os.path.lexists(pattern):
        return [(root.name, root)]
    if not glob.has_magic(pattern):
        raise ConfigError("data.path", path, "no such file or folder")
    # Names are relative to the folder before the first wildcard, as they would be for that folder itself.
    base = next(p for p in root.parents if not glob.has_magic(str(p)))
    files = [Path(f) for f in glob.glob(pattern, recursive=True) if not os.path.isdir(f)]
    if not files:
        raise ConfigError("data.path", path, "no file matches this pattern")
    return sorted((file.relative_to(base).as_posix(), file) for file in files)


def _walk(path: str | None, root: Path, suffixes: tuple[str, ...], skip: tuple[str, ...] = ()) -> Found:
    def refuse(error: OSError) -> None:  # os.walk would leave out a folder that cannot be listed
        raise ConfigError("data.path", path, f"{error.filename} cannot be read: {error.strerror}")

    found = []
    for parent, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in ("__pycache__", *skip)]
        files = [Path(parent, name) for name in names if name.lower().endswith(suffixes)]
        found += [(file.relative_to(root).as_posix(), file) for file in files]
    if not found:
        raise ConfigError("data.path", path, f"no text files in this folder; expected any of {' '.join(suffixes)}")
    return sorted(found)


def _whole(name: str, file: Path) -> Document:
    return Document(name, None, file.read_bytes())


def _cut(document: Document, fraction: float) -> list[Document]:
    """Head and tail of a text, cut where a line begins if there is one; the tail is first in line for validation."""
    at = round(len(document.text) * (1 - fraction))
    at = document.text.rfind(b"\n", 0, at) + 1 or at
    parts = ((document.text[:at], 1.0 - 2**-48), (document.text[at:], 0.0))
    return [dataclasses.replace(document, text=text, fixed_place=place) for text, place in parts if text]


def _lines(name: str, file: Path, path: str | None) -> Iterator[Document]:
    """A document for every line {"text": …}; blank lines are skipped."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line.decode(errors="replace"))["text"]
                # A lone surrogate, legal in JSON, has no UTF-8 form.
                yield Document(name, number, text.encode(errors="replace"))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                allowed = f'line {number} of {name} is not a JSON object with a "text" field'
                raise ConfigError("data.path", path, allowed) from None
