"""Pictures of plots: colours of Okabe and Ito with a marker and a line style each, so that grey tells them apart."""

import io
import itertools
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from hydrax.report.plot import Heat, Plot, Series, bytes_text
from hydrax.train.figure import INK, blank, quiet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of Okabe and Ito (jfly.uni-koeln.de/color), without yellow, which is faint on white."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
SMALL = ("P", "X", "*", "p", "h")
"""Markers that need to be larger than others."""

DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1.5)))
QUIET = "#6b7078"  # of what is no arm
WIDTH, HEIGHT = 5.8, 3.7  # inches
SIZE = 10  # points of text
LINE = 0.17  # inches between names
PALETTE = 128  # colours of a PNG: enough for the edges of all lines and bands, and a third of the bytes


def draw(plot: Plot | Heat) -> "Figure":
    """The picture of a plot."""
    return _draw_heat(plot) if isinstance(plot, Heat) else _draw_plot(plot)


def svg(figure: "Figure", name: str) -> bytes:
    """Vector graphics, the same bytes every time; text as outlines, so that it looks alike everywhere."""
    from matplotlib import rc_context

    out = io.BytesIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def png(figure: "Figure", path: pathlib.Path) -> None:
    """Writes the figure in 200 dots per inch and few colours, the same bytes for the same figure."""
    from PIL import Image

    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=200, metadata={"Software": None})
    Image.open(image).convert("RGB").quantize(PALETTE).save(path, optimize=True)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """New places in the same order, at least `gap` apart, and as near to the old ones as least squares allow.

    Neighbours that are too close become a block around the mean of where they would like to be, until none overlap.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    blocks: list[tuple[float, int]] = []  # sum of wishes for the block's first place, members
    for rank in order:
        wish, n = places[rank], 1
        while blocks and blocks[-1][0] / blocks[-1][1] + gap * blocks[-1][1] > wish / n:
            before, m = blocks.pop()
            wish, n = before + wish - n * m * gap, n + m
        blocks.append((wish, n))
    moved = [wish / n + gap * i for wish, n in blocks for i in range(n)]
    return [place for _, place in sorted(zip(order, moved, strict=True))]


def _draw_plot(plot: Plot) -> "Figure":
    names = len(plot.series) + len(plot.levels)
    figure = blank(WIDTH, max(HEIGHT, 1.1 + LINE * names if plot.kind == "lines" else 0.28 * names))
    axes = figure.add_subplot()
    for series in plot.series:
        if plot.kind == "points":
            _points(axes, series)
        else:
            _lines(axes, series, alpha=0.15 if names <= 8 else 0.08)
    for level in plot.levels:
        y = level.points[0].y
        colour, dash = _style(level)["color"], (0, (4, 2.5))
        axes.axhspan(y.low, y.high, color=colour, alpha=0.12, linewidth=0)
        axes.axhline(y.mean, color=colour, linewidth=1.3, linestyle=dash, zorder=1.5)
    _y_axis(axes, plot)
    _x_axis(axes, plot)
    quiet(axes)
    front = _front(plot) if plot.front else []
    if front:
        right = axes.get_xlim()[1]
        front.append((right, front[-1][1]))
        axes.plot(*zip(*front, strict=True), color="#c4c8ce", linewidth=4, solid_joinstyle="miter", zorder=1)
        axes.set_xlim(right=right)
    for text, x in plot.marks.items():
        axes.axvline(x, color=QUIET, linewidth=1, linestyle=(0, (1, 2)))
        place: dict[str, Any] = {"xytext": (-3, 2), "textcoords": "offset points", "ha": "right", "va": "bottom"}
        axes.annotate(text, (x, 1), xycoords=("data", "axes fraction"), color=QUIET, fontsize=SIZE - 2, **place)
    _names_at_the_right(figure, axes, plot.series if plot.kind == "lines" else (), plot.levels)
    if plot.kind == "points":
        _names_of_points(figure, axes, plot, front)
    return figure


def _style(series: Series) -> dict[str, Any]:
    colour, index = series.style
    return {
        "color": COLOURS[colour % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
        "markersize": 8 if MARKERS[index % len(MARKERS)] in SMALL else 5.5,
        "markeredgecolor": "white",
        "markeredgewidth": 0.4,
        "linewidth": 1.6,
    }


def _lines(axes: "Axes", series: Series, alpha: float) -> None:
    x, style = [p.x for p in series.points], _style(series)
    # Of many points, a few carry the marker, at places that differ from series to series.
    every = None if len(x) <= 12 else (series.style[1] % 5 * max(1, len(x) // 25), max(1, len(x) // 5))
    axes.plot(x, [p.y.mean for p in series.points], markevery=every, **style)
    if any(p.y.low < p.y.high for p in series.points):
        low, high = [p.y.low for p in series.points], [p.y.high for p in series.points]
        axes.fill_between(x, low, high, color=style["color"], alpha=alpha, linewidth=0)


def _points(axes: "Axes", series: Series) -> None:
    style = _style(series)
    style["markersize"] += 1
    for p in series.points:
        axes.plot([p.x, p.x], [p.y.low, p.y.high], color=style["color"], linewidth=1.2, zorder=2)
    axes.plot([p.x for p in series.points], [p.y.mean for p in series.points], **style | {"linewidth": 1.1}, zorder=3)


def _front(plot: Plot) -> list[tuple[float, float]]:
    """Corners of the steps through the points that no point of at most their x beats."""
    sign = 1 if plot.front == "higher" else -1
    corners: list[tuple[float, float]] = []
    for p in sorted((p for s in plot.series for p in s.points), key=lambda p: (p.x, -sign * p.y.mean)):
        if not corners:
            corners.append((p.x, p.y.mean))
        elif sign * p.y.mean > sign * corners[-1][1]:
            corners += [(p.x, corners[-1][1]), (p.x, p.y.mean)]
    return corners


def _x_axis(axes: "Axes", plot: Plot) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axis, x = plot.x, sorted({p.x for s in plot.series for p in s.points})
    if axis.scale == "ordinal":
        turned = sum(len(t) for t in axis.ticks) > 50
        style: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if turned else {}
        axes.set_xticks(range(len(axis.ticks)), axis.ticks, **style)
        axes.set_xlim(-0.25, len(axis.ticks) - 0.75)
    elif axis.scale in ("bytes", "values"):
        axes.set_xscale("log", base=2)
        low, high = math.log2(x[0]), math.log2(x[-1])
        room = max(0.06 * (high - low), 0.2)
        axes.set_xlim(2 ** (low - room), 2 ** (high + room))
        if axis.scale == "values":
            axes.xaxis.set_major_locator(FixedLocator(_thinned(x)))
            axes.xaxis.set_major_formatter(
                FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
            )
        else:
            step = max(1, math.ceil((high - low) / 7))
            at = [2.0**n for n in range(math.floor(low), math.ceil(high) + 1, step)]
            if sum(x[0] <= a <= x[-1] for a in at) < 2:  # all within a factor of two or so
                at = [2**low, 2 ** ((low + high) / 2), 2**high]
            axes.xaxis.set_major_locator(FixedLocator(at))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value)))
        axes.xaxis.set_minor_locator(NullLocator())
    elif axis.scale == "log":
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        if high / low < 50:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.set_xlabel(axis.title, color=INK, fontsize=SIZE)


def _thinned(x: Sequence[float]) -> Sequence[float]:
    """At most about eight of the values."""
    return x[:: -(-len(x) // 8)]


def _y_axis(axes: "Axes", plot: Plot) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    if plot.y.scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    elif plot.y.top is not None:
        low = min(p.y.low for s in plot.series for p in s.points)
        axes.set_ylim(low - 0.05 * (plot.y.top - low), plot.y.top + 0.03 * (plot.y.top - low))
        x = [p.x for s in plot.series for p in s.points if p.y.low <= plot.y.top]
        axes.set_xlim(0.9 * min(x), 1.1 * max(x))
    elif "accuracy" in plot.y.name:
        low = min(p.y.low for s in (*plot.series, *plot.levels) for p in s.points)
        axes.set_ylim(-0.03 if low < 0.5 else max(0.0, low - 0.08), 1.03)
    axes.set_ylabel(plot.y.title, color=INK, fontsize=SIZE)
    axes.tick_params(labelsize=SIZE - 1, colors=INK)


def _short(value: float) -> str:
    """50000 -> 50k; 2e+15 -> 2·10¹⁵; 0.003 as it is."""
    if value >= 1e13:
        power = math.floor(math.log10(value) + 1e-9)
        lead = value / 10**power
        digits = str(power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"10{digits}" if f"{lead:.2g}" == "1" else f"{lead:.2g}·10{digits}"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _names_at_the_right(figure: "Figure", axes: "Axes", lines: Sequence[Series], levels: Sequence[Series]) -> None:
    """Every series by its name beside the end of its line, moved apart where they would overlap."""
    from matplotlib.lines import Line2D

    if not (lines or levels):
        return
    figure.canvas.draw()  # only now are places known
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [tuple(map(float, to_axes.transform((s.points[-1].x, s.points[-1].y.mean)))) for s in lines]
    ends += [(1.0, float(to_axes.transform((axes.get_xlim()[0], s.points[-1].y.mean))[1])) for s in levels]
    gap = LINE * figure.dpi / axes.get_window_extent().height
    places = spread([y for _, y in ends], gap)
    shift = max(0.0, -min(places)) - max(0.0, max(places) - 1)
    for s, (x, y), place in zip([*lines, *levels], ends, places, strict=True):
        # A thin line in the colour of the series leads from its end to marker and name.
        style: dict[str, Any] = _style(s)
        beside: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
        way = [(x, y), (1.0, y), (1.045, place + shift)]
        axes.add_line(Line2D(*zip(*way, strict=True), color=style["color"], linewidth=0.7, zorder=1.2, **beside))
        if s in lines:
            axes.add_line(Line2D([1.06], [place + shift], **style, **beside))
        axes.text(
            1.085 if s in lines else 1.055,
            place + shift,
            s.label,
            va="center",
            fontsize=SIZE - 1,
            color=INK,
            transform=axes.transAxes,
        )


def _names_of_points(figure: "Figure", axes: "Axes", plot: Plot, front: Sequence[tuple[float, float]]) -> None:
    """Single points by the names of their arms, families by theirs at the last point, where they cover least."""
    from matplotlib.patheffects import withStroke

    figure.canvas.draw()
    scale, inside = figure.dpi / 72, axes.get_window_extent()
    ways = [[(p.x, p.y.mean) for p in s.points] for s in plot.series] + [list(front)]
    ways += [[(p.x, p.y.low), (p.x, p.y.high)] for s in plot.series for p in s.points]
    ways += [[(x, s.points[0].y.mean) for x in axes.get_xlim()] for s in plot.levels]
    taken = [box for way in ways if len(way) > 1 for box in _boxes(axes.transData.transform(way), 4 * scale)]
    spots = axes.transData.transform([(p.x, p.y.mean) for s in plot.series for p in s.points])
    taken += [_box(x, y, 10 * scale) for x, y in spots] * 2
    for series in plot.series:
        point = series.points[-1]
        x, y = axes.transData.transform((point.x, point.y.mean))
        label = series.label if len(series.points) > 1 else point.label
        at: dict[str, Any] = {"xytext": (0, 0), "textcoords": "offset points"}
        text = axes.annotate(label, (point.x, point.y.mean), fontsize=SIZE - 1, color=INK, **at)
        size = text.get_window_extent()
        best = min(OFFSETS, key=lambda o: _covered(_placed(x, y, o, size, scale), taken, inside))
        text.set(position=best[:2], ha=best[2], va=best[3])
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        taken += [_placed(x, y, best, size, scale)] * 2


Box = tuple[float, float, float, float]

OFFSETS = tuple(
    (dx * r, dy * r, ha, va)
    for r in (1, 1.8, 2.8, 4)
    for dx, dy, ha, va in (
        (7, 0, "left", "center"),
        (-7, 0, "right", "center"),
        (0, 7, "center", "bottom"),
        (0, -7, "center", "top"),
        (5, 5, "left", "bottom"),
        (5, -5, "left", "top"),
        (-5, 5, "right", "bottom"),
        (-5, -5, "right", "top"),
    )
)
"""Where a name may stand, the best places first: shift in points, alignment."""


def _box(x: float, y: float, width: float) -> Box:
    return x - width / 2, y - width / 2, x + width / 2, y + width / 2


def _boxes(way: Any, width: float) -> list[Box]:
    """Squares along straight lines through the points of an array [n, 2]."""
    found = []
    for (x, y), (to_x, to_y) in itertools.pairwise(way):
        n = max(1, math.ceil(max(abs(to_x - x), abs(to_y - y)) / width))
        found += [_box(x + (to_x - x) * i / n, y + (to_y - y) * i / n, width) for i in range(n + 1)]
    return found


def _placed(x: float, y: float, offset: tuple[float, float, str, str], size: Any, scale: float) -> Box:
    """Where a text of that size comes to stand."""
    dx, dy, ha, va = offset
    left = x + dx * scale - {"left": 0, "center": 0.5, "right": 1}[ha] * size.width
    bottom = y + dy * scale - {"bottom": 0, "center": 0.5, "top": 1}[va] * size.height
    return left, bottom, left + size.width, bottom + size.height


def _covered(box: Box, taken: Iterable[Box], inside: Any) -> float:
    """Area of what the box covers, and of what sticks out."""
    left, bottom, right, top = box
    width = max(0.0, min(right, inside.x1) - max(left, inside.x0))
    height = max(0.0, min(top, inside.y1) - max(bottom, inside.y0))
    out = (right - left) * (top - bottom) - width * height
    return 2 * out + sum(
        max(0.0, min(right, r) - max(left, left_)) * max(0.0, min(top, t) - max(bottom, b)) for left_, b, r, t in taken
    )


def _draw_heat(plot: Heat) -> "Figure":
    """Panels side by side, light for what is right; the numbers stand in the cells."""
    n = len(plot.panels)
    across = min(n, 3 if sum(map(len, plot.columns.ticks)) <= 14 else 2)  # as the names of columns fit
    down = -(-n // across)
    figure = blank(WIDTH, 0.9 + down * (0.45 + max(0.24 * len(plot.rows.ticks), 0.8)))
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    image: Any = None
    for axes, panel in itertools.zip_longest(grid.flat, plot.panels):
        if panel is None:
            axes.set_visible(False)
            continue
        values = [[math.nan if y is None else y.mean for y in row] for row in panel.values]
        image = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower")
        for i, j in itertools.product(range(len(plot.rows.ticks)), range(len(plot.columns.ticks))):
            value = values[i][j]
            if not math.isnan(value) and len(plot.columns.ticks) <= 8:
                text = "1" if value > 0.995 else f"{value:.2f}"[1:]
                axes.text(
                    j, i, text, ha="center", va="center", fontsize=7.5, color="white" if value < 0.55 else "black"
                )
        axes.set_title(panel.label, fontsize=SIZE - 1, color=INK)
        axes.set_xticks(range(len(plot.columns.ticks)), plot.columns.ticks)
        axes.set_yticks(range(len(plot.rows.ticks)), plot.rows.ticks)
        axes.tick_params(labelsize=SIZE - 2, colors=INK, length=0)
        axes.spines[:].set_visible(False)
    for axes, above in zip(grid[-1], grid[-2] if down > 1 else grid[-1], strict=True):
        if not axes.get_visible():
            above.tick_params(labelbottom=True)
    figure.supxlabel(plot.columns.title, fontsize=SIZE, color=INK)
    figure.supylabel(plot.rows.title, fontsize=SIZE, color=INK)
    bar = figure.colorbar(image, ax=grid, shrink=0.9, pad=0.02)
    bar.set_label("accuracy", fontsize=SIZE, color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SIZE - 2, colors=INK)
    return figure
