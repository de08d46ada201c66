"""Which models can be trained on rows whose tokens are divided over devices (`mesh.context`)."""

from collections.abc import Mapping
from typing import Any

from hydrax import mixers
from hydrax.core.build import ConfigError
from hydrax.models.mix import Mix
from hydrax.models.modes import Modes
from hydrax.models.spec import ModelConfig, resolve
from hydrax.parallel.shards import STRATEGIES, strategies, strategy


def check_divided(cfg: ModelConfig, sizes: Mapping[str, int], seq_len: int, wanted: str | None) -> None:
    """Refuses what cannot run, before anything does.

    Args:
      sizes: those of the mesh, by axis.
      seq_len: tokens per row.
      wanted: `mesh.strategy`.

    Raises:
      ConfigError: a row that cannot be divided, a strategy that no mixer of the model has, or one whose mixer has
        heads or taps that do not fit.
    """
    shards, names = sizes["context"], strategies(wanted)
    if shards == 1:
        return
    if seq_len % shards:
        raise ConfigError("data.seq_len", seq_len, f"expected a multiple of mesh.context = {shards}")
    used = [pair for layer in resolve(cfg) for pair in _transitions(layer.mix)]
    able = {mixer: STRATEGIES[transition] for mixer, transition, _ in used}
    for name in names:
        if not any(name in of_mixer for of_mixer in able.values()):
            allowed = "; ".join(f"{mixer}: {' or '.join(of_mixer)}" for mixer, of_mixer in sorted(able.items()))
            raise ConfigError("mesh.strategy", name, f"expected what a mixer of the model has ({allowed})")
    for mixer, transition, options in used:
        taps, length = getattr(options, "conv_width", 1), seq_len // shards
        if taps - 1 > length:
            allowed = f"{mixer} sees {taps - 1} tokens back, and a device has {length} of a row"
            raise ConfigError("mesh.context", shards, allowed)
        if strategy(transition, names) == "ulysses":
            _check_heads(mixer, options, sizes, able[mixer])


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
            others = [other for other in able if other != "ulysses"]
            allowed = f"{mixer} has {name} = {n}; expected a multiple of context = {sizes['context']} per tensor shard"
            raise ConfigError("mesh.strategy", "ulysses", allowed + "".join(f", or {other}" for other in others))
