"""Which plots a study has: each appears when its runs have what it needs, and only then."""

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeVar

from hydrax.core.build import ConfigError
from hydrax.report import labels
from hydrax.report.plot import Axis, Heat, Panel, Plot, Point, Series
from hydrax.report.read import Run
from hydrax.report.study import Arm, Band, Measure, Study, band

Key = TypeVar("Key")

SEQ_LEN = "data.seq_len"
BINS = 60  # points of a curve at most
SLICES = "val_slices"
BANDS = "Bands: lowest to highest seed."
BARS = "Bars: lowest to highest seed."


def plots(found: Study, x: str | None = None) -> list[Plot | Heat]:
    """All plots that the study allows, and one against the config key `x`.

    Raises:
      ConfigError: the arms do not differ in `x`.
    """
    if x and x not in found.varied:
        raise ConfigError("x", x, f"expected a key in which arms differ: {', '.join(found.varied) or 'there is none'}")
    return [plot for make in MAKERS for plot in make(found)] + ([against(found, x)] if x else [])


def by_ratio(found: Study) -> list[Plot]:
    """Measures against linear:full, a series per recurrent mixer; attention alone is a level."""
    hybrids = [arm for arm in found.arms if arm.share is not None and arm.share < 1]
    groups = _grouped(hybrids, lambda arm: arm.label_without(labels.PATTERN, arm.recurrent))
    groups = {name: arms for name, arms in groups.items() if len({arm.share for arm in arms}) > 1}
    shares = sorted({_share(arm) for arms in groups.values() for arm in arms})
    if not groups:
        return []
    alone = [arm for arm in found.arms if arm.share == 1]
    ticks = [labels.ratio(share) if share else "no attention" for share in shares]
    made = []

    def style(arms: Sequence[Arm]) -> tuple[int, int]:
        return found.style(arms[0])

    other = [m for m in found.measures if m.higher != found.quality.higher]
    for measure in (found.quality, *other[:1], *found.evaluated):
        series = [
            Series(name, [_point(shares.index(_share(a)), a, measure) for a in sorted(group, key=_share)], style(group))
            for name, group in groups.items()
        ]
        made.append(
            Plot(
                "ratio_" + re.sub(r"\W+", "_", measure.key),
                f"{_capital(measure.title)} against the share of full attention",
                f"x: recurrent layers, or heads, per one of full attention. Dashed: attention alone. {BANDS}",
                Axis("recurrent : full attention", "recurrent:full", "ordinal", ticks),
                Axis(measure.title, measure.key),
                series,
                levels=[Series(a.label, [_point(0, a, measure)], found.style(a)) for a in alone],
            )
        )
    return made


def by_cache(found: Study) -> list[Plot]:
    """Quality against all that decoding keeps at the training length."""
    sizes = {arm.label: arm.cost.cache_bytes for arm in found.arms if arm.cost and arm.cost.cache_bytes}
    if len(set(sizes.values())) < 2:
        return []
    arms, q = [arm for arm in found.arms if arm.label in sizes], found.quality
    lengths = sorted({arm.best[0].seq_len for arm in arms})
    tokens = " to ".join(f"{n:,}" for n in dict.fromkeys((lengths[0], lengths[-1])))
    return [
        Plot(
            "cache",
            f"{_capital(q.title)} against the memory of decoding",
            f"Recurrent states (fp32) and cached keys and values (bf16) of one sequence of {tokens} tokens. "
            f"Grey line: the Pareto front, what no arm of at most that size beats. {BARS}",
            Axis("states and cache of one sequence", "cache_bytes", "bytes"),
            Axis(q.title, q.key),
            _families(found, arms, lambda arm: _point(sizes[arm.label], arm, q)),
            kind="points",
            front="higher" if q.higher else "lower",
        )
    ]


