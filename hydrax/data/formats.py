"""What files hold: a text is one document, JSON Lines have one per line, Parquet one per row; compressed or not.

Reading never stops at a record that cannot be used: it is returned as a `Bad`, and what follows it is still read, as
far as the file's compression lets it. Large files are read in parts, between places that `cuts` finds.
"""

import dataclasses
import functools
import gzip
import hashlib
import importlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from hydrax.core.build import ConfigError

JSON_LINES, PARQUET = ".jsonl", ".parquet"
COMPRESSED = (".gz", ".zst")
TEXTUAL = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")  # types of Arrow
ZST_BUFFER = 1 << 16  # bytes, of which the last are lost where a file breaks off
ROWS = 256  # of Parquet in memory at a time


@dataclasses.dataclass(frozen=True)
class Document:
    """The text of a file or record, in UTF-8 if `check_utf8` finds so, and where it is from."""

    file: str  # path relative to the source, with forward slashes
    record: int | None  # line of JSON Lines or row of Parquet, from 1; None: the whole file
    text: bytes
    fixed_place: float | None = None  # instead of the hash of the name

    @property
    def name(self) -> bytes:
        """The file, and the number of the record."""
        return os.fsencode(self.file if self.record is None else f"{self.file}:{self.record}")

    @property
    def place(self) -> float:
        """A number in [0, 1), by the name unless it is fixed: those below `val_fraction` are validation."""
        if self.fixed_place is not None:
            return self.fixed_place
        return int.from_bytes(hashlib.sha256(self.name).digest()[:6]) / 2**48


@dataclasses.dataclass(frozen=True)
class Bad:
    """A record that cannot be used."""

    file: str
    record: int | None  # the first, where it is several
    reason: str  # what follows "line 3 of a.jsonl"

    def __str__(self) -> str:
        unit = "row" if form(self.file) == PARQUET else "line"
        return f"{self.file if self.record is None else f'{unit} {self.record} of {self.file}'} {self.reason}"


@dataclasses.dataclass(frozen=True)
class Part:
    """A file between two cuts: bytes of JSON Lines, row groups of Parquet; otherwise all of it."""

    file: str
    path: str
    start: int = 0
    stop: int | None = None  # None: the end
    first: int = 1  # number of its first record


Records = Iterator[Document | Bad]


def form(file: str) -> str:
    """Suffix of what the file is when decompressed, in lower case."""
    name = file.lower()
    return Path(name.removesuffix(compression(file))).suffix


def compression(file: str) -> str:
    return next((end for end in COMPRESSED if file.lower().endswith(end)), "")


def read(part: Part, field: str = "text") -> Records:
    """The documents of a part, and its bad records, in order.

    Raises:
      OSError: the file cannot be read.
      ConfigError: its format needs the extra `data`.
    """
    yield from _READERS.get(form(part.file), _text)(part, field)


def cuts(path: str, file: str, size: int, blocks: Iterable[bytes]) -> Iterator[tuple[int, int]]:
    """Where a file may be cut into parts, of about `size` bytes if possible: (start, number of the first record).

    `blocks` are the contents of the file, of which JSON Lines are cut.
    """
    yield 0, 1
    if form(file) == JSON_LINES and not compression(file):
        yield from _line_cuts(blocks, size)
    elif form(file) == PARQUET:
        yield from _row_group_cuts(path)


def _text(part: Part, field: str) -> Records:
    try:
        with _open(part) as file:
            text = file.read()
    except _BROKEN as error:
        if (why := _why_broken(error)) is None:
            raise
        yield Bad(part.file, None, why)
        return
    yield Document(part.file, None, text)


def _json_lines(part: Part, field: str) -> Records:
    """A document for every line {"text": …}; blank lines are skipped."""
    number, at = part.first - 1, part.start
    try:
        with _open(part) as file:
            if part.start:
                file.seek(part.start)
            for number, line in enumerate(file, part.first):
                if at == part.stop:
                    return
                at += len(line)
                if line.strip():
                    yield _json(part.file, number, line, field)
    except _BROKEN as error:
        if (why := _why_broken(error)) is None:
            raise
        yield Bad(part.file, number + 1, f"and all that follows cannot be read: {why}")


