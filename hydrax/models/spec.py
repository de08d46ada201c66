"""The configuration of a model, and its resolution to one entry per layer. The grammar of patterns is `pattern`'s."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from hydrax import mixers
from hydrax.core.build import ConfigError, NonNegative, Positive, PositiveFloat, build
from hydrax.models import pattern as patterns
from hydrax.models.compose import mapping, mix_of, options_of, over
from hydrax.models.layers import FFN, BlockConfig, LayerSpec, Norm, Place, Section
from hydrax.models.mix import Mix, Single, key_facts, parameter_shapes
from hydrax.nn import ffn
from hydrax.nn.memory import PKMConfig, WorkspaceConfig
from hydrax.nn.moe import MoEConfig
from hydrax.nn.timestep_norm import check_groups
from hydrax.ops.table import complaint

BYTE_VOCABULARY = 259
"""Vocabulary of the byte tokenizer (256 bytes, begin, end, padding): the default of a model without data."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Layers run several times (arXiv 2605.20670): h^τ = F(h^{τ-1}) + ρ_τ ⊙ h^{τ-1}, states of their own per pass."""

    n: Positive = 1  # passes; loop(n, ...) in a pattern says it for a part of the layers
    gate: Literal["none", "scalar", "channel"] = "none"  # ρ, initially 0
    norm: Literal["none", "final"] = "none"  # final: the model's last norm follows every pass
    block_gate: NonNegative = 0  # layers of a block: h ← h + η h_before after each, η scalars, initially 0; 0: none
    per_loop: tuple[Mapping[str, Any], ...] = ()  # for each pass, {mixer: options} that change no parameter's shape


