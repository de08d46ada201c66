"""Sliding-window attention, and other static patterns in which each key is visible up to a last query.

By default a query sees the last `window` keys, its own included. What lies outside the window may stay visible through
the first tokens of the document (`sink_tokens`, arXiv 2309.17453), or be replaced by a learned empty key per head
(`sinks`, 2508.10925). Other patterns, one per head of keys, are those of `ops.sparse.lifetimes`:

    gna              windows that `gna.stride` queries share, dilated by `gna.dilation` (2504.16922, 2403.04690)
    s2               some local blocks and every n-th block of all, another one in each head (2407.17678)
    shifted_groups   groups of `window` tokens, shifted by half in some heads (2309.12307, 2406.05678)
    spans            a span of blocks of its own for every head and layer (MoA, 2406.14909)
    log_bands        density halves each time the distance doubles (2506.19852)
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import Check, ConfigError, NonNegative, Positive, convert
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, SoftmaxConfig, SoftmaxMixer
from hydrax.nn.attention import QKV
from hydrax.nn.param import param
from hydrax.ops.sparse.lifetimes import LogBands, Neighbourhood, Pattern, ShiftedGroups, Spans, Strided, Window

Half = Annotated[float, Check("a number from 0 to 0.5", lambda x: 0 <= x <= 0.5)]
Rules = tuple[tuple[tuple[float, float], ...], ...]
"""(α, β) of every head of keys, for every layer, or for all layers alike."""


@dataclasses.dataclass(frozen=True)
class GNA:
    stride: Positive = 1  # queries that share the window of the last of them
    dilation: Positive = 1  # only keys at a multiple of this distance are visible


@dataclasses.dataclass(frozen=True)
class S2:
    block: Positive = 64  # tokens per block
    local: Positive = 16  # blocks that end with the query's own
    vert_stride: Positive = 8  # of all blocks, one in so many stays visible
    num_dense_heads: NonNegative = 0  # heads of keys, the last ones, that keep everything
    homo_head: bool = False  # all heads keep the same blocks
    head_step: Positive | None = None  # blocks between what heads keep; max(1, vert_stride // heads) if None
    head_offset: NonNegative = 0  # head h keeps block c if vert_stride divides c + h·head_step + head_offset


@dataclasses.dataclass(frozen=True)
class SpanOptions:
    file: str | None = None  # JSON, {"layers": as rules}: what infer.spans writes
    rules: Rules = ()  # [[[α, β], one for each head of keys], one for each layer], or one for all layers
    length: Positive = 8192  # N: a head sees the last α + β N tokens, in whole blocks
    block: Positive = 64  # tokens per block


@dataclasses.dataclass(frozen=True)
class Config(SoftmaxConfig):
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "phi3_small": {"pattern": "s2", "heads": 32, "kv_heads": 8, "s2": {"block": 64, "local": 16, "vert_stride": 8}},
    }

    window: Positive = 128  # visible keys, the query's own included
    sinks: bool = False  # learned score of an empty key, per head
    sink_tokens: NonNegative = 0  # first tokens of each document that stay visible
    pattern: Literal["window", "gna", "s2", "shifted_groups", "spans", "log_bands"] = "window"  # which keys are visible
    gna: GNA = dataclasses.field(default_factory=GNA)
    s2: S2 = dataclasses.field(default_factory=S2)
    shift_fraction: Half = 0.5  # shifted_groups: of the heads of keys, the last ones, are shifted by half a group
    spans: SpanOptions = dataclasses.field(default_factory=SpanOptions)

    def fill(self, d_model: int) -> "Config":
        filled = super().fill(d_model)
        if self.pattern == "spans" and self.spans.file is not None:
            rules = _read_rules(self.spans.file)
            filled = dataclasses.replace(filled, spans=dataclasses.replace(self.spans, rules=rules))
        _ = filled.lifetimes  # whatever does not fit is refused here
        return filled

    @property
    def lifetimes(self) -> Pattern:
        """Until when keys are visible.

        Raises:
          ConfigError: options of the pattern that do not fit.
        """
        return PATTERNS[self.pattern](self)


def _read_rules(path: str) -> Rules:
    try:
        rules = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))["layers"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError("spans.file", path, f"expected a JSON file of spans, with layers: {error}") from None
    return convert(Rules, rules, "spans.file")


def _gna(cfg: Config) -> Pattern:
    if cfg.gna.stride > cfg.window:
        raise ConfigError("gna.stride", cfg.gna.stride, f"expected at most window = {cfg.window}")
    if cfg.sink_tokens and cfg.gna.dilation > 1:
        raise ConfigError("sink_tokens", cfg.sink_tokens, "expected 0 with gna.dilation, which hides most of them")
    return Neighbourhood(cfg.window, cfg.gna.stride, dilation=cfg.gna.dilation, sink_tokens=cfg.sink_tokens)


def _s2(cfg: Config) -> Pattern:
    o, heads = cfg.s2, _kv_heads(cfg)
    if o.num_dense_heads > heads:
        raise ConfigError("s2.num_dense_heads", o.num_dense_heads, f"expected at most kv_heads = {heads}")
    if o.homo_head and o.num_dense_heads:
        raise ConfigError("s2.num_dense_heads", o.num_dense_heads, "expected 0 with s2.homo_head")
    step = 0 if o.homo_head else o.head_step or max(1, o.vert_stride // cfg.heads)
    return Strided(
        o.block, o.local, o.vert_stride, heads, step, o.head_offset, o.num_dense_heads, sink_tokens=cfg.sink_tokens
    )


def _shifted_groups(cfg: Config) -> Pattern:
    heads = _kv_heads(cfg)
    shifted = int(cfg.shift_fraction * heads)
    if cfg.shift_fraction and not shifted:
        raise ConfigError(
            "shift_fraction", cfg.shift_fraction, f"shifts none of {heads} heads of keys: expected 0, or more"
        )
    offsets = (0,) * (heads - shifted) + (cfg.window // 2,) * shifted
    return ShiftedGroups(cfg.window, offsets, sink_tokens=cfg.sink_tokens)


def _spans(cfg: Config) -> Pattern:
    o, heads = cfg.spans, _kv_heads(cfg)
    if cfg.kv == "shared" and len(o.rules) > 1:
        raise ConfigError("kv", cfg.kv, "expected own, or the same spans in all layers")
    if not o.rules or any(len(layer) != heads for layer in o.rules):
        raise ConfigError("spans.rules", o.rules, f"expected (α, β) for each of kv_heads = {heads}, in every layer")
    blocks = [[max(1, int(a // o.block) + int(b * o.length // o.block)) for a, b in layer] for layer in o.rules]
    return Spans(o.block, tuple(map(tuple, blocks)), sink_tokens=cfg.sink_tokens)


def _kv_heads(cfg: Config) -> int:
    return cfg.kv_heads or cfg.heads


PATTERNS: dict[str, Callable[[Config], Pattern]] = {
    "window": lambda cfg: Window(cfg.window, sink_tokens=cfg.sink_tokens),
    "gna": _gna,
    "s2": _s2,
    "shifted_groups": _shifted_groups,
    "spans": _spans,
    "log_bands": lambda cfg: LogBands(cfg.window, sink_tokens=cfg.sink_tokens),
}


class SlidingWindowAttention(SoftmaxMixer):
    """y = W_o (attention(q, k, v) ⊙ σ(W_g x)); the state holds the keys and values that later tokens may see."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.qkv = QKV(d_model, cfg, rngs=rngs)
        self.sinks = param(rngs, jax.nn.initializers.normal(0.02), (cfg.heads,), ("heads",)) if cfg.sinks else None
        self.read_out(d_model, rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        alive = self.cfg.lifetimes
        window: dict[str, Any] = {"window": alive.reach, "sink_tokens": alive.first}
        ends: dict[str, Any] = {}
        if isinstance(alive, Window):  # a ring, and kernels
            q, keys, state = self.qkv.see(x, ctx, state, **window)
        else:
            q, keys, state = self.qkv.see(x, ctx, state, pattern=alive)
            positions = ctx.positions if keys.positions is None else keys.positions
            ends = {"ends": alive.ends(positions, ctx.layer_index), "dilation": alive.dilation}
            ends["alive"] = alive.slots(x.shape[1])
        sinks = None if self.sinks is None else self.sinks[...]
        o = self.attend(q, keys, ctx, sinks=sinks, tap_lse=ctx.taps.get("lse"), **window, **ends)
        return self.gate(ctx.tap("reads", o), x), state

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        alive = self.cfg.lifetimes
        kind: dict[str, Any] = {} if isinstance(alive, Window) else {"by_head": (alive.rows,)}
        return self.cfg.init_cache(batch, alive.slots(max_len), dtype, **kind)
