"""Arms of a comparison under one budget: different models, made equal in parameters, FLOPs or bytes of the cache.

One integer of a model, its knob, is turned until the model costs what another does. Nothing else changes, so that what
the arms differ in is what one wanted to compare, and that integer.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydrax.core.build import ConfigError, build, override
from hydrax.models.cost import Cost, cost
from hydrax.models.spec import ModelConfig, resolve

MEASURES: dict[str, Callable[[Cost], float]] = {
    "parameters": lambda c: c.parameters,
    "active": lambda c: c.active_parameters,
    "flops": lambda c: c.flops_per_token,
    "cache": lambda c: c.cache_bytes,
}
"""What arms may be equal in."""

STEPS = {"d_model": 8, "ffn_dim": 8, "inner_dim": 8, "width": 8, "key_dim": 2, "value_dim": 2}
"""Name of a knob -> what its values are multiples of; 1 if not here. Widths suit tiles, head widths rotations."""

CACHE_KNOBS = ("window", "slots", "kv_rank", "key_dim", "value_dim")
"""Options that set the size of a mixer's state, the first that it has."""

TOLERANCE = 0.02
"""Relative difference that may remain between arms."""

REACH = 16
"""How far beyond a known value the search looks at once, as a factor."""

LIMIT = 128
"""How many invalid values on either side it passes over."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """A model and its cost; `difference` is relative to the arm that it is compared with."""

    config: ModelConfig
    cost: Cost
    difference: float = 0.0
    knob: str | None = None  # None: the model as it was given
    value: int | None = None


def arms(
    models: Sequence[ModelConfig],
    what: str = "none",
    knob: str | None = None,
    *,
    seq_len: int,
    batch: int = 1,
    tolerance: float = TOLERANCE,
) -> list[Arm]:
    """The models and what they cost, all but the first matched to the first; `what` none leaves them as they are.

    The difference is that in `what`, or in parameters. The rest is as in `match`, and so are the errors.
    """
    if what not in ("none", *MEASURES):
        raise ConfigError("match", what, f"expected one of none, {', '.join(MEASURES)}")
    if what != "none" and len(models) < 2:
        raise ConfigError("match", what, "expected another model to be matched to the first")
    if what == "none" and knob is not None:
        raise ConfigError("knob", knob, f"needs match = one of {', '.join(MEASURES)}")
    first = Arm(models[0], cost(models[0], seq_len=seq_len, batch=batch))
    if what != "none":
        return [first, *(match(cfg, first.cost, what, knob, tolerance=tolerance) for cfg in models[1:])]
    others = [(cfg, cost(cfg, seq_len=seq_len, batch=batch)) for cfg in models[1:]]
    return [first, *(Arm(cfg, own, own.parameters / first.cost.parameters - 1) for cfg, own in others)]


def match(
    cfg: ModelConfig, reference: Cost, what: str, knob: str | None = None, *, tolerance: float = TOLERANCE
) -> Arm:
    """The model with that value of `knob` for which it costs most nearly what `reference` says.

    Args:
      reference: the cost to meet, at its length and batch.
      what: a key of `MEASURES`.
      knob: a dotted integer key of the model, e.g. "ffn_dim" or "mixers.attn.kv_heads"; see `default_knob`. Multiples
        of its `STEPS` are tried, and those that are no valid config are passed over.
      tolerance: relative difference that may remain.

    Raises:
      ConfigError: an unknown `what` or `knob`, a knob that changes nothing, or none of its values within `tolerance`.
    """
    if what not in MEASURES:
        raise ConfigError("match", what, f"expected one of {', '.join(MEASURES)}")
    knob = (knob or default_knob(cfg, what, reference.seq_len)).removeprefix("model.")
    target = MEASURES[what](reference)
    value, config, found = _Search(cfg, knob, what, reference).closest()
    difference = MEASURES[what](found) / target - 1
    if abs(difference) > tolerance:
        allowed = f"the closest value, {difference:+.1%} {what}; expected one within {tolerance:.0%}, or another knob"
        raise ConfigError(f"model.{knob}", value, allowed)
    return Arm(config, found, difference, knob, value)


def default_knob(cfg: ModelConfig, what: str, seq_len: int) -> str:
    """`ffn_dim`; for the cache, that option which sets the state of the mixer that keeps most at that length."""
    if what != "cache":
        return "ffn_dim"
    held: dict[str, int] = {}
    options = {}
    for single in (single for layer in resolve(cfg) for single in layer.mix.singles()):
        held[single.mixer] = held.get(single.mixer, 0) + sum(single.nbytes(seq_len, 2))
        options[single.mixer] = single.options
    most = max(held, key=lambda mixer: held[mixer])
    name = next((name for name in CACHE_KNOBS if hasattr(options[most], name)), CACHE_KNOBS[-1])
    return f"mixers.{most}.{name}"


class _Search:
    """For the value of a knob at which a measure, monotone in it, is closest to a target.

    An evaluation takes a fraction of a second, so there should be few: the line through two of them says where to look
    next, and the (geometric) middle of the interval does where that does not halve it.
    """

    def __init__(self, cfg: ModelConfig, knob: str, what: str, reference: Cost):
        self.knob, self.reference, self.measure = knob, reference, MEASURES[what]
        self.target = self.measure(reference)
        self.step = STEPS.get(knob.split(".")[-1], 1)
        self.values = dataclasses.asdict(cfg)
        self.models: dict[int, ModelConfig] = {}
        self.errors: dict[int, ConfigError] = {}
        self.costs: dict[int, Cost] = {}
        self.found: dict[int, float] = {}

    def closest(self) -> tuple[int, ModelConfig, Cost]:
        """The value, and the model with it; raises `ConfigError` if none is valid or all of them measure the same."""
        rising, width = self._start(), math.inf
        while self.target not in self.found.values():
            low = max((n for n, f in self.found.items() if (f < self.target) == rising), default=0)
            high = min((n for n, f in self.found.items() if (f < self.target) != rising), default=REACH * low)
            between = low in self.found and high in self.found
            guess = math.sqrt(low * high) if between and high - low > width / 2 else self._line(low, high, between)
            value = None if guess is None else self._valid(guess, low, high)
            if value is None:
                break
            self._try(value)
            width = high - low if between else math.inf
        best = min(self.found, key=lambda n: (abs(self.found[n] - self.target), n))
        return best, self.models[best], self.costs[best]

    def _start(self) -> bool:
        """Measures two values that differ, and tells whether the larger one measures more."""
        start = self._valid(self._given(), 0, REACH * self._given() + self.step)
        if start is None:
            raise next(iter(self.errors.values()))
        self._try(start)
        others = [(2 * start, start, REACH * start)]
        others += [(start >> k, 0, start) for k in range(1, start.bit_length())]
        for guess, low, high in others:
            other = self._valid(guess, low, high)
            if other is not None and self._try(other) != self.found[start]:
                return (other > start) == (self.found[other] > self.found[start])
        raise ConfigError(f"model.{self.knob}", start, "it changes nothing here; expected another knob")

    def _given(self) -> int:
        """The value in the config as given, else the smallest."""
        node: Any = self.values
        for name in self.knob.split("."):
            node = node.get(name) if isinstance(node, Mapping) else None
        return node if type(node) is int and node > 0 else self.step

    def _line(self, low: int, high: int, between: bool) -> float | None:
        """Where the line through the two values next to the target meets it; None if both measure the same."""
        known = sorted(self.found)
        a, b = (low, high) if between else known[-2:] if low else known[:2]
        slope = (self.found[b] - self.found[a]) / (b - a)
        return a + (self.target - self.found[a]) / slope if slope else None

    def _valid(self, guess: float, low: int, high: int) -> int | None:
        """The valid value between two others that is nearest to a guess."""
        first, last = low // self.step + 1, -(-high // self.step) - 1
        near = min(max(round(guess / self.step), first), last)
        around = sorted(range(max(first, near - LIMIT), min(last, near + LIMIT) + 1), key=lambda m: abs(m - near))
        return next((m * self.step for m in around if self._is_valid(m * self.step)), None)

    def _is_valid(self, value: int) -> bool:
        if value not in self.models and value not in self.errors:
            values = {"model": copy.deepcopy(self.values)}
            try:
                override(values, f"model.{self.knob}", value)
                self.models[value] = build(ModelConfig, values["model"], "model")
            except ConfigError as error:
                self.errors[value] = error
        return value in self.models

    def _try(self, value: int) -> float:
        self.costs[value] = cost(self.models[value], seq_len=self.reference.seq_len, batch=self.reference.batch)
        self.found[value] = self.measure(self.costs[value])
        return self.found[value]
