"""Pictures: how all of them look, and that of a run, bits per byte against steps beside the baselines."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hydrax.train.metrics import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, TRAIN, VALIDATION, BASELINE, GRID = "#1f2430", "#9db4d6", "#c8442f", "#8a8f99", "#e6e8ec"
BITS = "bits_per_byte", "bits per byte"


class Series(NamedTuple):
    """How one of several things is drawn; each differs from the others in colour, marker and hatch."""

    color: str
    marker: str
    hatch: str


SERIES = (
    Series("#0072b2", "o", ""),
    Series("#d55e00", "s", "//"),
    Series("#009e73", "^", ".."),
    Series("#cc79a7", "D", "\\\\"),
    Series("#56b4e9", "v", "xx"),
    Series("#e69f00", "P", "--"),
    Series("#1f2430", "X", "oo"),
)
"""Colours that the colour-blind tell apart (Okabe & Ito 2008); markers and hatches for those who print in grey."""


def series(i: int) -> Series:
    """The i-th, from the beginning again after the last."""
    return SERIES[i % len(SERIES)]


def blank(width: float, height: float) -> "Figure":
    """An empty figure of that many inches, without a window or global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def quiet(axes: "Axes") -> None:
    """Two spines, and faint horizontal lines behind what is drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: "Figure", path: pathlib.Path) -> None:
    """Writes a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def draw_loss(records: Sequence[Record], baselines: Mapping[str, float], path: pathlib.Path) -> None:
    """Training (line), validation (points) and baselines (dashed), as a PNG; in bits per byte, or nats per answer."""
    name, unit = ("loss", "nats per answer") if any("val_accuracy" in r for r in records) else BITS
    figure = blank(7.2, 4.0)
    axes = figure.add_subplot()
    train = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    validation = [(r["step"], r[f"val_{name}"]) for r in records if r.get(f"val_{name}") is not None]
    if train:
        axes.plot(*zip(*train, strict=True), color=TRAIN, linewidth=1.4, label="training")
    if validation:
        style: dict[str, Any] = {"marker": "o", "markersize": 4.5, "linewidth": 1.6, "color": VALIDATION}
        axes.plot(*zip(*validation, strict=True), label="validation", **style)
        step, value = validation[-1]
        at: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{value:.3f}", (step, value), color=VALIDATION, annotation_clip=False, **at)
    for baseline, value in baselines.items():
        axes.axhline(value, color=BASELINE, linewidth=1.1, linestyle=(0, (5, 3)))
        # Written over the line at the right edge, where the curves have long fallen below the baselines.
        place: dict[str, Any] = {"xytext": (-4, 3), "textcoords": "offset points", "ha": "right", "va": "bottom"}
        text = f"{baseline}  {value:.3f}"
        axes.annotate(text, (1, value), xycoords=("axes fraction", "data"), color=BASELINE, fontsize=9, **place)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(unit, color=INK)
    axes.set_xlim(left=0)
    quiet(axes)
    if train or validation:
        axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.92))
    save(figure, path)
