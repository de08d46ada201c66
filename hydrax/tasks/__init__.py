"""Synthetic tasks in numpy: a table of generators, each a pure function of a random generator."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hydrax.core.build import ConfigError, build
from hydrax.tasks.base import Task
from hydrax.tasks.mqar import MQAR

TABLE: Mapping[str, type[Task]] = MappingProxyType(
    {
        "mqar": MQAR,
    }
)


def make(name: str, options: Mapping[str, Any], path: str = "") -> Task:
    """The task of that name with these options, whose keys lie below `path` in errors.

    Raises:
      ConfigError: there is no such task, or an option is unknown or out of range.
    """
    if name not in TABLE:
        raise ConfigError("task", name, f"expected one of {', '.join(TABLE)}")
    return build(TABLE[name], options, path)
