"""Optimisers as optax chains over the flat dict of parameters: clip, direction, weight decay, rate."""

import dataclasses
import fnmatch
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax

from hydrax.core.build import Check, ConfigError, Fraction, NonNegative, NonNegativeFloat, PositiveFloat, convert
from hydrax.core.typing import PyTree
from hydrax.models.lm import ParamMeta
from hydrax.train import schedule as schedules

MUON_RMS = 0.2
"""RMS of a Muon update before the rate, that of Adam in practice (arXiv 2502.16982): one rate serves both."""


Decay = Annotated[float, Check("a number from 0 to below 1", lambda x: 0 <= x < 1)]
"""Of a running average whose bias is corrected."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "muon"] = "adamw"  # muon: matrices by Muon, the rest by Adam
    lr: PositiveFloat = 1e-3  # peak
    schedule: schedules.Name = "cosine"  # of the rate
    warmup: NonNegative = 100  # steps
    decay_fraction: Fraction = 0.2  # share of the steps after warmup in which the wsd schedules decay
    final_fraction: Fraction = 0.1  # final rate / peak
    weight_decay: NonNegativeFloat = 0.1  # times the rate, on matrices
    clip: PositiveFloat | None = 1.0  # global gradient norm
    spike: PositiveFloat | None = None  # skips steps whose gradient norm is above this times its running mean
    b1: Decay = 0.9  # of Adam's mean of gradients, and of Muon's
    b2: Decay = 0.95  # of the mean of their squares
    eps: PositiveFloat = 1e-8  # on its root
    z_loss: NonNegativeFloat = 1e-4  # weight of lse²
    balance_rate: NonNegativeFloat = 1e-3  # step of the biases that balance experts
    rates: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # factors on the rate, by pattern; 0: frozen

    def __post_init__(self) -> None:
        for pattern, factor in self.rates.items():
            convert(NonNegativeFloat, factor, f"rates.{pattern}")


def make_schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """The rate as a function of the number of updates made."""
    return schedules.make_schedule(
        cfg.schedule,
        peak=cfg.lr,
        steps=steps,
        warmup=cfg.warmup,
        decay_fraction=cfg.decay_fraction,
        final_fraction=cfg.final_fraction,
    )


def factors(cfg: OptimConfig, names: Collection[str]) -> dict[str, float]:
    """What the rate of every parameter is multiplied with: the factor of the first pattern of `rates` that fits, or 1.

    Patterns are those of file names: `*/mixer/*`, `embed/*`.

    Raises:
      ConfigError: a pattern that fits no parameter.
    """
    for pattern in cfg.rates:
        if not fnmatch.filter(names, pattern):
            kinds = ", ".join(sorted({name.rpartition("/")[0] for name in names}))
            raise ConfigError(
                "optim.rates", pattern, f"fits no parameter; expected a pattern such as */mixer/* for {kinds}"
            )
    first = {name: next((p for p in cfg.rates if fnmatch.fnmatchcase(name, p)), None) for name in names}
    return {name: 1.0 if pattern is None else float(cfg.rates[pattern]) for name, pattern in first.items()}


def frozen(cfg: OptimConfig, names: Collection[str]) -> frozenset[str]:
    """The parameters that stay as they are."""
    return frozenset(name for name, factor in factors(cfg, names).items() if factor == 0)


def make_optimizer(cfg: OptimConfig, steps: int, meta: Mapping[str, ParamMeta]) -> optax.GradientTransformation:
    """p ← p - lr · factor · (direction(clipped gradient) + weight_decay · p), the decay only where `meta.decay`.

    Parameters whose `meta.rule` is "balance" step by `balance_rate` against the sign of their gradient (arXiv
    2408.15664), those of "average" by the ratio of the sums and the number in it; both count in no norm. Those with a
    factor of 0 are left alone, and no moments are kept of them.
    """
    scale, still = factors(cfg, meta), frozen(cfg, meta)
    usual = optax.chain(
        optax.identity() if cfg.clip is None else optax.clip_by_global_norm(cfg.clip),
        _DIRECTIONS[cfg.name](cfg, meta),
        optax.add_decayed_weights(cfg.weight_decay, mask={name: m.decay for name, m in meta.items()}),
        optax.scale_by_learning_rate(make_schedule(cfg, steps)),
        *([_scaled(scale)] if cfg.rates else []),
    )
    rules = {name: "frozen" if name in still else m.rule for name, m in meta.items()}
    if set(rules.values()) == {"gradient"}:
        return usual
    balance = optax.chain(optax.stateless_with_tree_map(lambda g, p: jnp.sign(g)), optax.scale(-cfg.balance_rate))
    average = optax.stateless_with_tree_map(lambda g, p: _mean_move(g))
    known = {"gradient": usual, "balance": balance, "average": average, "frozen": optax.set_to_zero()}
    return optax.partition(known, rules)


def _mean_move(g: jax.Array) -> jax.Array:
    """Sums over their number, the last entry; no move where nothing was counted, and none of that entry."""
    number = g[..., -1:]
    move = jnp.where(number > 0, g[..., :-1] / jnp.where(number > 0, number, 1), 0)
    return jnp.concatenate([move, jnp.zeros_like(number)], axis=-1)


def _scaled(factor: Mapping[str, float]) -> optax.GradientTransformation:
    def update(updates: PyTree, params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, u: u * factor[path[0].key], updates)

    return optax.stateless(update)


def _adam(cfg: OptimConfig, meta: Mapping[str, ParamMeta]) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps)


def _muon(cfg: OptimConfig, meta: Mapping[str, ParamMeta]) -> optax.GradientTransformation:
    """Orthogonalised momentum for every `meta.matrix` (dimensions it does not name, such as layers, are batch).

    The rate is -1 because decay and rate follow in the chain; left to itself, optax would take stacked matrices for
    vectors and give them to Adam.
    """
    dimensions = {
        name: None if m.matrix is None else optax.contrib.MuonDimensionNumbers(*m.matrix) for name, m in meta.items()
    }
    return optax.contrib.muon(
        -1.0,
        eps=cfg.eps,
        adam_b1=cfg.b1,
        adam_b2=cfg.b2,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=MUON_RMS,
    )


_DIRECTIONS: dict[str, Callable[[OptimConfig, Mapping[str, ParamMeta]], optax.GradientTransformation]] = {
    "adamw": _adam,
    "muon": _muon,
}
