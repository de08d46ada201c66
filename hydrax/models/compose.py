"""From the mixer of a block, a name or a composition like heads(2*attn, 6*gdn), to its resolved description."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Protocol

from flax import nnx

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.models import pattern as patterns
from hydrax.models.fusion import WITH_LSE, FusionConfig, Heads, HeadsOptions, Parallel
from hydrax.models.layers import BlockConfig
from hydrax.models.mix import Mix, Single, take_projection
from hydrax.models.modes import READABLE, Modes, ModesOptions
from hydrax.models.route import Route, RouteOptions


class Names(Protocol):
    """What names stand for: the part of a model's config that compositions read."""

    @property
    def d_model(self) -> int: ...

    @property
    def blocks(self) -> Mapping[str, Any]: ...

    @property
    def mixers(self) -> Mapping[str, Any]: ...


def mix_of(
    names: Names,
    expression: str,
    options: Mapping[str, Any],
    path: str,
    width: int,
    places: list[int],
    index: int,
) -> Mix:
    """The mixer or composition of a block. `options` are its own; those of parts are found under their names."""
    try:
        made = patterns.composition(expression)
    except ConfigError as error:
        raise error.under(path) from None
    key = _key(path)
    if made is None:
        if expression not in mixers.TABLE:
            raise ConfigError(key, expression, f"expected one of {', '.join(mixers.names())}")
        own = f"{path}.options" if options else f"mixers.{expression}"
        return Single(expression, _filled(expression, options_of(expression, options, names, own), width, own))
    kind, parts = made
    for part in parts:
        if kind != "heads" and (part.count, part.indices) != (None, None):
            raise ConfigError(key, expression, f"{kind} takes parts without numbers of heads")
    where = f"{path}.options" if options else key
    if kind == "heads":
        return _heads(
            names, expression, parts, build(HeadsOptions, options, where), (path, where), width, places, index
        )
    members = tuple(_member(names, part.expression, path, width) for part in parts)
    sizes = {"modes": 1, "route": 2}
    if len(members) != sizes.get(kind, max(2, len(members))):
        raise ConfigError(key, expression, f"{kind} takes {sizes.get(kind, 'at least 2')} parts")
    return _COMPOSED[kind](expression, members, options, where, width)


def _key(path: str) -> str:
    """Where the mixer of a block stands, or of a layer that the pattern itself describes."""
    return path if path == "pattern" else f"{path}.mixer"


def _parallel(expression: str, members: tuple[Mix, ...], options: Mapping[str, Any], where: str, width: int) -> Mix:
    fusion = _fusion(build(FusionConfig, options, where), "mean_norm", len(members), where)
    if fusion.fusion == "flat":
        _check_flat(members, where, width)
    widths = [math.prod(_out_shape(member, width)) for member in members]
    if fusion.fusion != "concat" and len(set(widths)) > 1:
        raise ConfigError(
            where, expression, f"parts that are added must be equally wide, and are {_listed(members, widths)}"
        )
    return Parallel(members, fusion)


def _check_flat(members: tuple[Mix, ...], where: str, width: int) -> None:
    """Raises `ConfigError` for branches that cannot be one softmax."""
    for member in members:
        options: Any = member.options if isinstance(member, Single) and member.mixer in WITH_LSE else None
        if options is None or options.out_gate != "none" or getattr(options, "hops", None):
            allowed = f"{member.label} has no lse beside what it averages: expected {' or '.join(WITH_LSE)}"
            raise ConfigError(f"{where}.fusion", "flat", f"{allowed} without out_gate or hops")
    shapes = [_out_shape(member, width) for member in members]
    if len(set(shapes)) > 1:
        allowed = f"expected parts of equal heads and value_dim, and they have {', '.join(map(str, shapes))}"
        raise ConfigError(f"{where}.fusion", "flat", allowed)


