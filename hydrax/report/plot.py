"""Plots as data: what a picture shows and the table behind it are one thing, so that they cannot differ."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from hydrax.report.study import Band

Scale = Literal["linear", "log", "bytes", "values", "ordinal"]
"""bytes: logarithmic, with KiB and MiB; values: logarithmic, with ticks at all x; ordinal: equally far apart."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """`name` is the column of the table, with its unit. `ticks` are the names of 0, 1, ... on an ordinal scale."""

    title: str
    name: str
    scale: Scale = "linear"
    ticks: Sequence[str] = ()
    top: float | None = None  # where the picture ends; None: above all

    def cell(self, value: float) -> Any:
        """A value as the table has it."""
        return self.ticks[int(value)] if self.scale == "ordinal" else value


@dataclasses.dataclass(frozen=True)
class Point:
    """Mean and range over seeds at x. `label` is the arm's where points of one series are of several arms."""

    x: float
    y: Band
    label: str = ""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further cells of the table


@dataclasses.dataclass(frozen=True)
class Series:
    """Points that belong together. `style` are the numbers of its colour, and of its marker and line style."""

    label: str
    points: Sequence[Point]
    style: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Plot:
    """A picture of one panel.

    lines: series joined by lines with bands, named at their right ends; points: every point named, those of a series
    joined. `levels` are series that do not depend on x: horizontal lines. `front` says whether larger or smaller
    y is better, and draws what no other point beats.
    """

    name: str  # of its files
    title: str
    caption: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    kind: Literal["lines", "points"] = "lines"
    levels: Sequence[Series] = ()
    front: Literal["higher", "lower"] | None = None
    marks: Mapping[str, float] = dataclasses.field(default_factory=dict)  # vertical lines, by what they say

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows."""
        everything = [*self.series, *self.levels]
        facts = list(dict.fromkeys(key for s in everything for p in s.points for key in p.facts))
        columns = ["arm", self.x.name, self.y.name, "lowest", "highest", "runs", *facts]
        rows = [
            [
                p.label or s.label,
                "any" if s in self.levels else self.x.cell(p.x),
                *(p.y.mean, p.y.low, p.y.high, p.y.seeds),
                *(p.facts.get(key) for key in facts),
            ]
            for s in everything
            for p in s.points
        ]
        return columns, rows


@dataclasses.dataclass(frozen=True)
class Panel:
    """A heat map: `values[i][j]` at the i-th row and the j-th column; None: not measured."""

    label: str
    values: Sequence[Sequence[Band | None]]


@dataclasses.dataclass(frozen=True)
class Heat:
    """A picture of several panels, with the same rows and columns."""

    name: str
    title: str
    caption: str
    rows: Axis
    columns: Axis
    value: str
    panels: Sequence[Panel]

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows."""
        rows = [
            [panel.label, self.columns.ticks[j], self.rows.ticks[i], y.mean, y.low, y.high, y.seeds]
            for panel in self.panels
            for i, values in enumerate(panel.values)
            for j, y in enumerate(values)
            if y is not None
        ]
        return ["arm", self.columns.name, self.rows.name, self.value, "lowest", "highest", "runs"], rows
