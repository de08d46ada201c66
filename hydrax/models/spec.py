"""From the pattern of a hybrid to one entry per layer.

    pattern := term {"," term}         term := [int "*"] (name | "(" pattern ")" | helper)
    every(r, lin, full, phase=r)       full at i % (r+1) == phase (the last layer if there is none), lin elsewhere
    bookend(n, full, lin)              full in the first and last n layers
    select([i, ...], full, lin)        full at these indices
    fill(pattern, L)                   pattern repeated and cut to L layers
Helpers without a count take the depth from `num_layers`. A name is a registered mixer or a block of `blocks`.
"""

import ast
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal

from hydrax import mixers
from hydrax.core.build import ConfigError, Positive, PositiveFloat, build
from hydrax.nn import ffn

FFN = Literal["none", "swiglu", "geglu", "reglu", "sglu", "mlp", "relu2"]

BYTE_VOCABULARY = 259
"""Vocabulary of the byte tokenizer (256 bytes, begin, end, padding): the default of a model without data."""

MAX_LAYERS = 10_000
"""No pattern expands beyond this: a mistyped count should not fill the memory."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    d_model: Positive = 256  # width D of the residual stream
    pattern: str = "2*(3*gdn,attn)"  # which mixer in which layer
    num_layers: Positive | None = None  # depth, where the pattern does not tell it
    vocab_size: Positive | None = None  # None: the tokenizer's (rounded up internally)
    blocks: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # name -> {mixer, options, ffn, ffn_dim}
    mixers: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # name -> options of that mixer
    ffn: FFN = "swiglu"  # channel mixing after each mixer
    ffn_dim: Positive | None = None  # its inner width; 8D/3 (gated) or 4D rounded up to 256 if None
    norm: Literal["rmsnorm", "srmsnorm"] = "rmsnorm"  # norms of the blocks, with a learned weight or without
    norm_eps: PositiveFloat = 1e-6  # of these norms
    embed_scale: PositiveFloat = 1.0  # factor on the embeddings
    tie: bool = True  # the embedding table also gives the logits
    logit_softcap: PositiveFloat | None = None  # c of c·tanh(z/c) on the logits

    def __post_init__(self) -> None:
        resolve(self)  # a config that exists can be built


def model_config(cfg: ModelConfig | Mapping[str, Any]) -> ModelConfig:
    """A `ModelConfig` from itself or from a mapping of its fields (dict, ConfigDict)."""
    return cfg if isinstance(cfg, ModelConfig) else build(ModelConfig, dict(cfg), "model")


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """A named block: a mixer with options of its own, and optionally another FFN."""

    mixer: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ffn: FFN | None = None  # None: the model's
    ffn_dim: Positive | None = None


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One resolved layer; `options` is the mixer's `Config` with nothing left open."""

    block: str
    mixer: str
    options: mixers.MixerConfig
    ffn: str
    ffn_dim: int | None


@dataclasses.dataclass(frozen=True)
class Group:
    """`repeats` repetitions of the layers `period`, the first of them at index `start`."""

    start: int
    period: tuple[LayerSpec, ...]
    repeats: int


def resolve(cfg: ModelConfig) -> tuple[LayerSpec, ...]:
    """One `LayerSpec` per layer.

    Raises:
      ConfigError: a pattern that does not parse, an unknown name, options that do not fit, a depth that contradicts
        `num_layers`.
    """
    for name, options in cfg.mixers.items():
        _options(name, options, cfg.d_model, f"mixers.{name}")
    blocks = {name: _block(name, values, cfg) for name, values in cfg.blocks.items()}
    names = expand(cfg.pattern, cfg.num_layers)
    if cfg.num_layers is not None and len(names) != cfg.num_layers:
        raise ConfigError("num_layers", cfg.num_layers, f"the pattern {cfg.pattern!r} has {len(names)} layers")
    for name in dict.fromkeys(names):
        if name not in blocks:
            known = ", ".join([*cfg.blocks, *mixers.names()])
            if name not in mixers.TABLE:
                raise ConfigError("pattern", cfg.pattern, f"{name!r} is neither a mixer nor a block; allowed: {known}")
            blocks[name] = _block(name, {"mixer": name}, cfg)
    return tuple(blocks[name] for name in names)