def by_state(found: Study) -> list[Plot]:
    """Accuracy against the size of all memory that does not grow; models of full attention alone are levels."""
    if (measure := found.measure("val_accuracy")) is None:
        return []
    sizes = {a.label: n for a in found.arms if a.share != 1 and (n := a.best[0].fixed_bytes)}
    having = [arm for arm in found.arms if arm.label in sizes]
    if len(set(sizes.values())) < 2:
        return []
    without = [arm for arm in found.arms if arm.share == 1]
    return [
        Plot(
            "state",
            "Accuracy against the size of the state",
            "State: what one sequence keeps in layers whose memory does not grow with it: recurrent states (fp32), "
            f"full windows and tails of short convolutions (bf16). Dashed: full attention alone. {BARS}",
            Axis("state of one sequence", "state_bytes", "bytes"),
            Axis(measure.title, measure.key),
            _families(found, having, lambda arm: _point(sizes[arm.label], arm, measure)),
            kind="points",
            levels=[Series(arm.label, [_point(0, arm, measure)], found.style(arm)) for arm in without],
        )
    ]


def by_slice(found: Study) -> list[Plot | Heat]:
    """Accuracy on parts of the validation data: lines for what one key names, heat maps for two."""
    parsed: dict[tuple[str, ...], dict[tuple[str, ...], str]] = defaultdict(dict)
    for name in dict.fromkeys(name for arm in found.arms for run in arm.best for name in _slices(run)):
        pairs = [part.partition("=") for part in name.split(",")]
        if len(pairs) <= 2 and all(given for _, given, _ in pairs):
            parsed[tuple(key.strip() for key, _, _ in pairs)][tuple(value.strip() for _, _, value in pairs)] = name
    made: list[Plot | Heat] = []
    for keys, names in parsed.items():
        ticks = [_sorted(values[i] for values in names) for i in range(len(keys))]
        if len(keys) == 2 and min(map(len, ticks)) > 1:
            made.append(_heat(found, keys, ticks, names))
        made += [
            _by_value(found, keys, i, ticks[i], names)
            for i, key in enumerate(keys)
            if len(ticks[i]) > 1 and (key,) not in parsed.keys() - {keys}
        ]
    return made


def by_tokens(found: Study) -> list[Plot]:
    """Loss and accuracy while training, against tokens and against FLOPs."""
    best = [run for arm in found.arms for run in arm.best]
    validated = all(sum("val_loss" in record for record in run.records) >= 4 for run in best)
    of, key = ("validation", "val_loss") if validated else ("training", "loss")
    curves = {key: f"{of} loss, nats per target"}
    if validated and found.measure("val_accuracy"):
        curves["val_accuracy"] = "accuracy"
    return [plot for key, title in curves.items() for plot in _curves(found, key, title)]


def by_length(found: Study) -> list[Plot]:
    """Training speed against the length of rows, where it varies."""
    groups = _grouped(found.arms, lambda arm: (arm.label_without(SEQ_LEN), _devices(arm.best[0])))
    several = len({devices for _, devices in groups}) > 1
    series: list[Series] = []
    for (name, devices), arms in groups.items():
        points = [_speed(arm) for arm in sorted(arms, key=lambda a: a.best[0].seq_len) if _speeds(arm)]
        if len({p.x for p in points}) > 1:
            series.append(Series(f"{name}, {devices}" if several else name, points, (len(series), len(series))))
    if not series:
        return []
    caption = "Training, on all devices together: median over all runs of an arm; band: slowest to fastest run."
    axes = Axis("tokens of a row, T", "seq_len", "values"), Axis("tokens/s", "tokens_per_second", "log")
    return [Plot("speed", "Training speed against length", caption, *axes, series)]


def by_rate(found: Study) -> list[Plot]:
    """Quality against the learning rate, where an arm has several."""
    q = found.quality
    series = [
        Series(
            arm.label,
            [Point(rate, y, facts={"best": rate == arm.rate}) for rate in arm.by_rate if (y := arm.band(q.of, rate))],
            found.style(arm),
        )
        for arm in found.arms
        if len(arm.by_rate) > 1
    ]
    if not series:
        return []
    caption = f"{BANDS} All other plots show the best rate of every arm, by the mean over its seeds."
    axes = Axis("peak learning rate", "lr", "values"), Axis(q.title, q.key)
    return [Plot("learning_rate", f"{_capital(q.title)} against the learning rate", caption, *axes, series)]


