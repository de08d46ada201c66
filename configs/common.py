"""What configs share: all defaults in one place, and the argument after the colon of `file.py:variant,key=value`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from hydrax.core.build import ConfigError, Raw, convert
from hydrax.train.config import RunConfig


def base() -> ConfigDict:
    """Every key of a run at its default. Locked but for what is a mapping of free form, as `model.mixers`."""
    defaults = RunConfig()
    config = ConfigDict(dataclasses.asdict(defaults)).lock()
    _unlock(config, defaults)
    return config


def _unlock(config: ConfigDict, defaults: Any) -> None:
    """Unlocks the fields of a dataclass that are mappings, in all its sections."""
    for field in dataclasses.fields(defaults):
        value = getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            _unlock(config[field.name], value)
        elif isinstance(value, Mapping):
            config[field.name].unlock()


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """The values of `variant,key=value,...` over `defaults`, each as the type of its default.

    An entry without `=` is the first default's value.

    Raises:
      ConfigError: an unknown key, or a value of another type.
    """
    values, first = ConfigDict(defaults), next(iter(defaults), "config")
    for entry in filter(None, arg.split(",")):
        key, given, value = entry.partition("=")
        key, value = (key, value) if given else (first, entry)
        if key not in defaults:
            raise ConfigError(key, value, f"unknown argument of the config; allowed: {', '.join(defaults) or 'none'}")
        values[key] = convert(type(defaults[key]), Raw(value), key)
    return values


def one_of(key: str, value: str, table: Mapping[str, Any]) -> Any:
    """The row of a table of variants.

    Raises:
      ConfigError: there is none of that name.
    """
    if value not in table:
        raise ConfigError(key, value, f"expected one of {', '.join(table)}")
    return table[value]
