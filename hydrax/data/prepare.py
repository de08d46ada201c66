"""A corpus becomes a prepared folder (`hydrax.data.shards`), by several processes, killed and continued at will.

First every source is read once, for its sha256 and the places where it may be cut. From these alone, never from the
number of processes, follow the shards. Each shard is made in a folder of its own below `.unfinished`, which gets its
final name when it is complete: what has that name is kept, everything else is made again.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hydrax.core.build import ConfigError, differences
from hydrax.data import formats, shards
from hydrax.data.corpus import encode, sha256
from hydrax.data.formats import Bad, Document, Part
from hydrax.data.scan import Show, Source, scan, shard_size
from hydrax.data.source import cut, find
from hydrax.data.tokenizer import Tokenizer, open_tokenizer
from hydrax.data.workers import Map, workers

TOKENS, COUNTS, SCAN, PLAN = "tokens.array_record", "counts.json", "scan.jsonl", "plan.json"
NAMES = {"data.path": "source", "data.tokenizer": "tokenizer"}
"""Config keys that errors name, and the arguments they are here."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A shard to make."""

    work: Path
    number: int
    size: int  # bytes of sources, roughly
    parts: list[Part]
    tokenizer: tuple[str, str]  # name and fingerprint
    field: str
    tail: float | None  # share of a lone text that is held out

    @property
    def folder(self) -> Path:
        return self.work / f"{self.number:05d}"


def prepare(
    source: str,
    out: str,
    *,
    tokenizer: str = "byte",
    field: str = "text",
    val_fraction: float = 0.05,
    processes: int = 1,
    show: Show = lambda what, done, total: None,
) -> dict[str, Any]:
    """Writes the folder `out`, or continues to; returns its manifest.

    Args:
      source: file, folder or glob of texts, JSON Lines and Parquet, compressed or not.
      out: the folder; one that is complete is left as it is.
      tokenizer: "byte" or the path of a tokenizer.json.
      field: with the text, of JSON Lines and Parquet.
      val_fraction: of a lone text file, the tail that is held out.
      processes: the result does not depend on it.

    Raises:
      ConfigError: no sources, sources without a document, a folder of something else, or one that cannot be written.
    """
    settings = {"field": field, "val_fraction": val_fraction}
    try:
        return _prepare(source, out, open_tokenizer(tokenizer), settings, processes, show)
    except ConfigError as error:
        raise ConfigError(NAMES.get(error.key, error.key), error.value, error.allowed) from None
    except OSError as error:
        allowed = f"{error.filename or 'a file'}: {error.strerror or error}; expected a folder that can be written"
        raise ConfigError("out", out, allowed) from None


