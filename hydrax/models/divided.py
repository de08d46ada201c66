"""Which models can be trained on rows whose tokens are divided over devices (`mesh.context`)."""

from collections.abc import Callable, Mapping
from typing import Any

from hydrax import mixers
from hydrax.core.build import ConfigError
from hydrax.models.layers import LayerSpec
from hydrax.models.mix import Mix
from hydrax.models.modes import Modes
from hydrax.models.spec import ModelConfig, resolve
from hydrax.parallel.layout import passes
from hydrax.parallel.mesh import MeshConfig
from hydrax.parallel.shards import NEEDS, STRATEGIES, strategies, strategy


def check_divided(cfg: ModelConfig, mesh: MeshConfig, sizes: Mapping[str, int], seq_len: int) -> None:
    """Refuses what cannot run, before anything does.

    Args:
      mesh: its `strategy` and `layout`.
      sizes: of its axes.
      seq_len: tokens per row.

    Raises:
      ConfigError: a row that cannot be divided, a strategy that no mixer of the model has, one whose mixer has heads or
        taps that do not fit, or a layout that something in the model does not serve.
    """
    shards, names = sizes["context"], strategies(mesh.strategy)
    if shards == 1:
        return
    slots = shards * len(passes(mesh.layout))
    if seq_len % slots:
        allowed = f"expected a multiple of {slots} for mesh.context = {shards}, mesh.layout = {mesh.layout!r}"
        raise ConfigError("data.seq_len", seq_len, allowed)
    layers = resolve(cfg)
    used = [pair for layer in layers for pair in _transitions(layer.mix)]
    able = {mixer: STRATEGIES[transition] for mixer, transition, _ in used}
    for name in names:
        if not any(name in of_mixer for of_mixer in able.values()):
            allowed = "; ".join(f"{mixer}: {' or '.join(of_mixer)}" for mixer, of_mixer in sorted(able.items()))
            raise ConfigError("mesh.strategy", name, f"expected what a mixer of the model has ({allowed})")
    for mixer, transition, options in used:
        sees, length = max(getattr(options, "tails", [getattr(options, "conv_width", 1) - 1])), seq_len // slots
        if sees > length:
            allowed = f"{mixer} sees {sees} tokens back, and a device has {length} of a row"
            allowed += " in one piece" if slots > shards else ""
            raise ConfigError("mesh.context", shards, allowed)
        if NEEDS[strategy(mixer, transition, names, mesh.layout)].heads:
            _check_heads(mixer, options, sizes, able[mixer])
    for name, reads_in_order in IN_ORDER.items():
        if slots > shards and any(reads_in_order(cfg, layer) for layer in layers):
            raise ConfigError("mesh.layout", mesh.layout, f"{name} reads rows in their order: expected contiguous")


IN_ORDER: dict[str, Callable[[ModelConfig, LayerSpec], bool]] = {
    "model.memory.workspace": lambda cfg, layer: layer.memory and cfg.memory.workspace is not None,
    "model.moe.granularity = 'chunk'": lambda cfg, layer: layer.moe is not None and layer.moe.granularity == "chunk",
}
"""What looks along a row beside the mixers, and does so without `Shards`: the compiler divides its work."""


def _transitions(mix: Mix) -> list[tuple[str, str, Any]]:
    """(mixer, how states compose, options) of all that look along a row."""
    found = [(single.mixer, mixers.row(single.mixer).transition, single.options) for single in mix.singles()]
    modes = [(mixer, "lse", options) for mixer, _, options in found] if isinstance(mix, Modes) else []
    return found + modes


def _check_heads(mixer: str, options: Any, sizes: Mapping[str, int], able: tuple[str, ...]) -> None:
    """Ulysses gives every device whole heads, or channels of a mixer without heads."""
    names = [name for name in ("heads", "value_heads", "kv_heads") if getattr(options, name, None)] or ["value_dim"]
    counts = {name: getattr(options, name, None) or sizes["context"] for name in names}
    tensor = 1 if any(n % sizes["tensor"] for n in counts.values()) else sizes["tensor"]
    for name, n in counts.items():
        if n // tensor % sizes["context"]:
            others = [other for other in able if not NEEDS[other].heads]
            allowed = f"{mixer} has {name} = {n}; expected a multiple of context = {sizes['context']} per tensor shard"
            raise ConfigError("mesh.strategy", "ulysses", " or ".join([allowed, *others]))