def against(found: Study, key: str) -> Plot:
    """Quality against a config key of the user's choice."""

    def value(arm: Arm) -> Any:
        return arm.model if key == labels.PATTERN else arm.settings[key]

    values = list(dict.fromkeys(map(value, found.arms)))
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    values = sorted(values) if numbers else values
    q = found.quality
    groups = _grouped(found.arms, lambda arm: arm.label_without(key))
    series = [
        Series(name, sorted((_point(values.index(value(a)), a, q) for a in arms), key=lambda p: p.x), (i, i))
        for i, (name, arms) in enumerate(groups.items())
    ]
    x = Axis(key, key, "ordinal", [str(v) for v in values])
    return Plot("x", f"{_capital(q.title)} against {key}", BANDS, x, Axis(q.title, q.key), series)


MAKERS: tuple[Callable[[Study], Sequence[Plot | Heat]], ...] = (
    by_ratio,
    by_cache,
    by_state,
    by_slice,
    by_tokens,
    by_length,
    by_rate,
)
"""In the order of the page."""


def _point(x: float, arm: Arm, measure: Measure) -> Point:
    y = arm.band(measure.of)
    assert y is not None  # every run has the measures of its study
    return Point(x, y, arm.label, {"lr": arm.rate})


def _families(found: Study, arms: Iterable[Arm], point: Callable[[Arm], Point]) -> list[Series]:
    """A series per family, along x."""
    groups = _grouped(arms, lambda arm: arm.family)
    return [
        Series(name, sorted(map(point, group), key=lambda p: p.x), found.style(group[0]))
        for name, group in groups.items()
    ]


