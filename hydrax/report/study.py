"""What a set of runs compares: its arms, what was measured, and the best learning rate of every arm.

An arm is all runs whose configs agree but for learning rate and seeds. Of an arm, plots show the learning rate whose
mean over seeds is best, among those with most finished seeds, so that a seed which diverged counts against its rate.
"""

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from hydrax.models.cost import Cost
from hydrax.report import labels
from hydrax.report.read import Run

RATE = "optim.lr"
REPEATS = (RATE, "train.seed", "data.seed")
"""Keys in which the runs of one arm may differ."""

COLOURS = 7
"""As many as are easily told apart."""

NEUTRAL = re.compile(
    r"mesh\.|sample\.|data\.threads|model\.impl"
    r"|train\.(trace|save|keep|log_every|eval_every|watchdog|remat|unroll|tensorboard|wandb|accumulate|max_skipped)"
)
"""Keys, by how they begin, that change neither what is learnt nor what it is compared by."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure of summary.json or of an evaluation, and what to call it."""

    key: str
    title: str
    higher: bool  # is better

    def of(self, run: Run) -> float | None:
        value = run.summary.get(self.key, run.evaluated.get(self.key))
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


MEASURES = (
    Measure("val_accuracy", "accuracy", True),
    Measure("val_sequence_accuracy", "sequence accuracy", True),
    Measure("val_bits_per_byte", "validation bits per byte", False),
    Measure("val_loss", "validation loss, nats per target", False),
)
"""The first of these that every run has is the one by which arms are compared."""

EVALUATED = {
    r"recall_slices(:\d+)?/hits/loss": ("loss on recall hits, nats per target", False),
    r"recall_slices(:\d+)?/others/loss": ("loss on other targets, nats per target", False),
    r"recall_slices(:\d+)?/hits/accuracy": ("accuracy on recall hits", True),
    r"recall:(?P<name>.+)/contains": ("facts of {name} recalled", True),
    r"lm_eval:(?P<name>.+)/acc": ("accuracy on {name}", True),
    r"task(:(?P<name>\w+).*)?/accuracy": ("accuracy on {name}", True),
}
"""Figures of evaluations that reports show: a pattern of their paths, what to call them, whether higher is better."""


@dataclasses.dataclass(frozen=True)
class Band:
    """Mean, lowest and highest over seeds."""

    mean: float
    low: float
    high: float
    seeds: int


def band(values: Iterable[float]) -> Band:
    found = list(values)
    return Band(statistics.fmean(found), min(found), max(found), len(found))


@dataclasses.dataclass(frozen=True)
class Arm:
    """Runs that differ in learning rate and seeds alone.

    `family` is the label without settings that are numbers: arms of one family are one thing in several sizes.
    """

    label: str
    model: str  # the label of its pattern
    family: str
    settings: Mapping[str, Any]
    words: Mapping[str, str]  # the label's parts, by key
    by_rate: Mapping[float, Sequence[Run]]
    rate: float  # the best one
    share: Fraction | None  # of full attention
    recurrent: str  # the mixers that are not full attention

    @property
    def best(self) -> Sequence[Run]:
        """The seeds of the best rate."""
        return self.by_rate[self.rate]

    @property
    def runs(self) -> list[Run]:
        return [run for runs in self.by_rate.values() for run in runs]

    @property
    def cost(self) -> Cost | None:
        return self.best[0].cost

    def label_without(self, key: str, model: str = "") -> str:
        """The label without a setting, after `model`, a name for the model where the setting is its pattern."""
        words = [word for k, word in self.words.items() if k != key]
        return ", ".join(filter(None, [model, *words])) or (self.model if key != labels.PATTERN else "all arms")

    def band(self, measure: Callable[[Run], float | None], rate: float | None = None) -> Band | None:
        """Of a figure over the seeds of a rate; None if none of them has it."""
        values = [x for run in self.by_rate[self.rate if rate is None else rate] if (x := measure(run)) is not None]
        return band(values) if values else None


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms, in the order of their labels' patterns, and the measures and evaluations that all of their runs have."""

    arms: Sequence[Arm]
    measures: Sequence[Measure]
    evaluated: Sequence[Measure]
    varied: Sequence[str]  # keys in which arms differ
    told: Sequence[str]  # those of them that tell the arms apart
    common: Mapping[str, Any]  # keys and values that all runs have in common

    @property
    def quality(self) -> Measure:
        return self.measures[0]

    def style(self, arm: Arm) -> tuple[int, int]:
        """The numbers of its colour, and of its marker and line style.

        A colour per family while these are few, else one per recurrent mixer.
        """
        families = list(dict.fromkeys(a.family for a in self.arms))
        if len(families) <= COLOURS:
            return families.index(arm.family), self.arms.index(arm)
        mixers = list(dict.fromkeys(a.recurrent for a in self.arms))
        return mixers.index(arm.recurrent), self.arms.index(arm)

    def measure(self, key: str) -> Measure | None:
        return next((m for m in self.measures if m.key == key), None)


