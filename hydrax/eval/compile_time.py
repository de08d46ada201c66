"""Time to compile a training step: it follows the period of the layers, not their number, since periods are scanned."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from hydrax.eval import training
from hydrax.eval.layer import uncached
from hydrax.eval.timing import isolated
from hydrax.models.spec import resolve
from hydrax.train.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Row:
    """A model: seconds of every sample, the best of them, and that beside the best of the first model."""

    pattern: str
    layers: int
    seconds: list[float]
    best: float
    ratio: float


def compare(cfgs: Sequence[RunConfig], repeats: int, record: Callable[[RunConfig, float], None]) -> list[Row]:
    """A row per run. Samples alternate, so that other processes meet all models alike; each has a new process."""
    samples: list[list[float]] = [[] for _ in cfgs]
    for _ in range(repeats):
        for own, cfg in zip(samples, cfgs, strict=True):
            own.append(isolated(compile_seconds, cfg))
            record(cfg, own[-1])
    best = [min(own) for own in samples]
    return [
        Row(cfg.model.pattern, len(resolve(cfg.model)), own, low, low / best[0])
        for cfg, own, low in zip(cfgs, samples, best, strict=True)
    ]


def compile_seconds(cfg: RunConfig) -> float:
    """Seconds from a config to its training step in fp32, traced and compiled, in this process and without a cache."""
    began = time.perf_counter()
    with uncached():
        training.compiled(cfg, jnp.float32)
    return time.perf_counter() - began
