"""What `scale_out` found, for people: a line and a table per cell, what linear layers send, and a picture."""

import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from hydrax.eval.scale_out import Row
from hydrax.train.figure import BASELINE, INK, blank, quiet, save, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CARRIED = ("allgather_state", "ring_state")


def line(row: Row) -> str:
    """A row in brief."""
    found = [] if row.loss_difference is None else [f"losses within {row.loss_difference:.0e}"]
    if row.step and row.tokens_per_second:
        found += [f"{1e3 * row.step.median:,.1f} ms", f"{row.tokens_per_second:,.0f} tokens/s"]
        found += [] if row.efficiency is None else [f"efficiency {row.efficiency:.0%}"]
    found += [] if row.overlapped is None else [f"{row.overlapped:.0%} of collectives overlapped"]
    found += [f"failed: {row.error}"] if row.error else []
    return f"{label(row)}, {row.seq_len:,} tokens, {row.devices} devices: {', '.join(found)}"


def label(row: Row) -> str:
    """What is divided how."""
    return f"{row.part} {row.model}" + (f" ({row.strategy})" if row.strategy else "")


def table(rows: Iterable[Row]) -> Table:
    """A line per cell."""
    columns = ["cell", "tokens", "devices", "loss diff.", "ms", "predicted", "tokens/s", "efficiency"]
    columns += ["MiB in", "of mixers", "GiB", "predicted", "error"]
    caption = "MiB into a device and GiB on it; predicted ms: FLOPs at the peak, then these bytes over the link"
    result = Table(*columns, caption=caption)
    for i, column in enumerate(result.columns):
        column.justify = "left" if i in (0, len(columns) - 1) else "right"
        column.no_wrap = i < len(columns) - 1
    for row in rows:
        result.add_row(
            label(row),
            f"{row.seq_len:,}",
            f"{row.devices}",
            _text(row.loss_difference, ".0e"),
            _text(row.step.median if row.step else None, ",.1f", 1e3),
            _text(row.predicted_seconds, ",.1f", 1e3),
            _text(row.tokens_per_second, ",.0f"),
            _text(row.efficiency, ".0%"),
            _text(row.nbytes, ",.2f", 2**-20),
            _text(row.mixers_nbytes, ",.3f", 2**-20),
            _text(row.peak_bytes, ",.2f", 2**-30),
            _text(row.predicted_bytes, ",.2f", 2**-30),
            row.error or "",
        )
    return result


def _text(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else format(value * scale, form)


def sent(rows: Sequence[Row]) -> Iterator[str]:
    """Of every model of linear layers alone whether what its mixers send is the same at all lengths."""
    found: dict[tuple[str, str, int], dict[int, int]] = {}
    for row in rows:
        if row.model != "hybrid" and row.strategy in CARRIED and row.mixers_nbytes is not None:
            found.setdefault((row.model, row.strategy or "", row.devices), {})[row.seq_len] = row.mixers_nbytes
    for (model, strategy, devices), by_length in found.items():
        if len(by_length) > 1:
            same = "the same at" if len(set(by_length.values())) == 1 else "NOT the same at"
            sizes = ", ".join(f"{length:,}: {nbytes:,} bytes" for length, nbytes in sorted(by_length.items()))
            yield f"{model}, {strategy}, {devices} devices: mixers send {same} all lengths ({sizes})"


def draw(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Tokens per second and efficiency against devices, a row of panels per model and length; dashed: predicted."""
    timed = [row for row in rows if row.tokens_per_second is not None]
    panels = list(dict.fromkeys(map(_panel, timed)))
    if not panels:
        return
    figure = blank(10.5, 2.8 * len(panels))
    for axes, panel in zip(figure.subplots(len(panels), 2, squeeze=False), panels, strict=True):
        own = sorted((row for row in timed if _panel(row) == panel), key=lambda row: row.devices)
        axes[0].set_title(panel, color=INK, fontsize=10, loc="left")
        _fill(axes[0], axes[1], own)
    save(figure, path)


def _fill(speeds: "Axes", shares: "Axes", own: Sequence[Row]) -> None:
    """The two panels of rows that are compared with the same single device, which begins every line."""
    names = dict.fromkeys(_series(r) for r in own if r.devices > 1) or dict.fromkeys(map(_series, own))
    for i, name in enumerate(names):
        points, style = [r for r in own if r.devices == 1 or _series(r) == name], series(i)
        look: dict[str, Any] = {"color": style.color, "marker": style.marker, "markersize": 4.5, "linewidth": 1.4}
        dashed: dict[str, Any] = {"color": style.color, "linewidth": 1, "linestyle": "--"}
        speeds.plot([_place(r) for r in points], [r.tokens_per_second or 0.0 for r in points], label=name, **look)
        known = [r for r in points if r.predicted_seconds]
        speeds.plot([_place(r) for r in known], [r.devices / _ideal(r) for r in known], **dashed)
        share = [r for r in points if r.efficiency is not None]
        shares.plot([_place(r) for r in share], [r.efficiency or 0.0 for r in share], **look)
        if known and known[0].devices == 1:
            shares.plot([_place(r) for r in known], [_ideal(known[0]) / _ideal(r) for r in known], **dashed)
    speeds.set_ylabel("tokens per second", color=INK)
    shares.set_ylabel("efficiency of a device", color=INK)
    speeds.yaxis.set_major_formatter("{x:,.0f}")
    shares.axhline(1, color=BASELINE, linewidth=1)
    dashed_too = " (dashed: predicted)" if any(r.predicted_seconds for r in own) else ""
    for axes in (speeds, shares):
        counts = {r.devices: _place(r) for r in own}
        axes.set_xticks(list(counts.values()), [f"{n}" for n in counts])
        axes.set_xlim(min(counts.values()) - 0.2, max(counts.values()) + 0.2)
        axes.set_xlabel(f"devices{dashed_too}", color=INK)
        axes.set_ylim(bottom=0)
        quiet(axes)
    handles, labels = speeds.get_legend_handles_labels()
    shares.legend(handles, labels, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _place(row: Row) -> float:
    """On the axis of devices: doubling them is one step. A logarithmic axis does not stand a panel without points."""
    return math.log2(row.devices)


def _panel(row: Row) -> str:
    if row.part == "context":
        return f"{row.model}, one row of {row.seq_len:,} tokens"
    return f"{row.model}, {row.batch // row.devices} x {row.seq_len:,} tokens per device"


def _series(row: Row) -> str:
    return row.strategy or row.part


def _ideal(row: Row) -> float:
    """Predicted device seconds per token."""
    return (row.predicted_seconds or math.inf) * row.devices / (row.batch * row.seq_len)