def _prepare(
    source: str, out: str, tokenizer: Tokenizer, settings: dict[str, Any], processes: int, show: Show
) -> dict[str, Any]:
    folder = Path(out).expanduser()
    work = folder / shards.UNFINISHED
    files = {name: str(path.absolute()) for name, path in find(source)}
    _check_place(source, out, folder, files)
    settings = {"tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint}, **settings}
    with _only_one(out, work), workers(processes) as run:
        if (folder / shards.MANIFEST).exists():
            shutil.rmtree(work)
            return _complete(out, folder, settings, files)
        sources = scan(work / SCAN, files, run, show)
        plan = {**settings, "sources": {s.file: {"size": s.size, "sha256": s.sha256} for s in sources}}
        _check_plan(out, work / PLAN, plan)
        jobs = _jobs(work, sources, plan)
        _make_all(jobs, run, show)
        if changed := next((s.file for s in sources if not s.unchanged), None):
            raise ConfigError("source", source, f"{changed} changed while it was read; expected files at rest")
        manifest = _finish(folder, jobs, plan)
        shutil.rmtree(work)
    return manifest


def _check_place(source: str, out: str, folder: Path, files: dict[str, str]) -> None:
    """Refuses folders of something else, and those whose files would be sources of the next call."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError("out", out, "expected a folder")
    if folder.exists() and not shards.is_prepared(folder) and (foreign := sorted(os.listdir(folder))):
        raise ConfigError("out", out, f"the folder holds {foreign[0]!r}; expected a new folder")
    root, place = Path(source).expanduser(), f"{folder.absolute()}{os.sep}"
    inside = root.is_dir() and folder.resolve().is_relative_to(root.resolve())
    if inside or any(path.startswith(place) for path in files.values()):
        raise ConfigError("out", out, f"expected a folder outside of the source {source}")


@contextlib.contextmanager
def _only_one(out: str, work: Path) -> Iterator[None]:
    """Keeps other processes away from the folder; the lock of a process that dies is released."""
    import fcntl  # not on Windows, where there is no array_record either

    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError("out", out, "another process is writing this folder") from None
        for left in work.glob("*.tmp"):  # by processes that died
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


def _complete(out: str, folder: Path, settings: dict[str, Any], files: dict[str, str]) -> dict[str, Any]:
    """The manifest of a complete folder, if it was made of these sources; they are known by name and size."""
    manifest = json.loads((folder / shards.MANIFEST).read_text(encoding="utf-8"))
    old = {**{key: manifest[key] for key in settings}, "sources": {s["file"]: s["size"] for s in manifest["sources"]}}
    new = {**settings, "sources": {name: os.stat(path).st_size for name, path in files.items()}}
    _check_same(out, "complete", old, new)
    return dict(manifest)


def _check_plan(out: str, path: Path, plan: dict[str, Any]) -> None:
    if not path.exists():
        _write(path, json.dumps(plan))
    _check_same(out, "begun", json.loads(path.read_text(encoding="utf-8")), plan)


def _check_same(out: str, state: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    if changed := differences(old, new):
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        allowed = f"the folder is {state} with other sources or settings, {'; '.join(changed[:3])}{more}"
        raise ConfigError("out", out, f"{allowed}; expected those, or another folder")


def _jobs(work: Path, sources: list[Source], plan: dict[str, Any]) -> list[Job]:
    """The shards: parts of the sources in their order, as many as make up the size of a shard."""
    lone = [s for s in sources if s.size]
    is_text = len(lone) == 1 and formats.form(lone[0].file) not in (formats.JSON_LINES, formats.PARQUET)
    name, fingerprint = plan["tokenizer"].values()
    wanted = shard_size(sum(s.size for s in sources))
    jobs: list[Job] = []

    def add(parts: list[Part], size: int) -> None:
        tail = plan["val_fraction"] if is_text else None
        jobs.append(Job(work, len(jobs), size, parts, (name, fingerprint), plan["field"], tail))

    parts: list[Part] = []
    size = 0
    for source in sources:
        # Cuts of JSON Lines are bytes; the row groups of Parquet are taken to be of one size.
        for (start, first), (stop, _) in zip(source.cuts, [*source.cuts[1:], (None, 0)], strict=True):
            parts.append(Part(source.file, source.path, start, stop, first))
            size += source.size // len(source.cuts)
            if size >= wanted:
                add(parts, size)
                parts, size = [], 0
    if parts:
        add(parts, size)
    return jobs


def _make_all(jobs: list[Job], run: Map, show: Show) -> None:
    missing = [job for job in jobs if not job.folder.exists()]
    total = sum(job.size for job in jobs)
    done = total - sum(job.size for job in missing)
    show("encoding", done, total)
    for job, _ in zip(missing, run(_make, missing, 1), strict=True):
        show("encoding", done := done + job.size, total)


@functools.lru_cache(1)
def _tokenizer(name: str, fingerprint: str) -> Tokenizer:
    tokenizer = open_tokenizer(name)
    if tokenizer.fingerprint != fingerprint:
        raise ConfigError("tokenizer", name, "it changed meanwhile; expected a file at rest")
    return tokenizer


def _make(job: Job) -> None:
    """Makes a shard, in a folder that gets its name when it is complete."""
    making = job.folder.with_suffix(f".{os.getpid()}.tmp")
    making.mkdir()
    empty = bad = 0

    def usable(log: Any) -> Iterator[Document]:
        nonlocal empty, bad
        for part in job.parts:
            for item in formats.read(part, job.field):
                if isinstance(item, Document) and not item.text:
                    empty += 1
                    continue
                item = formats.check_utf8(item) if isinstance(item, Document) else item
                if isinstance(item, Bad):
                    bad += 1
                    print(json.dumps(dataclasses.asdict(item)), file=log)
                else:
                    yield from [item] if job.tail is None else cut(item, job.tail)

    path = making / TOKENS
    with open(making / shards.BAD_RECORDS, "w", encoding="utf-8") as log:
        try:
            records = shards.write_shard(path, encode(usable(log), _tokenizer(*job.tokenizer)))
        except RuntimeError as error:
            raise ConfigError("out", str(job.work.parent), f"cannot be written: {error}") from None
    np.save(making / shards.DOCUMENTS, records)
    counts = {
        "records": int(shards.pieces(records["tokens"]).sum()),
        "size": path.stat().st_size,
        "sha256": shards.sha256(path),
        "empty": empty,
        "bad": bad,
    }
    (making / COUNTS).write_text(json.dumps(counts), encoding="utf-8")
    for file in making.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    making.rename(job.folder)


def _finish(folder: Path, jobs: list[Job], plan: dict[str, Any]) -> dict[str, Any]:
    """Puts the shards and what they count together; every step may be the second attempt at it."""
    found = [json.loads((job.folder / COUNTS).read_text(encoding="utf-8")) for job in jobs]
    records = np.concatenate([np.load(job.folder / shards.DOCUMENTS) for job in jobs])
    bad = "".join((job.folder / shards.BAD_RECORDS).read_text(encoding="utf-8") for job in jobs)
    if not len(records):
        why = (
            f"; the first of {len(bad.splitlines())} bad records: {Bad(**json.loads(bad.splitlines()[0]))}"
            if bad
            else ""
        )
        shutil.rmtree(folder / shards.UNFINISHED)
        raise ConfigError("source", ", ".join(list(plan["sources"])[:3]), f"expected text, there is no document{why}")
    names = [f"tokens-{job.number:05d}-of-{len(jobs):05d}.array_record" for job in jobs]
    for job, name in zip(jobs, names, strict=True):
        if (job.folder / TOKENS).exists():
            (job.folder / TOKENS).replace(folder / name)
    with _replacing(folder / shards.DOCUMENTS) as path, open(path, "wb") as file:
        np.save(file, records)
    _write(folder / shards.BAD_RECORDS, bad)
    manifest = {
        "format": shards.FORMAT,
        "tokenizer": plan["tokenizer"],
        "field": plan["field"],
        "val_fraction": plan["val_fraction"],
        "documents": len(records),
        "tokens": int(records["tokens"].sum()),
        "bytes": int(records["bytes"].sum()),
        "empty": sum(counts["empty"] for counts in found),
        "bad": sum(counts["bad"] for counts in found),
        "sha256": sha256([records]),
        "documents_sha256": shards.sha256(folder / shards.DOCUMENTS),
        "shards": [
            {"file": name} | {key: counts[key] for key in ("records", "size", "sha256")}
            for name, counts in zip(names, found, strict=True)
        ],
        "sources": [{"file": file, **facts} for file, facts in plan["sources"].items()],
    }
    _write(folder / shards.MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when that is done."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    temporary.replace(path)


def _write(path: Path, text: str) -> None:
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