def group(layers: tuple[LayerSpec, ...]) -> list[Group]:
    """Cuts the layers into repeated periods, so that compile time grows with the period and not with the depth.

    From the left, the period that covers most layers with at least two repeats wins (the shortest among equals);
    what does not repeat stands alone.
    """
    groups, start = [], 0
    while start < len(layers):
        rest = layers[start:]
        candidates = [(_repeats(rest, p), p) for p in range(1, len(rest) // 2 + 1)]
        repeats, p = max((c for c in candidates if c[0] > 1), key=lambda c: (c[0] * c[1], -c[1]), default=(1, 1))
        groups.append(Group(start, rest[:p], repeats))
        start += repeats * p
    return groups


def expand(pattern: str, num_layers: int | None) -> list[str]:
    """The names of a pattern, one per layer."""
    try:
        names = _walk(ast.parse(pattern.strip(), mode="eval").body, num_layers)
    except SyntaxError as error:
        raise ConfigError("pattern", pattern, f"{error.msg} at character {error.offset}") from None
    except (_PatternError, RecursionError) as error:
        raise ConfigError("pattern", pattern, str(error)) from None
    if not names:
        raise ConfigError("pattern", pattern, "expected at least one layer, e.g. '2*(3*gdn,attn)'")
    return names


class _PatternError(ValueError):
    """A pattern that parses but means nothing; `expand` adds the pattern itself."""


def _walk(node: ast.expr, depth: int | None) -> list[str]:
    """The grammar happens to be a subset of Python's expressions, so Python parses it."""
    match node:
        case ast.Name(id=name):
            return [name]
        case ast.Tuple(elts=terms):
            return _bounded(itertools.chain.from_iterable(_walk(term, depth) for term in terms))
        case ast.BinOp(op=ast.Mult(), left=ast.Constant(value=int(n)), right=term) if n >= 1:
            return _bounded(itertools.chain.from_iterable(itertools.repeat(_walk(term, depth), n)))
        case ast.Call(func=ast.Name(id=helper), args=args, keywords=keywords) if helper in _HELPERS:
            values = [_argument(a, depth) for a in args]
            named = {k.arg or "**": _argument(k.value, depth) for k in keywords}
            try:
                return _HELPERS[helper](depth, *values, **named)
            except TypeError:
                usage = next(line.strip() for line in __doc__.splitlines() if line.strip().startswith(helper))
                raise _PatternError(f"expected {usage}") from None
    raise _PatternError(f"cannot read {ast.unparse(node)!r}; expected names, n*(...), or {', '.join(_HELPERS)}")


def _bounded(names: "itertools.chain[str]") -> list[str]:
    result = list(itertools.islice(names, MAX_LAYERS + 1))
    if len(result) > MAX_LAYERS:
        raise _PatternError(f"more than {MAX_LAYERS} layers")
    return result


def _argument(node: ast.expr, depth: int | None) -> Any:
    match node:
        case ast.Constant(value=int(n)):
            return n
        case ast.List(elts=items) if all(isinstance(i, ast.Constant) for i in items):
            return [i.value for i in items if isinstance(i, ast.Constant)]
    return _walk(node, depth)


def _depth(depth: int | None) -> int:
    if depth is None:
        raise _PatternError("a helper without a count needs num_layers")
    return depth


def _every(depth: int | None, r: int, lin: list[str], full: list[str], phase: int | None = None) -> list[str]:
    at = r if phase is None else phase
    chosen = [i for i in range(_depth(depth)) if i % (r + 1) == at] or [_depth(depth) - 1]
    return _select(depth, chosen, full, lin)


def _bookend(depth: int | None, n: int, full: list[str], lin: list[str]) -> list[str]:
    L = _depth(depth)
    return _select(depth, [i for i in range(L) if i < n or i >= L - n], full, lin)


def _select(depth: int | None, indices: list[int], full: list[str], lin: list[str]) -> list[str]:
    L = _depth(depth)
    outside = [i for i in indices if not 0 <= i < L]
    if outside:
        raise _PatternError(f"layer {outside[0]} does not exist among {L} layers")
    return [name for i in range(L) for name in (full if i in indices else lin)]


def _fill(depth: int | None, names: list[str], count: int | None = None) -> list[str]:
    return list(itertools.islice(itertools.cycle(names), min(count or _depth(depth), MAX_LAYERS)))


_HELPERS: dict[str, Callable[..., list[str]]] = {
    "every": _every,
    "bookend": _bookend,
    "select": _select,
    "fill": _fill,
}


def _block(name: str, values: Mapping[str, Any], cfg: ModelConfig) -> LayerSpec:
    block = build(BlockConfig, values, f"blocks.{name}")
    if block.mixer not in mixers.TABLE:
        allowed = f"expected one of {', '.join(mixers.names())}"
        raise ConfigError(f"blocks.{name}.mixer", block.mixer, allowed)
    own = f"blocks.{name}.options" if block.options else f"mixers.{block.mixer}"
    options = {**_mapping(cfg.mixers.get(block.mixer, {}), f"mixers.{block.mixer}"), **block.options}
    kind = block.ffn or cfg.ffn
    width = None if kind == "none" else block.ffn_dim or cfg.ffn_dim or ffn.default_width(kind, cfg.d_model)
    return LayerSpec(name, block.mixer, _options(block.mixer, options, cfg.d_model, own), kind, width)


def _options(name: str, values: Mapping[str, Any], d_model: int, path: str) -> mixers.MixerConfig:
    if name not in mixers.TABLE:
        raise ConfigError(path, dict(_mapping(values, path)), f"expected one of {', '.join(mixers.names())}")
    config, values = mixers.get(name).Config, dict(_mapping(values, path))
    if "preset" in values:
        preset = values.pop("preset")
        if preset not in list(config.PRESETS):  # what is given may be anything, and not hashable
            allowed = f"expected one of {', '.join(config.PRESETS)}" if config.PRESETS else f"{name} has no presets"
            raise ConfigError(f"{path}.preset", preset, allowed)
        values = _over(config.PRESETS[preset], values)
    options = build(config, values, path)
    try:
        return options.fill(d_model)
    except ConfigError as error:
        raise error.under(path) from None


def _over(preset: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a preset under those that are given, section by section."""
    nested = {
        key: _over(preset[key], value)
        for key, value in given.items()
        if isinstance(value, Mapping) and isinstance(preset.get(key), Mapping)
    }
    return {**preset, **given, **nested}


def _mapping(values: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(path, values, "expected a mapping of options")
    return values


def _repeats(layers: tuple[LayerSpec, ...], p: int) -> int:
    count = 1
    while layers[count * p : (count + 1) * p] == layers[:p]:
        count += 1
    return count