def _grouped(arms: Iterable[Arm], key: Callable[[Arm], Key]) -> dict[Key, list[Arm]]:
    groups: dict[Key, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(key(arm), []).append(arm)
    return groups


def _share(arm: Arm) -> Fraction:
    return arm.share or Fraction(0)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _slices(run: Run) -> Mapping[str, float]:
    return run.summary.get(SLICES) or {}


def _sorted(values: Iterable[str]) -> list[str]:
    """Numbers and ranges, 9 before 41-64, by their first number; other text by itself."""

    def place(text: str) -> tuple[float, str]:
        number = re.match(r"-?[\d.]+", text)
        return (float(number[0]) if number else float("inf"), text)

    return sorted(set(values), key=place)


def _mean_slice(arm: Arm, names: Sequence[str]) -> Band | None:
    """Over seeds, of the mean over slices."""
    values = [[x for name in names if (x := _slices(run).get(name)) is not None] for run in arm.best]
    means = [statistics.fmean(found) for found in values if found]
    return band(means) if means else None


def _by_value(
    found: Study, keys: Sequence[str], i: int, ticks: Sequence[str], names: Mapping[tuple[str, ...], str]
) -> Plot:
    """Accuracy against the i-th key of slices, mean over the other one."""
    key, others = keys[i], [k for k in keys if k != keys[i]]
    at = [[name for values, name in names.items() if values[i] == tick] for tick in ticks]
    series = []
    for arm in found.arms:
        bands = [(j, _mean_slice(arm, group)) for j, group in enumerate(at)]
        points = [Point(j, y, facts={"lr": arm.rate}) for j, y in bands if y is not None]
        if points:
            series.append(Series(arm.label, points, found.style(arm)))
    averaged = f" Mean over {others[0]}." if others else ""
    return Plot(
        "_".join(["slice", key, *(["over", *others] if others else [])]),
        f"Accuracy against {key}",
        f"On the parts of the validation data.{averaged} {BANDS}",
        Axis(key, key, "ordinal", ticks),
        Axis("accuracy", "val_accuracy"),
        series,
        marks=_trained(found, key, ticks),
    )


def _trained(of: Study, key: str, ticks: Sequence[str]) -> dict[str, float]:
    """Where the lengths end that were trained on, if all arms agree."""
    lengths = {arm.best[0].seq_len for arm in of.arms}
    ends = [float(found[1]) for tick in ticks if (found := re.fullmatch(r"(?:\d+-)?(\d+)", tick))]
    if key != "length" or len(lengths) > 1 or len(ends) < len(ticks):
        return {}
    within = sum(end <= min(lengths) for end in ends)
    return {"trained up to here": within - 0.5} if 0 < within < len(ticks) else {}


def _heat(
    found: Study, keys: Sequence[str], ticks: Sequence[Sequence[str]], names: Mapping[tuple[str, ...], str]
) -> Heat:
    """A panel per arm: the first key along x, the second along y."""
    panels = []
    for arm in found.arms:
        cells = [[names.get((x, y)) for x in ticks[0]] for y in ticks[1]]
        values = [[None if name is None else _mean_slice(arm, [name]) for name in row] for row in cells]
        if any(y is not None for row in values for y in row):
            panels.append(Panel(arm.label, values))
    return Heat(
        "_".join(["heat", *keys]),
        f"Accuracy by {keys[0]} and {keys[1]}",
        "On the parts of the validation data, mean over seeds.",
        Axis(keys[1], keys[1], "ordinal", ticks[1]),
        Axis(keys[0], keys[0], "ordinal", ticks[0]),
        "val_accuracy",
        panels,
    )


def _curves(found: Study, key: str, title: str) -> list[Plot]:
    """A figure of the records against tokens and against FLOPs."""
    points = {arm.label: _curve(arm, key) for arm in found.arms}
    arms = [arm for arm in found.arms if len(points[arm.label]) > 1]
    top = None
    if "loss" in key:  # that of the first steps says little and would flatten the rest
        late = [y.high for arm in arms for n, y in points[arm.label] if n > 0.1 * points[arm.label][-1][0]]
        top = max(late, default=None)
    several = any(sum(r.get(key) is not None for r in run.records) > BINS for arm in arms for run in arm.best)
    parts = f" Every point is a mean over one of at most {BINS} parts of the run." if several else ""
    x = {
        "tokens": (Axis("training tokens", "tokens", "log"), {arm.label: 1.0 for arm in arms}),
        "flops": (
            Axis("training FLOPs", "flops", "log"),
            {arm.label: arm.cost.train_flops_per_token for arm in arms if arm.cost},
        ),
    }
    notes = {"tokens": "", "flops": " FLOPs: forward and backward, as hydrax.cost counts them."}
    above = "" if top is None else " The first tenth of the training may lie above."
    return [
        Plot(
            f"{key}_{unit}",
            f"{_capital(title.partition(',')[0])} against {axis.title}",
            f"{BANDS}{parts}{above}{notes[unit]}",
            axis,
            Axis(title, key, top=top),
            [
                Series(arm.label, [Point(n * scale[arm.label], y) for n, y in points[arm.label]], found.style(arm))
                for arm in arms
                if arm.label in scale
            ],
        )
        for unit, (axis, scale) in x.items()
        if scale
    ]


def _curve(arm: Arm, key: str) -> list[tuple[float, Band]]:
    """Tokens and band over seeds of a figure, where all seeds have recorded it."""
    steps = [{r["step"]: r[key] for r in run.records if r.get(key) is not None} for run in arm.best]
    shared = sorted(set.intersection(*map(set, steps)))
    size = -(-len(shared) // BINS) or 1
    run = arm.best[0]
    tokens = run.get("train.batch_size") * run.seq_len
    parts = [shared[i : i + size] for i in range(0, len(shared), size)]
    return [
        (tokens * statistics.fmean(part), band(statistics.fmean(s[n] for n in part) for s in steps)) for part in parts
    ]


def _devices(run: Run) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in (run.environment.get("devices") or {}).items())


def _speeds(arm: Arm) -> list[float]:
    return [speed for run in arm.runs if (speed := run.summary.get("tokens_per_second"))]


def _speed(arm: Arm) -> Point:
    speeds = _speeds(arm)
    return Point(arm.best[0].seq_len, Band(statistics.median(speeds), min(speeds), max(speeds), len(speeds)))
