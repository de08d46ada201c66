"""How layers of two modes read each token (Oryx, arXiv 2605.28769): 1 by attention, 0 by their recurrence.

A schedule gives modes [B,T] to the documents of a batch. Chunks of `chunk` tokens are counted inside each document (a
segment of a row, its prefix included) from 0, so that none holds tokens of two documents; padding has mode 0.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from hydrax.core.build import ConfigError, Fraction, Positive

Draw = Callable[[int, np.ndarray], np.ndarray]
"""(which, distance [B,T]) -> the number in [0, 1) drawn for the token that far to the left of each, [B,T]."""


@dataclasses.dataclass(frozen=True)
class ModesConfig:
    """The schedules:

    none: no modes, layers of two modes choose for themselves.
    attn, linear: every token by attention, every token by the recurrence.
    bernoulli: each chunk by attention with probability `fraction`.
    mixed: each chunk by attention with a probability of its document: 0, 1 or one between, with probability 1/3 each.
    last: the last `last` tokens of each document by attention. For prompts: in training it gives the end away.
    chunks: chunk c by attention where c mod `every` = `every` - 1.
    """

    schedule: Literal["none", "attn", "linear", "bernoulli", "mixed", "last", "chunks"] = "none"
    fraction: Fraction = 0.5
    chunk: Positive = 256  # tokens
    last: Positive = 256  # tokens
    every: Positive = 4  # chunks


def modes(
    cfg: ModesConfig, batch: Mapping[str, np.ndarray], numbers: np.ndarray, *, seed: int = 0
) -> np.ndarray | None:
    """Modes int32 [B,T] of a batch with `segment_ids` and `positions`; None where the schedule is "none".

    Row b is a function of its documents and of (seed, numbers[b]) alone, numbers >= 0 of any size.
    """
    if cfg.schedule == "none":
        return None
    segments, positions = batch["segment_ids"], batch["positions"]
    width = segments.shape[1]

    def draw(which: int, distance: np.ndarray) -> np.ndarray:
        uniform = np.stack([np.random.default_rng((seed, int(n), which)).random(width) for n in numbers])
        return np.take_along_axis(uniform, np.arange(width) - distance, axis=1)

    attention = _SCHEDULES[cfg.schedule](cfg, segments, positions, draw)
    return np.where(segments > 0, attention, False).astype(np.int32)


def prompt_modes(cfg: ModesConfig, lengths: np.ndarray, width: int, *, seed: int = 0) -> np.ndarray | None:
    """Modes int32 [B,width] of prompts of `lengths` [B] tokens (the prefix included), each one document."""
    index = np.broadcast_to(np.arange(width), (len(lengths), width))
    real = index < np.asarray(lengths)[:, None]
    batch = {"segment_ids": real.astype(np.int32), "positions": np.where(real, index, 0)}
    return modes(cfg, batch, np.arange(len(lengths)), seed=seed)


def token_modes(cfg: ModesConfig, positions: np.ndarray) -> np.ndarray | None:
    """Modes int32 [B,1] of one generated token per row, at `positions` [B] of its document.

    Raises:
      ConfigError: a schedule that needs more than the position.
    """
    if cfg.schedule in ("bernoulli", "mixed", "last"):
        allowed = "expected none, attn, linear or chunks for generated tokens"
        raise ConfigError("schedule", cfg.schedule, allowed)
    positions = np.asarray(positions)[:, None]
    batch = {"segment_ids": np.ones_like(positions), "positions": positions}
    return modes(cfg, batch, np.zeros(len(positions), int))


def _bernoulli(cfg: ModesConfig, segments: np.ndarray, positions: np.ndarray, draw: Draw) -> np.ndarray:
    return draw(0, positions % cfg.chunk) < cfg.fraction


def _mixed(cfg: ModesConfig, segments: np.ndarray, positions: np.ndarray, draw: Draw) -> np.ndarray:
    kind = 3 * draw(1, positions)
    fraction = np.select([kind < 1, kind < 2], [0.0, 1.0], kind - 2)
    return draw(0, positions % cfg.chunk) < fraction


def _last(cfg: ModesConfig, segments: np.ndarray, positions: np.ndarray, draw: Draw) -> np.ndarray:
    width = segments.shape[1]
    ends = np.diff(segments, axis=1, append=-1) != 0
    end = np.where(ends, np.arange(width), width)[:, ::-1]
    return np.minimum.accumulate(end, axis=1)[:, ::-1] - np.arange(width) < cfg.last


def _chunks(cfg: ModesConfig, segments: np.ndarray, positions: np.ndarray, draw: Draw) -> np.ndarray:
    return positions // cfg.chunk % cfg.every == cfg.every - 1


_SCHEDULES: Mapping[str, Callable[[ModesConfig, np.ndarray, np.ndarray, Draw], np.ndarray]] = {
    "attn": lambda cfg, segments, positions, draw: np.ones_like(segments),
    "linear": lambda cfg, segments, positions, draw: np.zeros_like(segments),
    "bernoulli": _bernoulli,
    "mixed": _mixed,
    "last": _last,
    "chunks": _chunks,
}
