"""What a benchmark leaves: a file of all that was measured, a table, and a picture of time per token against length."""

import dataclasses
import errno
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from hydrax.core.build import ConfigError
from hydrax.eval.bench import Result, Row, Settings
from hydrax.eval.layer import PASSES
from hydrax.train.figure import INK, blank, quiet, save
from hydrax.train.metrics import write_json


class Report:
    """The rows so far, in the file `out` from the beginning and after every `add`; None: in memory only.

    Raises:
      ConfigError: the file cannot be written.
    """

    def __init__(
        self,
        out: pathlib.Path | None,
        command: str,
        environment: Mapping[str, Any],
        settings: Any,
        picture: Callable[[Sequence[Any], pathlib.Path], None],
        rows: Sequence[Any] = (),
    ):
        self.rows: list[Any] = list(rows)
        self._out, self._picture = out, picture
        self._facts = {"command": command, "environment": environment, "settings": dataclasses.asdict(settings)}
        self.add([])

    def add(self, rows: Sequence[Any]) -> None:
        """Takes more rows, dataclasses, and writes the file as a whole."""
        self.rows += rows
        if self._out is not None:
            write(self._out, {**self._facts, "rows": [dataclasses.asdict(row) for row in self.rows]}, "out")

    def draw(self) -> None:
        """The picture of all rows beside the file."""
        if self._out is not None:
            self._picture(self.rows, self._out.with_suffix(".png"))


def write(path: pathlib.Path, values: Any, key: str) -> None:
    """JSON at a path that the user gave as `key`.

    Raises:
      ConfigError: it does not end in .json, or cannot be written.
    """
    if path.suffix != ".json":
        raise ConfigError(key, str(path), "expected a path that ends in .json")
    _tried(path, key, lambda: write_json(path, values))


def check_place(path: pathlib.Path, key: str) -> None:
    """Raises what `write` would, and leaves a file that is there as it is."""
    _tried(path, key, lambda: tempfile.TemporaryFile(dir=path.parent).close())


def _tried(path: pathlib.Path, key: str, do: Callable[[], None]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        do()
    except OSError as error:
        raise ConfigError(key, str(path), f"cannot be written ({error.strerror}); expected a new file") from None


def table(rows: Iterable[Row], settings: Settings) -> Table:
    """A line per program: median time and how wide the middle 60 % of its samples lie, memory, speed."""
    title = f"{settings.batch} x T tokens, d_model {settings.d_model}, {settings.dtype}"
    columns = ("mixer", "tokens", "pass", "compile s", "ms", "spread", "ns/token", "ratio", "MiB", "GFLOP/s")
    result = Table(*columns, title=title, caption="ratio: of time per token to that of the shortest row")
    for i, column in enumerate(result.columns):
        column.justify = "left" if i in (0, 2) else "right"
        column.no_wrap = True
    for row in rows:
        for name, measured in row.results.items():
            result.add_row(row.mixer, f"{row.seq_len:,}", _title(name), *_cells(measured))
        if row.error:
            result.add_row(row.mixer, f"{row.seq_len:,}", "failed")
    return result


def line(row: Row) -> str:
    """A row in brief, when it is there."""
    parts = [f"{row.mixer}, {row.seq_len:,} tokens:"]
    parts += [f"{_title(name)} {1e3 * r.seconds.median:,.1f} ms" for name, r in row.results.items()]
    return "  ".join(parts + ([f"failed: {row.error}"] if row.error else []))


def draw_times(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Median time per token against length, a panel per pass and a line per mixer, as a PNG; bars: the middle 60 %."""
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator

    passes = [name for name in PASSES if any(name in row.results for row in rows)]
    if not passes:
        return
    figure = blank(5.2 * len(passes), 4.0)
    mixers = list(dict.fromkeys(row.mixer for row in rows))
    for axes, name in zip(figure.subplots(1, len(passes), squeeze=False)[0], passes, strict=True):
        for i, mixer in enumerate(mixers):
            points = list(_points(rows, mixer, name))
            if points:
                x, y, low, high = zip(*points, strict=True)
                color = colormaps["turbo"]((i + 0.5) / len(mixers))
                axes.errorbar(x, y, (low, high), marker="o", markersize=3.5, linewidth=1.3, color=color, label=mixer)
        lengths = sorted({row.seq_len for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:,.0f}")
        axes.set_xlabel("tokens of a row", color=INK)
        axes.set_ylabel("ns per token", color=INK)
        axes.set_title(_title(name), color=INK, fontsize=10)
        quiet(axes)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def _title(name: str) -> str:
    """Of a pass."""
    return name.replace("_", " + ")


def _points(rows: Iterable[Row], mixer: str, name: str) -> Iterator[tuple[float, float, float, float]]:
    """Length, ns per token, and how far the 20th percentile lies below and the 80th above it."""
    for row in rows:
        if row.mixer == mixer and name in row.results:
            r = row.results[name]
            scale = r.ns_per_token / r.seconds.median
            yield (
                row.seq_len,
                r.ns_per_token,
                scale * (r.seconds.median - r.seconds.p20),
                scale * (r.seconds.p80 - r.seconds.median),
            )


def _cells(r: Result) -> list[str]:
    return [
        f"{r.compile_seconds:.1f}",
        f"{1e3 * r.seconds.median:,.2f}",
        f"{(r.seconds.p80 - r.seconds.p20) / r.seconds.median:.0%}",
        f"{r.ns_per_token:,.0f}",
        f"{r.ratio:.2f}",
        f"{r.memory.total / 2**20:,.1f}",
        f"{r.flops_per_second / 1e9:,.1f}",
    ]
