"""Synthetic tasks in numpy: a table of generators, each a pure function of a random generator."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hydrax.core.build import ConfigError, build
from hydrax.tasks.babilong import BabiLong
from hydrax.tasks.base import Task
from hydrax.tasks.copying import Copying
from hydrax.tasks.induction import Induction
from hydrax.tasks.listops import ListOps
from hydrax.tasks.mqar import MQAR
from hydrax.tasks.passkey import Passkey
from hydrax.tasks.phonebook import Phonebook
from hydrax.tasks.ruler import CommonWords, FrequentWords, Needle, Variables
from hydrax.tasks.state_recall import StateRecall

TABLE: Mapping[str, type[Task]] = MappingProxyType(
    {
        "babilong": BabiLong,
        "copying": Copying,
        "induction": Induction,
        "listops": ListOps,
        "mqar": MQAR,
        "passkey": Passkey,
        "phonebook": Phonebook,
        "ruler_common_words": CommonWords,
        "ruler_frequent_words": FrequentWords,
        "ruler_needle": Needle,
        "ruler_variables": Variables,
        "state_recall": StateRecall,
    }
)


def make(name: str, options: Mapping[str, Any]) -> Task:
    """The task of that name with these options.

    Raises:
      ConfigError: there is no such task, or an option is unknown or out of range.
    """
    return build(_row(name), options)


def fields(name: str) -> tuple[str, ...]:
    """The options of a task.

    Raises:
      ConfigError: there is no such task.
    """
    return tuple(field.name for field in dataclasses.fields(_row(name)))


def _row(name: str) -> type[Task]:
    if name not in TABLE:
        raise ConfigError("task", name, f"expected one of {', '.join(TABLE)}")
    return TABLE[name]
