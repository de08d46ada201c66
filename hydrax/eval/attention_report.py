"""What a benchmark of attention shows: a table, and a picture of time against length."""

import pathlib
from collections.abc import Iterable, Sequence

from rich.table import Table

from hydrax.eval.contest import Row
from hydrax.eval.layer import PASSES
from hydrax.train.figure import INK, blank, quiet, save


def line(row: Row) -> str:
    """A row in brief."""
    parts = [f"{row.subject}, K = {row.width}, {row.seq_len:,} tokens:"]
    parts += [f"{_title(name)} {1e3 * r.seconds.median:,.2f} ms" for name, r in row.results.items()]
    parts += [] if row.verdict == "right" else [f"({row.verdict})"]
    return "  ".join(parts + ([f"failed: {row.error}"] if row.error else []))


def table(rows: Iterable[Row]) -> Table:
    """A line per pass."""
    columns = ("op", "K", "tokens", "pass", "ms", "p20-p80", "MiB", "worst error", "results")
    result = Table(*columns, caption="results: of a short row, against the definition in fp32")
    for row in rows:
        worst = max(row.errors, key=lambda name: row.errors[name], default="")
        facts = f"{worst} {row.errors[worst]:.1e}" if worst else "", row.verdict
        for name, r in row.results.items():
            t = r.seconds
            cells = [f"{1e3 * t.median:,.3f}", f"{1e3 * t.p20:,.3f}-{1e3 * t.p80:,.3f}"]
            cells += [f"{r.memory.total / 2**20:,.0f}"]
            result.add_row(row.subject, str(row.width), f"{row.seq_len:,}", _title(name), *cells, *facts)
        if row.error:
            result.add_row(row.subject, str(row.width), f"{row.seq_len:,}", "failed", *[""] * 4, row.error)
    for i, column in enumerate(result.columns):
        column.justify, column.no_wrap = ("left" if i in (0, 3, 7, 8) else "right"), i < 8
    return result


def draw(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Milliseconds against length, a panel per width and pass and a line per op, as a PNG. White: results not right."""
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator

    rows = [row for row in rows if row.results]
    if not rows:
        return
    widths, subjects = (list(dict.fromkeys(x)) for x in ([r.width for r in rows], [r.subject for r in rows]))
    lengths = sorted({row.seq_len for row in rows})
    figure = blank(5.2 * len(PASSES), 4.2 * len(widths))
    panels = figure.subplots(len(widths), len(PASSES), squeeze=False)
    for i, width in enumerate(widths):
        for axes, name in zip(panels[i], PASSES, strict=True):
            for n, subject in enumerate(subjects):
                own = [r for r in rows if (r.subject, r.width) == (subject, width) and name in r.results]
                if not own:
                    continue
                color = colormaps["turbo"]((n + 0.5) / len(subjects))
                y = [1e3 * r.results[name].seconds.median for r in own]
                fill = color if own[0].verdict == "right" else "white"
                marker, style = "osD^v"[n % 5], ("-", "--", ":")[n % 3]
                axes.plot(
                    [r.seq_len for r in own], y, style, marker=marker, markersize=4, color=color,
                    markerfacecolor=fill, linewidth=1.3, label=subject,
                )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.set_xlabel("tokens of a row", color=INK)
            axes.set_ylabel("ms", color=INK)
            axes.set_title(f"{_title(name)}, K = {width}", color=INK, fontsize=10)
            quiet(axes)
    panels[0][-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def _title(name: str) -> str:
    """Of a pass."""
    return name.replace("_", " + ")
