"""The sources of a prepared folder, each read once for its sha256 and the places where it may be cut."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from hydrax.data import formats
from hydrax.data.workers import Map

SHARD = 1 << 21  # bytes of sources that make a shard, at least
MOST_SHARDS = 256  # more of a large corpus than of a small one go into a shard: every shard read is an open file

Show = Callable[[str, int, int], None]
"""Called with what is being done, the bytes of sources done, and all of them."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A file, as it was when it was read first."""

    file: str
    path: str
    size: int
    modified: int  # nanoseconds
    sha256: str
    cuts: list[list[int]]  # start and number of the first record of every part
    part: int  # bytes wanted of a part

    @property
    def unchanged(self) -> bool:
        stat = os.stat(self.path)
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.modified)


def scan(log_path: Path, files: Mapping[str, str], run: Map, show: Show) -> list[Source]:
    """Reads every file (name -> path) that was not read before, in this call or an earlier one with the same log."""
    total = sum(os.stat(path).st_size for path in files.values())
    part = shard_size(total)
    known = {
        source.file: source
        for source in _logged(log_path)
        if files.get(source.file) == source.path and source.part == part and source.unchanged
    }
    missing = [(name, path) for name, path in files.items() if name not in known]
    done = sum(source.size for source in known.values())
    show("reading", done, total)
    with open(log_path, "a", encoding="utf-8") as log:
        log.write("\n")  # what a killed process began to write ends here
        for source in run(functools.partial(_scan_file, part), missing, 16):
            known[source.file] = source
            print(json.dumps(dataclasses.asdict(source)), file=log, flush=True)
            show("reading", done := done + source.size, total)
    return [known[name] for name in files]


def shard_size(total: int) -> int:
    """Bytes of sources that make a shard."""
    return max(SHARD, total // MOST_SHARDS)


def _logged(path: Path) -> Iterator[Source]:
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError):  # half a line
            yield Source(**json.loads(line))


def _scan_file(part: int, file: tuple[str, str]) -> Source:
    name, path = file
    digest, stat = hashlib.sha256(), os.stat(path)

    def blocks() -> Iterator[bytes]:
        with open(path, "rb") as contents:
            while block := contents.read(1 << 20):
                digest.update(block)
                yield block

    contents = blocks()
    cuts = [list(cut) for cut in formats.cuts(path, name, part, contents)]
    for _ in contents:  # what was not read for the cuts
        pass
    return Source(name, path, stat.st_size, stat.st_mtime_ns, digest.hexdigest(), cuts, part)
