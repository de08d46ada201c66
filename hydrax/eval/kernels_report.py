"""What a comparison of kernels shows: a table, and a picture of every time beside the least that memory allows."""

import pathlib
from collections.abc import Iterable, Sequence

from rich.table import Table

from hydrax.eval.kernels import PASSES, Row
from hydrax.train.figure import BASELINE, INK, TRAIN, VALIDATION, blank, quiet, save

COLORS = (VALIDATION, TRAIN)
"""Of the sides, hydrax first."""


def line(row: Row) -> str:
    """A row in brief."""
    what = f"{row.problem} {shape(row)} {_title(row.pass_)} {row.side}:"
    return f"{what} {_milliseconds(row)} ms{_note(row)}" if row.seconds else f"{what} {row.verdict}"


def table(rows: Iterable[Row]) -> Table:
    """A line per row."""
    columns = ("problem", "shape", "pass", "library", "ms", "p20-p80", "GB/s", "of floor", "worst error", "results")
    result = Table(*columns, caption="floor: the time in which memory can move every input and result once")
    for row in rows:
        cells = ["", "", "", ""]
        if row.seconds is not None:
            t = row.seconds
            cells = [_milliseconds(row), f"{1e3 * t.p20:.3f}-{1e3 * t.p80:.3f}", f"{row.bytes / t.median / 1e9:,.0f}"]
            cells += [f"{row.floor_seconds / t.median:.0%}" if row.floor_seconds else ""]
        worst = max(row.errors, key=lambda name: row.errors[name], default="")
        error = f"{worst} {row.errors[worst]:.1e}" if worst else ""
        result.add_row(row.problem, shape(row), _title(row.pass_), row.side, *cells, error, row.verdict)
    for i, column in enumerate(result.columns):
        column.justify, column.no_wrap = ("right" if 4 <= i <= 7 else "left"), i < 9
    return result


def draw(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Milliseconds by problem and shape, a panel per pass, as a PNG. Dashes: floors; pale: results are not right."""
    rows = [row for row in rows if row.seconds]
    if not rows:
        return
    sides = list(dict.fromkeys(row.side for row in rows))
    labels = list(dict.fromkeys((row.problem, row.shape) for row in rows))
    figure = blank(5.4 * len(PASSES), 0.6 + 0.36 * len(labels) * len(sides))
    for axes, which in zip(figure.subplots(1, len(PASSES), sharey=True), PASSES, strict=True):
        for row in rows:
            if row.pass_ != which or row.seconds is None:
                continue
            side, ms, right = sides.index(row.side), 1e3 * row.seconds.median, row.verdict == "right"
            y = labels.index((row.problem, row.shape)) + 0.36 * (side - (len(sides) - 1) / 2)
            axes.barh(y, ms, 0.34, color=COLORS[side], alpha=1 if right else 0.45)
            axes.text(ms, y, f" {ms:.2f}" + ("" if right else " time only"), va="center", fontsize=7, color=INK)
            if row.floor_seconds:
                axes.vlines(1e3 * row.floor_seconds, y - 0.18, y + 0.18, color=BASELINE, linestyle=(0, (2, 1)))
        axes.margins(x=0.2)
        axes.set_xlim(left=0)
        axes.set_xlabel("ms", color=INK)
        axes.set_title(_title(which), color=INK, fontsize=10)
        axes.set_yticks(range(len(labels)), [f"{name}\n{_times(s)}" for name, s in labels], fontsize=8)
        quiet(axes)
        axes.grid(axis="y", visible=False)
    axes.invert_yaxis()
    for color, name in zip(COLORS, sides, strict=False):
        axes.barh([0], [0], color=color, label=name)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def shape(row: Row) -> str:
    """As it is given."""
    return _times(row.shape)


def _times(numbers: Iterable[int]) -> str:
    return "x".join(map(str, numbers))


def _title(name: str) -> str:
    """Of a pass."""
    return name.replace("_", " + ")


def _milliseconds(row: Row) -> str:
    return f"{1e3 * row.seconds.median:.3f}" if row.seconds else ""


def _note(row: Row) -> str:
    return "" if row.verdict == "right" else f" (time only: {row.verdict})"
