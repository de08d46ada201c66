"""What negative eigenvalues are for: pairs of models that differ in `allow_neg_eigval` alone, on a word problem.

A transition I - β k kᵀ has the eigenvalue 1 - β along k: with β < 1 it only forgets, with β near 2 it flips a sign,
which is parity (arXiv 2411.12537). The models have one layer without convolutions and positions, so that what they know
of the past is in the state or nowhere.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

from hydrax.core.build import ConfigError, build, plain
from hydrax.eval.extrapolation import Curve, Protocol, over, scaled_accuracy
from hydrax.models.spec import ModelConfig
from hydrax.tasks.state_tracking import WordProblem
from hydrax.train.folder import environment

MODEL: dict[str, Any] = {"d_model": 32, "ffn": "none", "tie": False}
OPTIONS: dict[str, Any] = {"heads": 2, "key_dim": 8, "value_dim": 8, "conv_width": 1, "chunk_size": 16}
KINDS = {"with": True, "without": False}
"""Of a pair, by `allow_neg_eigval`."""

Pairs = dict[str, dict[str, ModelConfig]]
Curves = dict[str, dict[str, Curve]]


def pairs(mixers: Sequence[str], problem: WordProblem) -> Pairs:
    """By mixer and kind, models that differ in `allow_neg_eigval`.

    Raises:
      ConfigError: no mixers, or one without that option.
    """
    if not mixers:
        raise ConfigError("mixers", "", "expected names of mixers with the option allow_neg_eigval")

    def model(mixer: str, negative: bool) -> ModelConfig:
        options = {"allow_neg_eigval": negative, **OPTIONS}
        layer = {"pattern": mixer, "vocab_size": problem.vocabulary, "mixers": {mixer: options}}
        return build(ModelConfig, {**MODEL, **layer}, "model")

    return {mixer: {kind: model(mixer, negative) for kind, negative in KINDS.items()} for mixer in mixers}


def compare(
    problem: WordProblem, models: Pairs, protocol: Protocol, record: Callable[[str, str, float], None]
) -> tuple[Curves, dict[str, Any]]:
    """Scaled accuracy by length, mixer and kind; and a summary for JSON. `record` gets mixer, kind and loss."""
    began = time.perf_counter()
    curves = {
        mixer: {
            kind: scaled_accuracy(problem, model, protocol, functools.partial(record, mixer, kind))
            for kind, model in pair.items()
        }
        for mixer, pair in models.items()
    }
    summary = {
        "scaled_accuracy": {
            mixer: {
                kind: {name: over(curve, lengths).round(4).tolist() for name, lengths in protocol.ranges.items()}
                for kind, curve in group.items()
            }
            for mixer, group in curves.items()
        },
        "protocol": plain(dataclasses.asdict(protocol)),
        "model": {**MODEL, "options": OPTIONS},
        "wall_seconds": round(time.perf_counter() - began, 1),
        "environment": environment(),
    }
    return curves, summary
