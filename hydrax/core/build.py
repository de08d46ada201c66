"""From untyped configuration to frozen dataclasses.

A config is a nested mapping until `build` turns it into a dataclass owned by the room that reads it. Defaults
live in the dataclass; types, choices and ranges are its annotations; everything wrong ends in one `ConfigError`.
"""

import ast
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union

T = TypeVar("T")

LARGEST = 2**30
"""Of integers: a sum of two of them is an int32, as positions are."""


class ConfigError(ValueError):
    """A value the user gave cannot be used. The message is one line: key, value, what is allowed."""

    def __init__(self, key: str, value: object, allowed: str):
        self.key, self.value, self.allowed = key, value, allowed
        super().__init__(" ".join(f"{key} = {value!r}: {allowed}".split()))

    def __reduce__(self) -> tuple[type, tuple[str, object, str]]:  # so that it crosses processes
        return type(self), (self.key, self.value, self.allowed)

    def under(self, path: str) -> "ConfigError":
        """The same error with its key below `path`."""
        return ConfigError(_join(path, self.key), self.value, self.allowed)


class Raw(str):
    """Text from a command line, converted by `build` to the type its field declares."""


@dataclasses.dataclass(frozen=True)
class Check:
    """A range restriction, attached to a field by `Annotated[type, Check(...)]`."""

    allowed: str
    holds: Callable[[Any], bool]


Positive = Annotated[int, Check("an integer >= 1", lambda x: x >= 1)]
NonNegative = Annotated[int, Check("an integer >= 0", lambda x: x >= 0)]
PositiveFloat = Annotated[float, Check("a number > 0", lambda x: x > 0)]
NonNegativeFloat = Annotated[float, Check("a number >= 0", lambda x: x >= 0)]
Fraction = Annotated[float, Check("a number from 0 to 1", lambda x: 0 <= x <= 1)]
ChunkSize = Annotated[int, Check("a positive multiple of 16", lambda x: x > 0 and x % 16 == 0)]
"""Tokens per chunk, where chunked forms cut these into blocks of 16."""


def build(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """An instance of the dataclass `cls` from a mapping, checked field by field.

    Raises:
      ConfigError: unknown key, wrong type, value out of range, or whatever `cls.__post_init__` refuses; the key
        is the full path below `path`.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(path, values, f"expected a mapping with the keys {_names(cls)}")
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(_join(path, str(key)), value, f"unknown key; {hint}allowed: {_names(cls)}")
    # A section passes through `build` with the defaults that `cls` has for it, also where it is not given.
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(fields[f.name]) and f.default_factory is not dataclasses.MISSING:
            given = values.get(f.name, {})
            if isinstance(given, Mapping):
                values = {**values, f.name: _merged(dataclasses.asdict(f.default_factory()), given)}
    built = {key: convert(fields[key], value, _join(path, key)) for key, value in values.items()}
    try:
        return cls(**built)
    except ConfigError as error:
        raise error.under(path) from None
    except TypeError as error:
        raise ConfigError(path or cls.__name__, dict(values), str(error)) from None


def convert(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint` declares, or a `ConfigError` naming `key`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        result = convert(args[0], value, key)
        for check in args[1:]:
            if result is not None and not check.holds(result):
                raise ConfigError(key, result, f"expected {check.allowed}")
        return result
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, Raw) and value.lower() in ("none", "null")):
            return None
        return convert(next(a for a in args if a is not type(None)), value, key)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, key)
    if origin is Literal:
        value = str(value) if isinstance(value, Raw) else value
        if value not in args:
            raise ConfigError(key, value, f"expected one of {', '.join(map(str, args))}")
        return value
    if isinstance(value, Raw):
        value = _parse(hint, value, key)
    return _checked(hint, origin, args, value, key)


def _checked(hint: Any, origin: Any, args: tuple, value: Any, key: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(key, value, "expected a finite number")
    if hint is int and isinstance(value, int) and abs(value) > LARGEST:
        raise ConfigError(key, value, f"expected an integer of at most {LARGEST}")
    if origin is tuple and args[-1] is Ellipsis and isinstance(value, (int, float)):
        value = (value,)  # 4 as well as (4,): what a shell passes on most easily
    if origin is tuple and isinstance(value, (list, tuple)):
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise ConfigError(key, value, f"expected {len(args)} values")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        return tuple(
            convert(kind, item, f"{key}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if (origin or hint) in (dict, Mapping):
        hint = Mapping
    kind = origin if isinstance(origin, type) else hint
    if not isinstance(value, kind) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(key, value, f"expected {_type_name(hint)}")
    return plain(value) if hint is Mapping else value


def _parse(hint: Any, text: Raw, key: str) -> Any:
    if hint is str:
        return str(text)
    if hint is bool and text.lower() in ("true", "false", "1", "0"):
        return text.lower() in ("true", "1")
    try:
        return {int: int, float: float}.get(hint, ast.literal_eval)(text)
    except (ValueError, SyntaxError):
        if hint is Any:
            return str(text)
        raise ConfigError(key, str(text), f"expected {_type_name(hint)}") from None


def override(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key` of a nested dict in place; parents are made as needed and checked later by `build`."""
    *parents, last = key.split(".")
    node = values
    for i, name in enumerate(parents):
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise ConfigError(key, value, f"{'.'.join(parents[: i + 1])} is a single value and has no keys")
    node[last] = value


def _merged(old: Any, new: Any) -> Any:
    """`new` over `old`, mapping by mapping."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


def plain(values: Any) -> Any:
    """A copy of nested mappings as dicts, for JSON and comparison."""
    if isinstance(values, Mapping):
        return {str(k): plain(v) for k, v in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(v) for v in values]
    return values


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines `key: old -> new` for every leaf in which two nested dicts differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = list(dict.fromkeys([*old, *new]))
        return [
            line
            for k in keys
            for line in differences(old.get(k, "(absent)"), new.get(k, "(absent)"), _join(path, str(k)))
        ]
    return [] if plain(old) == plain(new) else [f"{path}: {old!r} -> {new!r}"]


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path and key else path or key


def _names(cls: Any) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _type_name(hint: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", Mapping: "a mapping"}
    return names.get(hint, str(hint))