def study(runs: Sequence[Run]) -> Study:
    """The arms of runs that have a measure in common; see `comparable`."""
    flat = [_leaves(run) for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    varied = [k for k in keys if len({json.dumps(v.get(k)) for v in flat}) > 1]
    settings = [k for k in varied if k not in REPEATS and not NEUTRAL.match(k)]
    measures = [m for m in MEASURES if all(m.of(run) is not None for run in runs)]
    groups: dict[str, list[tuple[Run, dict[str, Any]]]] = {}
    for run, values in zip(runs, flat, strict=True):
        own = {key: values.get(key) for key in settings}
        groups.setdefault(json.dumps(own), []).append((run, own))
    members = list(groups.values())
    told = labels.telling([own for (_, own), *_ in members], _ordered(settings))
    patterns = labels.of_models({run.get(labels.PATTERN): run.layers for (run, _), *_ in members})
    arms = [_arm([run for run, _ in group], group[0][1], told, patterns, measures[0]) for group in members]
    common = {key: flat[0][key] for key in keys if key not in varied}
    return Study(sorted(arms, key=_place), measures, _evaluated(runs), settings, told, common)


def _evaluated(runs: Sequence[Run]) -> list[Measure]:
    """In the order of the table."""
    common = [key for key in runs[0].evaluated if all(key in run.evaluated for run in runs)]
    return [
        Measure(key, title.format(**found.groupdict(default="the task")), higher)
        for pattern, (title, higher) in EVALUATED.items()
        for key in common
        if (found := re.fullmatch(pattern, key))
    ]


def by_task(runs: Sequence[Run], x: str | None = None) -> dict[str, list[Run]]:
    """The runs of every task, by what tells it from the others but for the key `x`; arms of one task are comparable.

    One entry, without a name, where all runs have the same or read text.
    """
    of = [{k: v for k, v in _leaves(run).items() if k.startswith("data.task") and k != x} for run in runs]
    told = labels.telling(of, list(dict.fromkeys(key for own in of for key in own)))
    groups: dict[str, list[Run]] = {}
    for run, own in zip(runs, of, strict=True):
        groups.setdefault(", ".join(filter(None, (labels.of_setting(k, own.get(k)) for k in told))), []).append(run)
    return groups


def comparable(runs: Sequence[Run]) -> list[Run]:
    """The runs that have the measure which most of them have, so that one that diverged does not end the report."""
    counts = {m: sum(m.of(run) is not None for run in runs) for m in MEASURES}
    best = max(MEASURES, key=lambda m: counts[m])
    return [run for run in runs if best.of(run) is not None]


def _arm(
    runs: list[Run], own: Mapping[str, Any], told: Sequence[str], patterns: Mapping[str, str], quality: Measure
) -> Arm:
    by_rate: dict[float, list[Run]] = {}
    for run in sorted(runs, key=lambda r: (r.get(RATE), r.get("train.seed") or 0, r.name)):
        by_rate.setdefault(run.get(RATE), []).append(run)
    most = max(map(len, by_rate.values()))
    sign = 1 if quality.higher else -1
    means = {
        rate: sign * statistics.fmean(x for run in seeds if (x := quality.of(run)) is not None)
        for rate, seeds in by_rate.items()
        if len(seeds) == most
    }
    model, layers = patterns[runs[0].get(labels.PATTERN)], runs[0].layers
    words = {k: model if k == labels.PATTERN else labels.of_setting(k, own[k]) for k in told}
    coarse = [w for k, w in words.items() if isinstance(own[k], (str, bool))]
    return Arm(
        label=", ".join(filter(None, words.values())) or model,
        model=model,
        family=", ".join(filter(None, coarse)) or model,
        settings=own,
        words=words,
        by_rate=by_rate,
        rate=max(means, key=lambda rate: means[rate]),
        share=labels.full_share(layers),
        recurrent=labels.recurrent(layers),
    )


def _place(arm: Arm) -> tuple[Any, ...]:
    """By mixers, from no attention to attention alone, then by size."""
    return (not arm.recurrent, arm.recurrent, arm.share or 0, arm.family, _size(arm), arm.label)


def _size(arm: Arm) -> tuple[float, ...]:
    return tuple(v for v in arm.settings.values() if isinstance(v, (int, float)))


def _ordered(keys: Sequence[str]) -> list[str]:
    """The pattern first, then the rest of the model, then the rest."""
    return sorted(keys, key=lambda k: (k != labels.PATTERN, not k.startswith("model.")))


def _leaves(run: Run) -> dict[str, Any]:
    """The config by dotted keys, without the options of mixers that the model does not have."""
    used = set(re.findall(r"\w+", json.dumps([run.get(labels.PATTERN), run.get("model.blocks")])))
    flat = dict(_flatten(run.config))
    return {k: v for k, v in flat.items() if not k.startswith("model.mixers.") or k.split(".")[2] in used}


def _flatten(values: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flatten(value, f"{path}.{key}" if path else key)
    else:
        yield path, values
