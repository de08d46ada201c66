"""What a model costs before anything runs: parameters, FLOPs, state and cache bytes, from the layer list alone.

Conventions: 2 FLOPs per multiply-add; a training step is three forward passes (recomputation is not counted); mixing
is counted in its recurrent form (4KV per token and value head for additive states, 6KV for the delta rule), softmax
attention over the mean number of visible keys of a document of `seq_len` tokens. Layers count once per pass of a loop,
common weights in every layer that uses them, low-rank changes as products of their own, and of experts those that a
token is sent to. modes(...) and route(...) compute both their parts. A prefix is run with every document, and its
tokens pay for it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from hydrax.core.build import ConfigError
from hydrax.models.layers import Group, LayerSpec, groups
from hydrax.models.lm import Blueprint, blueprint
from hydrax.models.mix import Mix
from hydrax.models.spec import ModelConfig, model_config, sections
from hydrax.nn import memory, moe


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """One layer: `flops` forward per token, `state_bytes` (fixed) or `kv_bytes` (growing) of one decoded sequence.

    All `passes` of a loop are in these. `parameters` are its own; those it has in common with others are
    `Cost.shared_parameters`.
    """

    block: str
    mixer: str
    passes: int
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
    active_parameters: int  # without the experts and the values of memories that a token does not use
    embedding_parameters: int
    shared_parameters: int  # of blocks that several layers use
    flops_per_token: float
    state_bytes: int
    kv_bytes: int
    layers: tuple[LayerCost, ...]

    @property
    def train_flops_per_token(self) -> float:
        """Forward and backward."""
        return 3 * self.flops_per_token

    @property
    def cache_bytes(self) -> int:
        """All that decoding keeps at `seq_len` tokens."""
        return self.state_bytes + self.kv_bytes


def cost(cfg: ModelConfig | Mapping[str, Any], *, seq_len: int, batch: int = 1, itemsize: int = 2) -> Cost:
    """The cost of a model at a sequence length.

    Args:
      cfg: the model; a dict or ConfigDict of `ModelConfig` fields will do.
      seq_len: tokens of a document, which softmax attention and its cache depend on; a prefix comes on top.
      batch: sequences decoded together.
      itemsize: bytes per cached element that is not an fp32 state (2 = bf16).

    Raises:
      ConfigError: `seq_len` or `batch` below 1.
    """
    for key, value in (("seq_len", seq_len), ("batch", batch)):
        if value < 1:
            raise ConfigError(key, value, "expected an integer >= 1")
    cfg = model_config(cfg)
    placed = [(section, group) for section in sections(cfg) for group in groups(section)]
    parameters = _Parameters(cfg, blueprint(cfg), [group for _, group in placed])
    layers: list[LayerCost] = []
    for j, (section, group) in enumerate(placed):
        times = [n for n, _ in section.passes]
        period = [
            _layer(cfg, list(zip(times, passes, strict=True)), parameters.layer(j, i, group), seq_len, itemsize)
            for i, passes in enumerate(zip(*group.variants, strict=True))
        ]
        layers += period * group.repeats
    rows = parameters.sizes["embed/weight"]
    last = 0 if cfg.final_norm is None else 4 * 2 * cfg.final_groups  # its mean and variance
    return Cost(
        seq_len=seq_len,
        batch=batch,
        parameters=sum(parameters.sizes.values()),
        active_parameters=sum(parameters.used.values()),
        embedding_parameters=rows if cfg.tie else 2 * rows,
        shared_parameters=sum(n for path, n in parameters.sizes.items() if path.startswith("shared/")),
        flops_per_token=sum(layer.flops for layer in layers) + 2 * rows,
        state_bytes=batch * (sum(layer.state_bytes for layer in layers) + last),
        kv_bytes=batch * sum(layer.kv_bytes for layer in layers),
        layers=tuple(layers),
    )


class _Parameters:
    """How many parameters there are under every path, and how many of them a token uses."""

    def __init__(self, cfg: ModelConfig, plan: Blueprint, found: list[Group]):
        self.sizes = {path: math.prod(s.shape) for path, s in plan.shapes.items()}
        self.used = dict(self.sizes)
        self.matrices = {path for path, meta in plan.meta.items() if meta.matrix is not None}
        for place, spec in ((_place(j, i, spec), spec) for j, g in enumerate(found) for i, spec in enumerate(g.period)):
            if spec.moe is not None:
                self._share(f"{place}moe/experts/", spec.moe.top_k, spec.moe.experts)
            if spec.memory and cfg.memory.pkm is not None:
                self._share(f"{place}pkm/values", cfg.memory.pkm.top_k, cfg.memory.pkm.rows**2)

    def _share(self, prefix: str, used: int, of: int) -> None:
        self.used |= {path: n * used // of for path, n in self.sizes.items() if path.startswith(prefix)}

    def layer(self, j: int, i: int, group: Group) -> tuple[int, int]:
        """Layer i of period j: parameters of its own, and entries of all matrices that a token is multiplied with."""
        spec, own = group.period[i], f"periods/{j}/blocks/{i}/"
        common = {_place(j, i, spec)} - {own} | ({f"shared/{spec.feed.block}/"} if spec.feed else set())
        parameters = sum(n for path, n in self.sizes.items() if path.startswith(own)) // group.repeats
        return parameters, self._entries(own) // group.repeats + sum(map(self._entries, common))

    def _entries(self, prefix: str) -> int:
        return sum(self.used[path] for path in self.matrices if path.startswith(prefix))


def _place(j: int, i: int, spec: LayerSpec) -> str:
    """Where the parameters of layer i of period j are."""
    return f"shared/{spec.block}/" if spec.shared else f"periods/{j}/blocks/{i}/"


def _layer(
    cfg: ModelConfig, passes: list[tuple[int, LayerSpec]], count: tuple[int, int], seq_len: int, itemsize: int
) -> LayerCost:
    """A layer, as it is in each run of passes of a loop. Every pass has a state, of the size that the widest needs."""
    (parameters, entries), spec = count, passes[0][1]
    length, loops = cfg.prefix.meta_tokens + seq_len, sum(n for n, _ in passes)
    held = [[mix.nbytes(length, itemsize) for mix in _mixes(own)] for _, own in passes]
    fixed, growing = (max(sum(sizes[i] for sizes in mixes) for mixes in held) for i in (0, 1))
    flops = sum(n * (2 * entries + _mixing(cfg, own, length)) for n, own in passes)
    return LayerCost(
        block=spec.block,
        mixer=spec.mixer,
        passes=loops,
        parameters=parameters,
        flops=flops * length / seq_len,
        state_bytes=loops * (fixed + _beside(cfg, spec, itemsize)),
        kv_bytes=loops * growing,
    )


def _mixes(spec: LayerSpec) -> list[Mix]:
    """What mixes tokens in a layer: its own mixer, and that of a common block which feeds it."""
    return [spec.mix] if spec.feed is None else [spec.mix, spec.feed.mix]


def _mixing(cfg: ModelConfig, spec: LayerSpec, length: int) -> float:
    """Forward FLOPs per token of all that is no product with a matrix of `_Parameters`."""
    beside = [spec.moe] + ([cfg.memory.workspace, cfg.memory.pkm] if spec.memory else [])
    return sum(mix.flops(length) for mix in _mixes(spec)) + sum(part.flops(cfg.d_model) for part in beside if part)


def _beside(cfg: ModelConfig, spec: LayerSpec, itemsize: int) -> int:
    """Bytes of what a layer remembers beside its mixers."""
    router = 0 if spec.moe is None else moe.state_bytes(spec.moe, cfg.d_model, itemsize)
    workspace = cfg.memory.workspace if spec.memory else None
    return router + (0 if workspace is None else memory.state_bytes(workspace, cfg.d_model, itemsize))
