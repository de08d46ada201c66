"""What a model costs before anything runs: parameters, FLOPs, state and cache bytes, from the layer list alone.

Conventions: 2 FLOPs per multiply-add; a training step is three forward passes (recomputation is not counted); mixing
is counted in its recurrent form (4KV per token and value head for additive states, 6KV for the delta rule), softmax
attention over the mean number of visible keys of a document of `seq_len` tokens.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from hydrax import mixers
from hydrax.core.build import ConfigError
from hydrax.models.lm import blueprint
from hydrax.models.spec import LayerSpec, ModelConfig, group, model_config, resolve


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """One layer: `flops` forward per token, `state_bytes` (fixed) or `kv_bytes` (growing) of one decoded sequence."""

    block: str
    mixer: str
    parameters: int
    flops: float
    state_bytes: int
    kv_bytes: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """Totals of a model; `state_bytes` and `kv_bytes` are for the whole batch at `seq_len` tokens."""

    seq_len: int
    batch: int
    parameters: int
    embedding_parameters: int
    flops_per_token: float
    state_bytes: int
    kv_bytes: int
    layers: tuple[LayerCost, ...]

    @property
    def train_flops_per_token(self) -> float:
        """Forward and backward."""
        return 3 * self.flops_per_token


def cost(cfg: ModelConfig | Mapping[str, Any], *, seq_len: int, batch: int = 1, itemsize: int = 2) -> Cost:
    """The cost of a model at a sequence length.

    Args:
      cfg: the model; a dict or ConfigDict of `ModelConfig` fields will do.
      seq_len: tokens of a document, which softmax attention and its cache depend on.
      batch: sequences decoded together.
      itemsize: bytes per cached element that is not an fp32 state (2 = bf16).

    Raises:
      ConfigError: `seq_len` or `batch` below 1.
    """
    for key, value in (("seq_len", seq_len), ("batch", batch)):
        if value < 1:
            raise ConfigError(key, value, "expected an integer >= 1")
    cfg = model_config(cfg)
    plan = blueprint(cfg)
    sizes = {path: math.prod(s.shape) for path, s in plan.shapes.items()}
    matrices = {path: sizes[path] for path, meta in plan.meta.items() if meta.matrix is not None}
    layers: list[LayerCost] = []
    for g_index, g in enumerate(group(resolve(cfg))):
        period = []
        for i, spec in enumerate(g.period):
            prefix = f"periods/{g_index}/blocks/{i}/"
            parameters, weights = (
                sum(n for path, n in table.items() if path.startswith(prefix)) // g.repeats
                for table in (sizes, matrices)
            )
            period.append(_layer(spec, parameters, weights, seq_len, itemsize))
        layers += period * g.repeats
    rows = sizes["embed/weight"]
    return Cost(
        seq_len=seq_len,
        batch=batch,
        parameters=sum(sizes.values()),
        embedding_parameters=rows if cfg.tie else 2 * rows,
        flops_per_token=sum(layer.flops for layer in layers) + 2 * rows,
        state_bytes=batch * sum(layer.state_bytes for layer in layers),
        kv_bytes=batch * sum(layer.kv_bytes for layer in layers),
        layers=tuple(layers),
    )


def _layer(spec: LayerSpec, parameters: int, weights: int, seq_len: int, itemsize: int) -> LayerCost:
    row = mixers.row(spec.mixer)
    held, growing = row.state_bytes(spec.options, seq_len, itemsize), row.grows(spec.options)
    return LayerCost(
        block=spec.block,
        mixer=spec.mixer,
        parameters=parameters,
        flops=2 * weights + row.flops(spec.options, seq_len),
        state_bytes=0 if growing else held,
        kv_bytes=held if growing else 0,
    )
