"""A small corpus of every format, with records that cannot be used."""

import gzip
import json
import pathlib
import random

import numpy as np

from hydrax.data import shards

BAD = [
    ("broken.jsonl", 2, 'is not a JSON object with a "text" field (Expecting'),
    ("broken.jsonl", 3, 'is not a JSON object with a "text" field'),
    ("broken.jsonl", 4, 'is not a JSON object with a "text" field that is text'),
    ("broken.jsonl", 5, "is not UTF-8 (byte 0xe9 at 13)"),
    ("cut.jsonl.gz", None, "and all that follows cannot be read: Compressed file ended before"),
    ("latin.txt", None, "is not UTF-8 (byte 0xe9 at 3)"),
    ("no.txt.gz", None, "Not a gzipped file"),
]
"""File, record (None: whichever) and how the reason begins, of what `write_corpus` spoils."""


def words(count: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(10**6)}" for _ in range(count))


def write_corpus(folder: pathlib.Path, documents: int = 60) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": f"é{words(40, i)}", "id": i}) for i in range(documents)]
    (folder / "a.jsonl").write_text("\n".join([*lines, "", '{"text": ""}', json.dumps({"text": words(30_000, 0)})]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[: documents // 2]).encode(), mtime=0))
    good, *spoilt = ['{"text": "good"}', "{text: 1}", '{"body": "x"}', '{"text": 3}', '{"text": "caf\xe9"}']
    (folder / "broken.jsonl").write_bytes("\n".join([good, *spoilt, good]).encode("latin-1"))
    whole = gzip.compress("\n".join(lines).encode(), mtime=0)
    (folder / "cut.jsonl.gz").write_bytes(whole[: len(whole) * 3 // 4])
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "no.txt.gz").write_bytes(b"plain text")
    (folder / "one.txt.gz").write_bytes(gzip.compress(b"a text that was compressed", mtime=0))
    (folder / "part").mkdir(exist_ok=True)
    for i in range(documents // 3):
        (folder / "part" / f"{i}.txt").write_text(words(50, 100 + i))
    return folder


def texts(folder: pathlib.Path) -> list[bytes]:
    """All documents of a prepared folder of bytes, read without hydrax's reader."""
    from array_record.python.array_record_module import ArrayRecordReader

    manifest = json.loads((folder / shards.MANIFEST).read_text())
    readers = [ArrayRecordReader(str(folder / shard["file"])) for shard in manifest["shards"]]
    tokens = b"".join(reader.read(i)[0] for reader in readers for i in ([n] for n in range(reader.num_records())))
    flat = np.frombuffer(tokens, np.uint16)
    starts, ends = np.flatnonzero(flat == 256), np.flatnonzero(flat == 257)
    assert len(starts) == len(ends) == manifest["documents"] and len(flat) == manifest["tokens"]
    return [flat[a + 1 : b].astype(np.uint8).tobytes() for a, b in zip(starts, ends, strict=True)]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