def _modes(expression: str, members: tuple[Mix, ...], options: Mapping[str, Any], where: str, width: int) -> Mix:
    (member,) = members
    if not isinstance(member, Single) or member.mixer not in READABLE:
        raise ConfigError(where, expression, f"expected modes of one of {', '.join(READABLE)}")
    return Modes((member,), build(ModesOptions, options, where))


def _route(expression: str, members: tuple[Mix, ...], options: Mapping[str, Any], where: str, width: int) -> Mix:
    full, sparse = members
    widths = [math.prod(_out_shape(member, width)) for member in members]
    if widths[0] != widths[1]:
        raise ConfigError(where, expression, f"both parts must be equally wide, and are {_listed(members, widths)}")
    return Route((full, sparse), build(RouteOptions, options, where), width)


_COMPOSED = {"parallel": _parallel, "modes": _modes, "route": _route}


def _fusion(options: FusionConfig, default: str, parts: int, where: str) -> FusionConfig:
    own = {f.name: getattr(options, f.name) for f in dataclasses.fields(FusionConfig)}
    fusion = FusionConfig(**{**own, "fusion": options.fusion or default})
    try:
        fusion.check(parts)
    except ConfigError as error:
        raise error.under(where) from None
    return fusion


def _member(names: Names, expression: str, path: str, width: int, **forced: Any) -> Mix:
    """A part: a block's mixer with its options, a mixer, or a composition again."""
    if expression in names.blocks:
        block = build(BlockConfig, names.blocks[expression], f"blocks.{expression}")
        expression, options, path = block.mixer, block.options, f"blocks.{expression}"
    else:
        options = {}
    if forced and expression in mixers.TABLE:
        own = f"{path}.options" if options else f"mixers.{expression}"
        given = options_of(expression, options, names, own)
        fields = {f.name for f in dataclasses.fields(mixers.get(expression).Config)}
        defaults = {name: value for name, value in forced.pop("defaults").items() if name in fields}
        return Single(expression, _filled(expression, {**defaults, **given, **forced}, width, own))
    if expression not in mixers.TABLE and patterns.composition(expression) is None:
        known = ", ".join([*names.blocks, *mixers.names()])
        raise ConfigError(_key(path), expression, f"expected parts among {known}")
    if forced:
        raise ConfigError(_key(path), expression, "expected single mixers as the parts of heads(...)")
    return mix_of(names, expression, options, path, width, [0], 0)


