"""Length extrapolation of a language model: nats per token by position, to several times its training length T0.

The same long sequences are read twice: in one pass, and in windows of T0 places, each half over the one before, in
which a token is predicted from the T0/2 to T0 tokens before it. The second is what a model reaches that only ever looks
at what it was trained on; where the first lies above it, the model suffers from length. A single mean would hide that.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hydrax.core.build import ConfigError
from hydrax.core.typing import Float
from hydrax.eval.scoring import Advance, Scorer, Tokens
from hydrax.eval.texts import Texts
from hydrax.train.figure import BASELINE, INK, blank, quiet, save, series

ALLOWED = 0.02
"""Nats per token by which a model that extrapolates may be worse beyond its training length."""

FIRST = 16
"""Positions in the first bin at most."""

Losses = Float[np.ndarray, "sequences positions"]


def long_sequences(texts: Texts, bos: int, trained: int, factor: int, count: int) -> list[Tokens]:
    """At most `count` sequences of factor·T0 + 1 tokens inside of documents at least twice as long.

    In shorter ones, late positions would all be the ends of documents; beginnings, unlike the rest, are left out.

    Raises:
      ConfigError: no such document.
    """
    length, needed = factor * trained, 2 * factor * trained + 1
    found = [s for s in texts.cut(length, 2 * count, shortest=needed) if len(s) == length + 1 and s[0] != bos]
    if not found:
        longest = int(texts.lengths.max(initial=0))
        allowed = f"expected --data with a document of {needed} tokens (the longest has {longest}), or a smaller factor"
        raise ConfigError("factor", factor, allowed)
    return found[:: -(-len(found) // count)]


def losses(
    scorer: Scorer, sequences: Sequence[Tokens], trained: int, advance: Advance | None = None
) -> tuple[Losses, Losses]:
    """Nats of every target, in one pass and in windows; sequences of one length."""
    whole = np.stack([score.nll for score in scorer.texts(sequences, advance)])
    spans = windows(whole.shape[1], trained)
    pieces = [sequence[start : end + 1] for sequence in sequences for start, _, end in spans]
    scores = iter(scorer.texts(pieces, advance))
    local = [np.concatenate([next(scores).nll[new - start :] for start, new, _ in spans]) for _ in sequences]
    return whole, np.stack(local)


def windows(length: int, width: int) -> list[tuple[int, int, int]]:
    """Windows (start, first new place, end) that cover `length` places, each half over the one before."""
    spans = [(0, 0, min(width, length))]
    while (end := spans[-1][2]) < length:
        following = min(end + max(width // 2, 1), length)
        spans.append((following - width, end, following))
    return spans


def edges(trained: int, longest: int) -> list[int]:
    """Last positions, counted from 1, of bins that halve from T0 downwards and double upwards."""
    below = [math.ceil(trained / 2**k) for k in range(trained.bit_length()) if trained / 2**k >= FIRST]
    above = [trained * 2**k for k in range(1, longest.bit_length()) if trained * 2**k < longest]
    return sorted({*below, trained, *above, longest})


def extrapolation(whole: Losses, local: Losses, trained: int) -> dict[str, Any]:
    """Both curves, binned, with standard errors over sequences, and the verdict."""
    bins = edges(trained, whole.shape[1])
    inside, beyond = (_mean(whole, low, high) for low, high in ((trained // 2, trained), (trained, whole.shape[1])))
    result: dict[str, Any] = {"trained_length": trained, "sequences": len(whole), "positions": bins}
    for name, curve in (("one_pass", whole), ("windows", local)):
        means = [curve[:, low:high].mean(1, dtype=np.float64) for low, high in zip([0, *bins], bins, strict=False)]
        error = [float(m.std(ddof=1) / math.sqrt(len(m))) if len(m) > 1 else None for m in means]
        result[name] = {"loss": [float(m.mean()) for m in means], "stderr": error}
    return result | {
        "inside": inside,
        "beyond": beyond,
        "beyond_in_windows": _mean(local, trained, whole.shape[1]),
        "allowed": ALLOWED,
        "extrapolates": beyond <= inside + ALLOWED,
    }


def draw(results: Mapping[str, Mapping[str, Any]], path: pathlib.Path) -> None:
    """Nats per token against position as a PNG: a colour and marker per run, its windows dashed, ± 1 standard error."""
    figure = blank(7.2, 4.2)
    axes = figure.add_subplot()
    for i, (name, result) in enumerate(results.items()):
        style, x = series(i), np.array(result["positions"], float)
        for kind, line in (("one_pass", "solid"), ("windows", (0, (2, 2)))):
            y = np.array(result[kind]["loss"])
            error = np.array([e or 0.0 for e in result[kind]["stderr"]])
            label = name if kind == "one_pass" else None
            marks: dict[str, Any] = {"marker": style.marker, "markersize": 4.5 if label else 3.5}
            marks["markerfacecolor"] = style.color if label else "white"
            axes.plot(x, y, color=style.color, linestyle=line, linewidth=1.6, label=label, **marks)
            axes.fill_between(x, y - error, y + error, color=style.color, alpha=0.15, linewidth=0)
    axes.plot([], [], color=INK, linestyle=(0, (2, 2)), linewidth=1.6, label="in windows of the training length")
    axes.set_xscale("log", base=2)
    for trained in {result["trained_length"] for result in results.values()}:
        axes.axvline(trained, color=BASELINE, linewidth=1.1, linestyle=(0, (5, 3)))
        place: dict[str, Any] = {"xytext": (4, -2), "textcoords": "offset points", "va": "top", "fontsize": 9}
        axes.annotate("training length", (trained, 1), xycoords=("data", "axes fraction"), color=BASELINE, **place)
    ticks = sorted({p for result in results.values() for p in result["positions"]})
    axes.set_xticks(ticks, [f"{p:,}" for p in ticks])
    axes.minorticks_off()
    axes.set_xlabel("position (the end of its bin)", color=INK)
    axes.set_ylabel("nats per token", color=INK)
    quiet(axes)
    axes.legend(frameon=False, fontsize=9)
    save(figure, path)


def _mean(curve: Losses, low: int, high: int) -> float:
    return float(curve[:, low:high].mean(dtype=np.float64))
