"""The results of `eval.evaluate` as a table and as pictures."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from hydrax.eval import length
from hydrax.eval.evaluate import SUITES, Asked, Result
from hydrax.eval.perplexity import SLICES
from hydrax.train.figure import INK, blank, quiet, save, series


def table(results: Mapping[str, Mapping[str, Result]], suites: Asked) -> Table:
    """A line per figure, a column per run."""
    shown = Table("suite", "", *results)
    for column in shown.columns[2:]:
        column.justify = "right"
    for item, suite, _ in suites:
        columns = [suite.shown(of[item]) for of in results.values()]
        rows = list(dict.fromkeys(name for column in columns for name in column))
        for i, name in enumerate(rows):
            cells = [_cell(column.get(name)) for column in columns]
            shown.add_row(item if i == 0 else "", name, *cells, end_section=i == len(rows) - 1)
    return shown


def draw(results: Mapping[str, Mapping[str, Result]], suites: Asked, out: pathlib.Path) -> list[pathlib.Path]:
    """The pictures of all suites that have one, below `out`."""
    made = []
    if "extrapolation" in {item for item, _, _ in suites}:
        made.append(out / "extrapolation.png")
        length.draw({name: of["extrapolation"] for name, of in results.items()}, made[-1])
    slices = {
        f"{item}: {name}": [(of[item][name]["loss"], None) for of in results.values()]
        for item, suite, _ in suites
        if suite is SUITES["recall_slices"]
        for name in SLICES
    }
    shares = {
        label: [of[label] for of in map(_shares, results.values())]
        for label in (_shares(next(iter(results.values()))) if results else {})
    }
    for groups, what, name in ((slices, "nats per token", "recall_slices"), (shares, "share right", "accuracy")):
        if groups:
            made.append(out / f"{name}.png")
            _bars(groups, list(results), what, made[-1])
    return made


def _shares(results: Mapping[str, Result]) -> dict[str, tuple[float | None, float | None]]:
    """Of a run: shares right and their standard errors, by what was asked."""
    return {label: pair for item, result in results.items() for label, pair in _of_suite(item, result)}


def _of_suite(item: str, result: Result) -> Iterator[tuple[str, tuple[float | None, float | None]]]:
    if item.startswith("recall:"):
        yield item.removeprefix("recall:"), (result["contains"], result["stderr"])
    if item.startswith("task"):
        yield item.removeprefix("task:"), (result["accuracy"], result["stderr"])
    if item.startswith("lm_eval:"):
        for task, values in result.items():
            for metric, value in values.items():
                if metric.startswith("acc") and not metric.endswith("stderr"):
                    yield f"{task}\n{metric}", (value, values.get(f"{metric}_stderr"))


def _bars(
    groups: Mapping[str, Sequence[tuple[float | None, float | None]]],
    runs: Sequence[str],
    what: str,
    path: pathlib.Path,
) -> None:
    """A group of bars per question, a bar per run, ± 1 standard error, as a PNG."""
    figure = blank(max(4.5, 1.6 + 0.5 * len(groups) * (len(runs) + 1)), 4.0)
    axes = figure.add_subplot()
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        x = np.arange(len(groups)) + (i - (len(runs) - 1) / 2) * width
        values, errors = zip(*((pair[i][0] or 0.0, pair[i][1] or 0.0) for pair in groups.values()), strict=True)
        style: dict[str, Any] = {"color": series(i).color, "hatch": series(i).hatch, "edgecolor": "white"}
        axes.bar(x, values, width * 0.92, yerr=errors if any(errors) else None, label=run, ecolor=INK, **style)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=9)
    axes.set_ylabel(what, color=INK)
    quiet(axes)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def _cell(value: float | str | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