@dataclasses.dataclass(frozen=True)
class ShareConfig:
    """What layers use of others. Weights are shared by blocks with `shared = true`."""

    kv: tuple[tuple[NonNegative, ...], ...] = ()  # groups of layers, with the first one's keys and values


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Memories beside the mixers, each read under a norm and added to the stream (arXiv 2508.15099)."""

    workspace: WorkspaceConfig | None = None  # slots written chunk by chunk
    pkm: PKMConfig | None = None  # product keys
    every: Positive = 1  # after layers i with i % every == every - 1


@dataclasses.dataclass(frozen=True)
class PrefixConfig:
    """Learned vectors in front of every document (arXiv 2411.13676), at its first positions."""

    meta_tokens: NonNegative = 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    d_model: Positive = 256  # width D of the residual stream
    pattern: str = "2*(3*gdn,attn)"  # which mixer in which layer
    num_layers: Positive | None = None  # depth, where the pattern does not tell it
    vocab_size: Positive | None = None  # None: the tokenizer's (rounded up internally)
    blocks: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # name -> fields of `BlockConfig`
    mixers: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # name -> options of that mixer
    ffn: FFN = "swiglu"  # channel mixing after each mixer
    ffn_pattern: str | None = None  # the same layer by layer, e.g. "fill((swiglu,moe))"
    ffn_dim: Positive | None = None  # its inner width; 8D/3 (gated) or 4D rounded up to 256 if None
    ffn_bias: bool = False  # biases in dense networks
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)  # where ffn = moe
    norm: Norm = "rmsnorm"  # RMS with weight w, 1 + w, or none (rmsnorm, rmsnorm1p, srmsnorm), or LayerNorm
    norm_place: Place = "pre"  # x + f(norm x), x + norm f(x), x + norm f(norm x), α norm x + β f(norm x)
    post_alpha: PositiveFloat = 1.0  # α of norm_place = post
    post_beta: PositiveFloat = 1.0  # β of norm_place = post
    norm_eps: PositiveFloat = 1e-6  # of these norms
    two_hop: bool = False  # x + mixer(norm x) is what the FFN reads, but x + ffn(norm ...) what comes out
    final_norm: Literal["timestep_norm", "timestep_decay_norm"] | None = None  # the last norm, by the past; None: norm
    final_groups: Positive = 32  # of features, that share the statistics of that norm
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)
    share: ShareConfig = dataclasses.field(default_factory=ShareConfig)
    memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)
    prefix: PrefixConfig = dataclasses.field(default_factory=PrefixConfig)
    embed_scale: PositiveFloat = 1.0  # factor on the embeddings
    tie: bool = True  # the embedding table also gives the logits
    logit_softcap: PositiveFloat | None = None  # c of c·tanh(z/c) on the logits
    impl: str | None = None  # forms of the ops: one for all, or <op>=<form>, <op>=<form>; None: their own choice

    def __post_init__(self) -> None:
        sections(self)  # a config that exists can be built
        if self.impl is not None and (allowed := complaint(self.impl)):
            raise ConfigError("impl", self.impl, allowed)


def model_config(cfg: ModelConfig | Mapping[str, Any]) -> ModelConfig:
    """A `ModelConfig` from itself or from a mapping of its fields (dict, ConfigDict)."""
    return cfg if isinstance(cfg, ModelConfig) else build(ModelConfig, dict(cfg), "model")


def resolve(cfg: ModelConfig) -> tuple[LayerSpec, ...]:
    """One `LayerSpec` per layer.

    Raises:
      ConfigError: a pattern that does not parse, an unknown name, options that do not fit, a depth that contradicts
        `num_layers`, heads, groups or loops that break a rule.
    """
    return tuple(layer for section in sections(cfg) for layer in section.layers)


def sections(cfg: ModelConfig) -> tuple[Section, ...]:
    """The layers, cut where loops begin and end; raises what `resolve` raises."""
    if cfg.final_norm is not None:
        check_groups(cfg.final_groups, cfg.d_model, "final_groups")
        if cfg.loop.norm == "final":
            raise ConfigError("final_norm", cfg.final_norm, "expected none with loop.norm = final")
    stretches = patterns.stretches(cfg.pattern, cfg.num_layers)
    names = [name for stretch in stretches for name in stretch.names]
    if cfg.num_layers is not None and len(names) != cfg.num_layers:
        raise ConfigError("num_layers", cfg.num_layers, f"the pattern {cfg.pattern!r} has {len(names)} layers")
    for name in cfg.mixers:
        options_of(name, {}, cfg, f"mixers.{name}")
    layers = _layers(cfg, names)
    loops = [_loops(cfg, stretch) for stretch in stretches]
    if cfg.loop.per_loop and {n for n in loops if n > 1} != {len(cfg.loop.per_loop)}:
        allowed = f"expected options for every pass, and layers are run {', '.join(map(str, loops))} times"
        raise ConfigError("loop.per_loop", len(cfg.loop.per_loop), allowed)
    found, start = [], 0
    for stretch, n in zip(stretches, loops, strict=True):
        own = _gated(layers[start : start + len(stretch.names)], cfg.loop.block_gate)
        outside = next((i for i, layer in enumerate(own) if layer.producer > i), None)
        if outside is not None:
            allowed = f"layer {start + outside} and its producer are not run in the same loop"
            raise ConfigError("share.kv", cfg.share.kv, allowed)
        found.append(Section(start, _passes(cfg, own, n)))
        start += len(stretch.names)
    return tuple(found)


def _layers(cfg: ModelConfig, names: list[str]) -> list[LayerSpec]:
    kinds = _ffn_kinds(cfg, len(names))
    configs = {name: _block(cfg, name) for name in dict.fromkeys([*cfg.blocks, *names])}
    places = {name: [i for i, n in enumerate(names) if n == name] for name in configs}
    layers: list[LayerSpec] = []
    for i, name in enumerate(names):
        spec = _layer(cfg, name, configs[name], kinds[i], places[name], i)
        layers.append(dataclasses.replace(spec, memory=_remembers(cfg.memory, i)))
    for name in cfg.blocks:  # those that no layer uses must be right, too
        if not places[name]:
            _layer(cfg, name, configs[name], cfg.ffn, [0], 0)
    fed = next((layer.feed.block for layer in layers if layer.feed and layer.feed.block in names), None)
    if fed is not None:
        raise ConfigError("pattern", cfg.pattern, f"{fed!r} feeds other layers, and cannot be a layer as well")
    layers = _linked(cfg, layers)
    for shared in (name for name, config in configs.items() if config.shared):
        if len({dataclasses.replace(layers[i], producer=0, produces=False) for i in places[shared]}) > 1:
            raise ConfigError(f"blocks.{shared}.shared", True, "its places differ, and cannot have the same weights")
    return layers


def _remembers(memory: MemoryConfig, i: int) -> bool:
    return (memory.workspace or memory.pkm) is not None and i % memory.every == memory.every - 1


def _ffn_kinds(cfg: ModelConfig, depth: int) -> list[str]:
    if cfg.ffn_pattern is None:
        return [cfg.ffn] * depth
    kinds = patterns.expand(cfg.ffn_pattern, depth, "ffn_pattern")
    known = ["none", "moe", *ffn.KINDS]
    wrong = next((kind for kind in kinds if kind not in known), None)
    if wrong is not None:
        raise ConfigError("ffn_pattern", cfg.ffn_pattern, f"{wrong!r}: expected names of {', '.join(known)}")
    if len(kinds) != depth:
        raise ConfigError("ffn_pattern", cfg.ffn_pattern, f"it has {len(kinds)} entries for {depth} layers")
    return kinds


def _block(cfg: ModelConfig, name: str) -> BlockConfig:
    """The block of that name: one of `blocks`, or a mixer or composition as it stands."""
    if name in cfg.blocks:
        return build(BlockConfig, cfg.blocks[name], f"blocks.{name}")
    if name in mixers.TABLE or patterns.composition(name) is not None:
        return BlockConfig(name)
    known = ", ".join([*cfg.blocks, *mixers.names()])
    raise ConfigError("pattern", cfg.pattern, f"{name!r} is neither a mixer nor a block; allowed: {known}")


def _layer(cfg: ModelConfig, name: str, block: BlockConfig, kind: str, places: list[int], index: int) -> LayerSpec:
    """The layer of a block at `index`, one of the `places` where the block occurs."""
    path = f"blocks.{name}" if name in cfg.blocks else "pattern"
    kind = block.ffn or kind
    moe = None
    if kind == "moe":
        moe = build(MoEConfig, over(dataclasses.asdict(cfg.moe), block.moe), f"{path}.moe")
        dense = ffn.default_width(moe.kind, cfg.d_model)
        moe = dataclasses.replace(moe, width=moe.width or block.ffn_dim or cfg.ffn_dim or dense)
    elif block.moe:
        raise ConfigError(f"{path}.moe", dict(block.moe), f"needs ffn = moe, and it is {kind}")
    width = None
    if kind not in ("none", "moe"):
        width = block.ffn_dim or cfg.ffn_dim or ffn.default_width(kind, cfg.d_model)
        ffn.check_width(kind, width, cfg.d_model)
    if block.lora_rank and not block.shared:
        raise ConfigError(f"{path}.lora_rank", block.lora_rank, "needs shared = true")
    return LayerSpec(
        block=name,
        mix=_mix(cfg, block, path, cfg.d_model, places, index),
        ffn=kind,
        ffn_dim=width,
        moe=moe,
        norm=block.norm or cfg.norm,
        norm_place=block.norm_place or cfg.norm_place,
        alpha=block.post_alpha or cfg.post_alpha,
        beta=block.post_beta or cfg.post_beta,
        two_hop=_two_hop(cfg, block, path, kind),
        shared=block.shared,
        lora_rank=block.lora_rank,
        lora_on=block.lora_on if block.lora_rank else (),
        feed=None if block.feed is None else _feed(cfg, block.feed, f"{path}.feed"),
    )


def _two_hop(cfg: ModelConfig, block: BlockConfig, path: str, kind: str) -> bool:
    wanted = cfg.two_hop if block.two_hop is None else block.two_hop
    if wanted and (block.norm_place or cfg.norm_place) == "post":
        raise ConfigError(f"{path}.two_hop", True, "expected norm_place = pre, reordered or sandwich")
    return wanted and kind != "none"


def _mix(cfg: ModelConfig, block: BlockConfig, path: str, width: int, places: list[int], index: int) -> Mix:
    try:
        return mix_of(cfg, block.mixer, block.options, path, width, places, index)
    except RecursionError:
        raise ConfigError(path, block.mixer, "a block cannot be a part of itself") from None


def _feed(cfg: ModelConfig, name: str, key: str) -> LayerSpec:
    block = _block(cfg, name) if name in cfg.blocks else BlockConfig("")
    if not block.shared or block.feed or (block.ffn or cfg.ffn) in ("none", "moe"):
        shared = [n for n, values in cfg.blocks.items() if values.get("shared")]
        raise ConfigError(key, name, f"expected a block with shared = true and a dense ffn: {', '.join(shared) or '-'}")
    layer = _layer(cfg, name, block, cfg.ffn, [0], 0)
    return dataclasses.replace(layer, mix=_mix(cfg, block, f"blocks.{name}", 2 * cfg.d_model, [0], 0))


def _linked(cfg: ModelConfig, layers: list[LayerSpec]) -> list[LayerSpec]:
    """The layers with `share.kv` applied."""
    layers, seen = list(layers), set[int]()
    for i, members in enumerate(cfg.share.kv):
        key = f"share.kv[{i}]"
        if not members or list(members) != sorted(set(members)) or members[-1] >= len(layers):
            allowed = f"expected different layers below {len(layers)}, the producer first"
            raise ConfigError(key, members, allowed)
        if again := seen.intersection(members):
            raise ConfigError(key, members, f"layer {min(again)} is in another group already")
        seen.update(members)
        facts = [key_facts(layers[j].mix) for j in members]
        for j, own in zip(members, facts, strict=True):
            if len(own) != 1:
                raise ConfigError(
                    key, members, f"layer {j} is {layers[j].mixer}: expected one softmax mixer, attn or swa"
                )
            unequal = [f"{n} {own[0][n]} and {value}" for n, value in facts[0][0].items() if own[0][n] != value]
            if unequal:
                raise ConfigError(key, members, f"layers {members[0]} and {j} differ in {'; '.join(unequal)}")
        layers[members[0]] = dataclasses.replace(layers[members[0]], produces=len(members) > 1)
        for j in members[1:]:
            mix = layers[j].mix.replaced(kv="shared")
            layers[j] = dataclasses.replace(layers[j], mix=mix, producer=j - members[0])
    return layers


def _gated(layers: list[LayerSpec], size: int) -> list[LayerSpec]:
    """The layers in blocks of `size`, each with a gate; the last block may be shorter."""
    if not size:
        return layers
    ends = [i == len(layers) - 1 or i % size == size - 1 for i in range(len(layers))]
    return [
        dataclasses.replace(layer, opens=i % size == 0, closes=i % size + 1 if end else 0)
        for i, (layer, end) in enumerate(zip(layers, ends, strict=True))
    ]


def _loops(cfg: ModelConfig, stretch: patterns.Stretch) -> int:
    if stretch.loops is None:
        return 1 if "loop(" in cfg.pattern.replace(" ", "") else cfg.loop.n
    if cfg.loop.n > 1:
        raise ConfigError("loop.n", cfg.loop.n, f"the pattern {cfg.pattern!r} says how often its layers run")
    return stretch.loops


def _passes(cfg: ModelConfig, layers: list[LayerSpec], n: int) -> tuple[tuple[int, tuple[LayerSpec, ...]], ...]:
    """The layers of every pass, equal ones in a row counted together."""
    if n == 1 or not cfg.loop.per_loop:
        return ((n, tuple(layers)),)
    runs: list[tuple[int, tuple[LayerSpec, ...]]] = []
    for i, options in enumerate(cfg.loop.per_loop):
        path = f"loop.per_loop[{i}]"
        for name in options:
            if name not in mixers.TABLE:
                raise ConfigError(path, name, f"expected names of {', '.join(mixers.names())}")
        own = tuple(_overridden(layer, options, path, cfg.d_model) for layer in layers)
        if runs and runs[-1][1] == own:
            runs[-1] = (runs[-1][0] + 1, own)
        else:
            runs.append((1, own))
    return tuple(runs)


def _overridden(layer: LayerSpec, options: Mapping[str, Any], path: str, d_model: int) -> LayerSpec:
    """The layer with other options of its mixers in one pass."""
    mix = _changed(layer.mix, options, path, d_model)
    if layer.shared and mix != layer.mix:
        raise ConfigError(path, dict(options), f"block {layer.block} is shared, and has the same options everywhere")
    return dataclasses.replace(layer, mix=mix)


def _changed(mix: Mix, options: Mapping[str, Any], path: str, d_model: int) -> Mix:
    """A mixer, or the mixers of a composition, with other options but the same parameters."""
    if not isinstance(mix, Single):
        members = tuple(_changed(part, options, path, d_model) for part in mix.members)
        return dataclasses.replace(mix, members=members)  # type: ignore[type-var]
    if mix.mixer not in options:
        return mix
    path = f"{path}.{mix.mixer}"
    values = mapping(options[mix.mixer], path)
    changed = Single(mix.mixer, build(type(mix.options), over(dataclasses.asdict(mix.options), values), path))
    before, after = (parameter_shapes(m, d_model) for m in (mix, changed))
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            found = f"{name} is {before.get(name)} and would be {after.get(name)}"
            raise ConfigError(path, dict(values), f"expected options that change no parameter's shape, but {found}")
    return changed
