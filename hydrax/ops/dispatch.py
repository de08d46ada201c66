"""Choosing an implementation: `impl=None` picks one and says so once; a name that cannot serve raises."""

import functools
from collections.abc import Callable, Mapping

from absl import logging


def select(op: str, impl: str | None, forms: Mapping[str, Callable], default: str, shape: tuple) -> Callable:
    """`forms[impl]`, or `forms[default]` when `impl` is None (logged once per op and shape).

    Raises:
      ValueError: `impl` names nothing this op has.
    """
    if impl is None:
        _log_choice(op, default, shape)
        return forms[default]
    if impl not in forms:
        raise ValueError(f"{op}: impl = {impl!r}: expected one of {', '.join(forms)}, or None to choose")
    return forms[impl]


@functools.cache
def _log_choice(op: str, impl: str, shape: tuple) -> None:
    logging.info("%s %s runs as %r", op, shape, impl)
