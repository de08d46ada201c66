"""Optimisers as optax chains over the flat dict of parameters: clip, direction, weight decay, rate."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import jax.numpy as jnp
import optax

from hydrax.core.build import Fraction, NonNegative, NonNegativeFloat, PositiveFloat
from hydrax.models.lm import ParamMeta
from hydrax.train import schedule as schedules

MUON_RMS = 0.2
"""RMS of a Muon update before the rate, that of Adam in practice (arXiv 2502.16982): one rate serves both."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "muon"] = "adamw"  # muon: matrices by Muon, the rest by Adam
    lr: PositiveFloat = 1e-3  # peak
    schedule: schedules.Name = "cosine"
    warmup: NonNegative = 100  # steps
    decay_fraction: Fraction = 0.2  # share of the steps after warmup in which the wsd schedules decay
    final_fraction: Fraction = 0.1  # final rate / peak
    weight_decay: NonNegativeFloat = 0.1  # times the rate, on matrices
    clip: PositiveFloat | None = 1.0  # global gradient norm
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    eps: PositiveFloat = 1e-8
    z_loss: NonNegativeFloat = 1e-4  # weight of lse²
    balance_rate: NonNegativeFloat = 1e-3  # step of the biases that balance experts


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


def make_optimizer(cfg: OptimConfig, steps: int, meta: Mapping[str, ParamMeta]) -> optax.GradientTransformation:
    """p ← p - lr · (direction(clipped gradient) + weight_decay · p), the decay only where `meta.decay`.

    Parameters whose `meta.rule` is "balance" step by `balance_rate` against the sign of their gradient (arXiv
    2408.15664), and count in no norm.
    """
    usual = optax.chain(
        optax.identity() if cfg.clip is None else optax.clip_by_global_norm(cfg.clip),
        _DIRECTIONS[cfg.name](cfg, meta),
        optax.add_decayed_weights(cfg.weight_decay, mask={name: m.decay for name, m in meta.items()}),
        optax.scale_by_learning_rate(make_schedule(cfg, steps)),
    )
    if all(m.rule == "gradient" for m in meta.values()):
        return usual
    balance = optax.chain(optax.stateless_with_tree_map(lambda g, p: jnp.sign(g)), optax.scale(-cfg.balance_rate))
    return optax.partition({"gradient": usual, "balance": balance}, {name: m.rule for name, m in meta.items()})


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
