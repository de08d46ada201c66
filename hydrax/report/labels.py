"""Short names of what differs: models by their mixers and ratio, other settings by key and value."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from hydrax import mixers
from hydrax.models.layers import LayerSpec
from hydrax.models.mix import Single

PATTERN = "model.pattern"
SHORT = {"data.seq_len": "T", "model.d_model": "d", "model.num_layers": "layers", "train.batch_size": "batch"}
WIDTH = 34  # characters of a pattern in a label


def full_share(layers: Sequence[LayerSpec]) -> Fraction | None:
    """The share of full attention among all that remembers: layers, or heads of a layer of several kinds.

    Layers without a memory of the sequence, as short convolutions, are not counted. None: there is nothing to count.
    """
    shares = [share for layer in layers if (share := _layer_share(layer)) is not None]
    return sum(shares, Fraction(0)) / len(shares) if shares else None


def ratio(share: Fraction) -> str:
    """linear:full, e.g. 3:1 for a quarter of full attention."""
    rest = (1 - share) / share
    return f"{rest.numerator}:{rest.denominator}"


def recurrent(layers: Sequence[LayerSpec]) -> str:
    """The mixers of a model that are not full attention, the most frequent first."""
    found = Counter(s.mixer for layer in layers for s in _memories(layer) if not _is_full(s))
    return "+".join(name for name, _ in found.most_common())


def of_models(patterns: Mapping[str, Sequence[LayerSpec]]) -> dict[str, str]:
    """A label for every pattern, given its layers: `gdn 3:1` if that tells it from the others, else its text."""
    short = {pattern: _of_model(pattern, layers) for pattern, layers in patterns.items()}
    count = Counter(short.values())
    cut = {p: p if len(p) <= WIDTH else f"{p[: WIDTH - 1]}…" for p in patterns}
    unique = len(set(cut.values())) == len(cut)
    return {p: label if count[label] == 1 else cut[p] if unique else p for p, label in short.items()}


def of_setting(key: str, value: Any) -> str:
    """`key value` in brief; empty for what is not set."""
    name = SHORT.get(key, key.split(".")[-1])
    if value is None:
        return ""
    if isinstance(value, bool):
        return name if value else f"no {name}"
    if isinstance(value, str):
        return value
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {json.dumps(value)}"


def telling(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """Few of the keys, the first ones if possible, that tell the rows apart as well as all of them do."""

    def kinds(of: Sequence[str]) -> int:
        return len({json.dumps([row.get(key) for key in of], default=str) for row in rows})

    chosen: list[str] = []
    for key in keys:
        if kinds([*chosen, key]) > kinds(chosen):
            chosen.append(key)
    for key in reversed(chosen.copy()):
        if kinds([k for k in chosen if k != key]) == kinds(chosen):
            chosen.remove(key)
    return chosen


def _of_model(pattern: str, layers: Sequence[LayerSpec]) -> str:
    names = Counter(layer.mixer for layer in layers if _memories(layer))
    if not names:
        return pattern
    if len(names) == 1:
        return next(iter(names))
    full = {layer.mixer for layer in layers if isinstance(layer.mix, Single) and _is_full(layer.mix)}
    ordered = [n for n in names if n not in full] + [n for n in names if n in full]
    share = math.gcd(*names.values())
    shown = [n for n in ordered if n != "attn" or len(ordered) > 2]
    return f"{'+'.join(shown)} {':'.join(str(names[n] // share) for n in ordered)}"


def _memories(layer: LayerSpec) -> list[Single]:
    return [s for s in layer.mix.singles() if mixers.row(s.mixer).transition != "none" or _is_full(s)]


def _is_full(single: Single) -> bool:
    """Whether it attends to all that came before: its cache grows, and not up to a window only."""
    return mixers.row(single.mixer).grows(single.options) and getattr(single.options, "window", None) is None


def _layer_share(layer: LayerSpec) -> Fraction | None:
    found = _memories(layer)
    heads = [getattr(s.options, mixers.row(s.mixer).head_option, None) for s in found]
    weights: list[int] = [1] * len(found) if None in heads else [h for h in heads if h]
    full = [w for s, w in zip(found, weights, strict=True) if _is_full(s)]
    return Fraction(sum(full), sum(weights)) if found else None