def _json(file: str, number: int, line: bytes, field: str) -> Document | Bad:
    expected = f'is not a JSON object with a "{field}" field'
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Bad(file, number, _not_utf8(error))
    except (ValueError, RecursionError) as error:
        return Bad(file, number, f"{expected} ({getattr(error, 'msg', error)})")
    if not isinstance(record, dict) or field not in record:
        return Bad(file, number, expected)
    if not isinstance(record[field], str):
        return Bad(file, number, f"{expected} that is text")
    # A lone surrogate, legal in JSON, has no UTF-8 form.
    return Document(file, number, record[field].encode(errors="replace"))


def _parquet(part: Part, field: str) -> Records:
    arrow, parquet = _pyarrow(), _pyarrow(".parquet")
    number = part.first
    try:
        with parquet.ParquetFile(part.path) as file:
            stop = file.num_row_groups if part.stop is None else part.stop
            schema = file.schema_arrow
            if field not in schema.names or _kind(schema.field(field).type) not in TEXTUAL:
                columns = ", ".join(f"{column.name} ({column.type})" for column in schema)
                yield Bad(part.file, None, f'has no column "{field}" of text; there are {columns}')
                return
            for group in range(part.start, stop):
                number, next_group = part.first, part.first + file.metadata.row_group(group).num_rows
                part = dataclasses.replace(part, first=next_group)
                try:
                    for batch in file.iter_batches(ROWS, row_groups=[group], columns=[field]):
                        # As bytes: a row that is not UTF-8 would otherwise take its neighbours with it.
                        for text in batch.column(0).cast(arrow.large_string(), safe=False).cast(arrow.large_binary()):
                            yield _row(part.file, number, text.as_py())
                            number += 1
                except (arrow.ArrowException, OSError) as error:
                    if (why := _why_broken(error)) is None:
                        raise
                    yield Bad(part.file, number, f"to {next_group - 1} cannot be read: {why}")
    except (arrow.ArrowException, OSError) as error:
        if (why := _why_broken(error)) is None:
            raise
        yield Bad(part.file, None, why)


def _kind(column: Any) -> str:
    """Name of an Arrow type; of its values, where these are encoded by a dictionary."""
    return str(getattr(column, "value_type", column) if str(column).startswith("dictionary") else column)


def _row(file: str, number: int, text: bytes | None) -> Document | Bad:
    return Bad(file, number, "is null") if text is None else Document(file, number, text)


_READERS: dict[str, Callable[[Part, str], Records]] = {JSON_LINES: _json_lines, PARQUET: _parquet}


def check_utf8(document: Document) -> Document | Bad:
    """The document, or what is wrong with its bytes."""
    try:
        document.text.decode()
    except UnicodeDecodeError as error:
        return Bad(document.file, document.record, _not_utf8(error))
    return document


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start})"


def _line_cuts(blocks: Iterable[bytes], size: int) -> Iterator[tuple[int, int]]:
    """Starts of lines, `size` bytes apart or a little more."""
    at, number, wanted = 0, 1, size
    for block in blocks:
        begin = 0
        while (end := block.find(b"\n", max(begin, wanted - 1 - at))) >= 0:
            number += block.count(b"\n", begin, end + 1)
            begin = end + 1
            wanted = at + begin + size
            yield at + begin, number
        number += block.count(b"\n", begin)
        at += len(block)


def _row_group_cuts(path: str) -> Iterator[tuple[int, int]]:
    arrow, parquet = _pyarrow(), _pyarrow(".parquet")
    first = 1
    try:
        metadata = parquet.read_metadata(path)
    except (arrow.ArrowException, OSError):
        return  # reading says what is wrong
    for group in range(1, metadata.num_row_groups):
        first += metadata.row_group(group - 1).num_rows
        yield group, first


def _open(part: Part) -> IO[bytes]:
    return _OPEN[compression(part.file)](part.path)


def _open_zst(path: str) -> Any:
    return io.BufferedReader(_pyarrow().input_stream(path, compression="zstd"), ZST_BUFFER)


_OPEN: dict[str, Callable[[str], Any]] = {
    "": functools.partial(open, mode="rb"),
    ".gz": functools.partial(gzip.open, mode="rb"),
    ".zst": _open_zst,
}
_BROKEN = (EOFError, zlib.error, OSError)


def _why_broken(error: Exception) -> str | None:
    """What is wrong with the contents of a file; None where the machine failed to read it."""
    return None if isinstance(error, OSError) and error.errno is not None else " ".join(str(error).split())


def _pyarrow(module: str = "") -> Any:
    try:
        return importlib.import_module(f"pyarrow{module}")
    except ImportError:
        raise ConfigError("data.path", "pyarrow", "Parquet and .zst files need: pip install hydrax[data]") from None
