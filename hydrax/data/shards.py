"""A prepared folder: the tokens of a corpus in ArrayRecord files, which are read where they are asked for.

manifest.json                       sources, tokenizer, counts, the size and sha256 of every file; written last
documents.npy                       `RECORD` of every document, in order
tokens-00000-of-00007.array_record  a record per document: its tokens, uint16 or uint32, little-endian
bad_records.jsonl                   what was left out, where and why

A document of more than `PIECE` tokens takes several records, so that reading a row does not read a whole book.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hydrax.core.build import ConfigError
from hydrax.data.corpus import RECORD, Corpus, offsets, token_dtype
from hydrax.data.tokenizer import Tokenizer

MANIFEST, DOCUMENTS, BAD_RECORDS, UNFINISHED = "manifest.json", "documents.npy", "bad_records.jsonl", ".unfinished"
FORMAT = 1
PIECE = 1 << 14  # tokens
OPTIONS = "group_size:1,zstd:1"  # one record at a time can be read; higher levels of zstd hardly save space


def is_prepared(path: str | Path) -> bool:
    """Whether `launch.prepare` began or finished that folder."""
    folder = Path(path).expanduser()
    return (folder / DOCUMENTS).exists() or (folder / UNFINISHED).exists()


def write_shard(path: Path, documents: Iterable[tuple[np.ndarray, tuple]]) -> np.ndarray:
    """Writes the tokens of documents, as `corpus.encode` gives them; returns `RECORD` [documents].

    Raises:
      RuntimeError: the file cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    writer, records = ArrayRecordWriter(str(path), OPTIONS), []
    try:
        for tokens, record in documents:
            for start in range(0, tokens.size, PIECE):
                writer.write(tokens[start : start + PIECE].tobytes())
            records.append(record)
    finally:
        writer.close()
    return np.array(records, RECORD)


def pieces(sizes: np.ndarray) -> np.ndarray:
    """Records that documents of these sizes take."""
    return -(-sizes // PIECE)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_prepared(path: str, tokenizer: Tokenizer) -> Corpus:
    """The corpus of a prepared folder; its tokens stay on disk.

    Raises:
      ConfigError: the folder is not complete, damaged, empty, or of another tokenizer.
    """
    folder = Path(path).expanduser()
    manifest = _manifest(path, folder)
    if manifest["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        name = manifest["tokenizer"]["name"]
        raise ConfigError("data.tokenizer", tokenizer.name, f"{path} was prepared with another tokenizer, {name!r}")
    records = np.load(folder / DOCUMENTS)
    if not len(records):
        raise ConfigError("data.path", path, "expected text, it holds no documents")
    return Corpus(
        ShardTokens(path, manifest, records["tokens"], token_dtype(tokenizer)), offsets(records["tokens"]), records
    )


def _manifest(path: str, folder: Path) -> dict[str, Any]:
    """The manifest, after a look at the files it names."""
    if not (folder / MANIFEST).exists():
        allowed = "its preparation is not finished; expected the command that began it to be run again"
        raise ConfigError("data.path", path, allowed)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ConfigError("data.path", path, f"its format is {manifest['format']}, expected {FORMAT}")
        for shard in manifest["shards"]:
            if (size := os.stat(folder / shard["file"]).st_size) != shard["size"]:
                raise ValueError(f"{shard['file']} has {size} bytes instead of {shard['size']}")
        if sha256(folder / DOCUMENTS) != manifest["documents_sha256"]:
            raise ValueError(f"{DOCUMENTS} has other contents than were written")
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from None
    return dict(manifest)


def _damaged(path: str, what: str) -> ConfigError:
    return ConfigError("data.path", path, f"a prepared folder that is damaged: {what}; copy or prepare it again")


def _allow_open_files() -> None:
    """As many as the system grants: each shard that was read stays open, and the usual limit is 1024 in all."""
    import resource  # not on Windows, where there is no array_record either

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class ShardTokens:
    """The tokens of a prepared folder, as one array that only integer arrays index.

    Args:
      path: the folder.
      manifest: its manifest.
      sizes: int64 [documents], tokens of each.
      dtype: of the tokens.
    """

    def __init__(self, path: str, manifest: dict[str, Any], sizes: np.ndarray, dtype: np.dtype):
        import grain  # takes seconds to import

        folder = Path(path).expanduser()
        self.path, self.dtype = path, dtype.newbyteorder("<")
        self.shards = [shard for shard in manifest["shards"] if shard["records"]]
        self.first_records = offsets(np.array([shard["records"] for shard in self.shards]))
        taken = pieces(sizes)
        place = np.arange(taken.sum()) - np.repeat(offsets(taken)[:-1], taken)  # of a record in its document
        self.starts = np.append(np.repeat(offsets(sizes)[:-1], taken) + PIECE * place, sizes.sum())
        _allow_open_files()
        # Told how many records there are, grain opens no file before it is needed.
        files = [f"{folder / shard['file']}[0:{shard['records']}]" for shard in self.shards]
        self.source = grain.sources.ArrayRecordDataSource(files)

    def __getitem__(self, at: np.ndarray) -> np.ndarray:
        """The tokens at these places, in the shape of `at`."""
        record = np.searchsorted(self.starts, at.ravel(), "right") - 1
        # Tokens of a record stand side by side: few numbers are left when each stretch is one.
        heads = np.flatnonzero(np.diff(record, prepend=-1))
        wanted, which = np.unique(record[heads], return_inverse=True)
        found = self._read(wanted)
        begins = offsets([tokens.size for tokens in found])[which] - self.starts[record[heads]]
        places = at.ravel() + np.repeat(begins, np.diff(heads, append=record.size))
        return np.concatenate(found)[places].reshape(at.shape)

    def _read(self, wanted: np.ndarray) -> list[np.ndarray]:
        """Records by number."""
        try:
            found = [np.frombuffer(record, self.dtype) for record in self.source.__getitems__(wanted.tolist())]
            if [tokens.size for tokens in found] == (self.starts[wanted + 1] - self.starts[wanted]).tolist():
                return found
            reason = "records of other sizes than were written"
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error)
        raise _damaged(self.path, self._culprit(wanted) or reason)

    def _culprit(self, wanted: np.ndarray) -> str | None:
        """Which of the files with these records is not as it was written."""
        for i in np.unique(np.searchsorted(self.first_records, wanted, "right") - 1):
            shard = self.shards[i]
            try:
                if sha256(Path(self.path).expanduser() / shard["file"]) != shard["sha256"]:
                    return f"{shard['file']} has other contents than were written"
            except OSError as error:
                return f"{shard['file']} cannot be read: {error.strerror}"
        return None