def _heads(
    names: Names,
    expression: str,
    parts: list[patterns.Part],
    options: HeadsOptions,
    paths: tuple[str, str],
    width: int,
    places: list[int],
    index: int,
) -> Mix:
    path, where = paths
    split = [_assigned(parts, options, where, expression, occurrence) for occurrence in range(len(places))]
    own = split[places.index(index)]
    total = sum(map(len, own))
    if width % total and options.total is None:
        raise ConfigError(where, expression, f"expected a number of heads that divides {width}, and not {total}")
    head = max(width // total, 1)
    members = []
    for part, indices in zip(parts, own, strict=True):
        option = _head_option(names, part.expression)
        defaults = {"key_dim": head, "nope_dim": head, "value_dim": head}
        members.append(_member(names, part.expression, path, width, defaults=defaults, **{option: len(indices)}))
    shapes, counts = [_out_shape(member, width) for member in members], list(map(len, own))
    if [n for n, _ in shapes] != counts:
        found = _listed(members, [n for n, _ in shapes])
        raise ConfigError(where, expression, f"expected {_listed(members, counts)} heads, and options make {found}")
    if len({n for _, n in shapes}) > 1:
        found = _listed(members, [n for _, n in shapes])
        raise ConfigError(where, expression, f"heads must have the same value_dim, and have {found}")
    orders = tuple(
        (place, tuple(i for indices in assigned for i in indices))
        for place, assigned in zip(places, split, strict=True)
    )
    if options.fusion == "flat":
        raise ConfigError(f"{where}.fusion", "flat", "heads have no keys in common: expected parallel(...)")
    return Heads(tuple(members), _fusion(options, "scale_norm", len(parts), where), orders)


def _assigned(
    parts: list[patterns.Part], options: HeadsOptions, where: str, expression: str, occurrence: int
) -> list[list[int]]:
    """Which heads each part has in that layer of the block: pinned ones first, the others in order."""
    pinned = [part.indices for part in parts]
    if options.assignment is not None:
        if len(parts) != 2 or options.total is None or any(p.indices or p.count for p in parts):
            raise ConfigError(f"{where}.assignment", expression, "needs heads(first, second) and total")
        if occurrence >= len(options.assignment):
            allowed = "expected heads for every layer of the block"
            raise ConfigError(f"{where}.assignment", len(options.assignment), allowed)
        pinned = [options.assignment[occurrence], None]
    counts = [p.count if indices is None else len(indices) for p, indices in zip(parts, pinned, strict=True)]
    known, open_ended = sum(n for n in counts if n is not None), counts.count(None)
    total = options.total or known + open_ended
    each = (total - known) // max(open_ended, 1)  # parts without a number share what is left
    taken = [i for indices in pinned for i in indices or ()]
    free = [i for i in range(total) if i not in taken]
    result = []
    for n, indices in zip(counts, pinned, strict=True):
        own = free[: each if n is None else n] if indices is None else list(indices)
        free = free if indices is not None else free[len(own) :]
        result.append(own)
    if sorted(i for own in result for i in own) != list(range(total)) or not all(result):
        found = ", ".join(f"{p.expression} {own}" for p, own in zip(parts, result, strict=True))
        raise ConfigError(
            where, expression, f"expected every head from 0 to {total - 1} in one part, and found {found}"
        )
    return result


def _head_option(names: Names, expression: str) -> str:
    """The option that says how many heads a part has."""
    name = names.blocks[expression]["mixer"] if expression in names.blocks else expression
    if name not in mixers.TABLE:
        return "heads"
    fields = {f.name for f in dataclasses.fields(mixers.get(name).Config)}
    if "heads" not in fields or "value_dim" not in fields:
        raise ConfigError("pattern", name, "this mixer has no heads to be split")
    return mixers.row(name).head_option


@functools.cache
def _out_shape(mix: Mix, d_model: int) -> tuple[int, int]:
    """Heads, and values per head, that the output projection of a part reads."""
    return take_projection(nnx.eval_shape(lambda: mix.build(d_model, rngs=nnx.Rngs(0))))


def _listed(members: tuple[Mix, ...] | list[Mix], sizes: list[int]) -> str:
    return ", ".join(f"{member.label} {n}" for member, n in zip(members, sizes, strict=True))


def options_of(name: str, values: Mapping[str, Any], names: Names, path: str) -> dict[str, Any]:
    """The options of a mixer as given: the preset's, under the model's, under the block's `values`."""
    if name not in mixers.TABLE:
        raise ConfigError(path, dict(mapping(values, path)), f"expected one of {', '.join(mixers.names())}")
    common, values = mapping(names.mixers.get(name, {}), f"mixers.{name}"), mapping(values, path)
    merged = over(common, values)
    config = mixers.get(name).Config
    if "preset" in merged:
        preset = merged.pop("preset")
        if preset not in list(config.PRESETS):  # what is given may be anything, and not hashable
            allowed = f"expected one of {', '.join(config.PRESETS)}" if config.PRESETS else f"{name} has no presets"
            raise ConfigError(f"{path}.preset", preset, allowed)
        merged = over(config.PRESETS[preset], merged)
    _filled(name, merged, names.d_model, path)
    return merged


def _filled(name: str, values: Mapping[str, Any], width: int, path: str) -> mixers.MixerConfig:
    options = build(mixers.get(name).Config, values, path)
    try:
        return options.fill(width)
    except ConfigError as error:
        raise error.under(path) from None


def over(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `base` under those that are given, section by section."""
    nested = {
        key: over(base[key], value)
        for key, value in given.items()
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
    }
    return {**base, **given, **nested}


def mapping(values: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(path, values, "expected a mapping of options")
    return values
