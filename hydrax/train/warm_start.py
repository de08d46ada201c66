"""Starting a run from the weights of another: matched layer by layer, so that patterns may differ."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from hydrax.core.build import ConfigError
from hydrax.core.typing import Array
from hydrax.models.layers import groups
from hydrax.models.spec import ModelConfig, resolve, sections
from hydrax.train.checkpoint import read_params
from hydrax.train.folder import read_config

STACKED = re.compile(r"periods/(\d+)/blocks/(\d+)/(.*)")

Pieces = dict[str, list[tuple[str, int | None]]]
"""For every parameter its names layer by layer, each with the index on axis 0 where it lies."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Names layer by layer: `layers/3/mixer/q/kernel`."""

    source: str
    steps: tuple[int, ...]
    reused: tuple[str, ...]
    new: tuple[str, ...]  # the source has nothing of that name and shape, or another mixer in that layer
    dropped: tuple[str, ...]  # of the source, without a place here

    def line(self) -> str:
        """For people; the lists belong into a file."""
        steps = ", ".join(map(str, self.steps))
        counts = f"{len(self.reused)} reused, {_some(self.new)} newly initialised, {_some(self.dropped)} dropped"
        return f"weights of {self.source} at step {steps}: {counts}"


def check_start(text: str) -> None:
    """Raises `ConfigError` unless `text` is about the folder of a run."""
    try:
        read_config(pathlib.Path(_parsed(text)[0]))
    except ConfigError as error:
        raise ConfigError("train.init_from", text, error.allowed) from None


def warm_start(text: str, cfg: ModelConfig, params: Mapping[str, Array]) -> tuple[dict[str, Array], Report]:
    """Fresh `params` of the model `cfg`, in which those of another run take their place.

    A parameter is reused where name, shape and, inside a mixer, the mixer of that layer are the same.

    Args:
      text: a run folder, for its newest intact checkpoint, or `folder@500`, or the mean of several: `folder@400,500`.

    Raises:
      ConfigError: no such run or checkpoint, or nothing in it that fits.
    """
    folder, steps = _parsed(text)
    try:
        saved, source, used = read_params(folder, steps)
    except ConfigError as error:
        raise ConfigError("train.init_from", text, error.allowed) from None
    theirs = {
        name: value if i is None else value[i]
        for path, value in saved.items()
        for name, i in pieces(source.model, [path], saved)[path]
    }
    ours, mixers = pieces(cfg, params, params), (_mixers(source.model), _mixers(cfg))
    reused: list[str] = []
    new: list[str] = []
    started = {}
    for path, parts in ours.items():
        value, changed = params[path], np.zeros(params[path].shape, params[path].dtype)
        kept = np.ones(value.shape[:1] if parts[0][1] is not None else (), bool)
        for name, i in parts:
            shape = value.shape if i is None else value.shape[1:]
            place = () if i is None else i
            fits = name in theirs and theirs[name].shape == shape and _same_mixer(name, *mixers)
            (reused if fits else new).append(name)
            if fits:
                changed[place], kept[place] = theirs[name], False
        started[path] = _replaced(value, changed, kept)
    if not reused:
        raise ConfigError("train.init_from", text, "no parameter of that run has a name and shape of this model's")
    dropped = sorted(theirs.keys() - set(reused))
    return started, Report(folder, tuple(used), tuple(sorted(reused)), tuple(sorted(new)), tuple(dropped))


def pieces(cfg: ModelConfig, paths: Mapping[str, Any] | list[str], params: Mapping[str, Any]) -> Pieces:
    """The names of the stacked parameters `paths`, layer by layer."""
    found = [g for section in sections(cfg) for g in groups(section)]

    def names(path: str) -> Iterator[tuple[str, int | None]]:
        if not (match := STACKED.fullmatch(path)):
            yield path, None
            return
        g, i = found[int(match[1])], int(match[2])
        for r in range(params[path].shape[0]):
            yield f"layers/{g.start + r * len(g.period) + i}/{match[3]}", r

    return {path: list(names(path)) for path in paths}


def _parsed(text: str) -> tuple[str, list[int]]:
    folder, at, steps = text.rpartition("@")
    if not at or pathlib.Path(text).exists():
        return text, []
    if not re.fullmatch(r"\d+(,\d+)*", steps):
        raise ConfigError("train.init_from", text, "expected <folder>, <folder>@<step>, or several steps with commas")
    return folder, [int(step) for step in steps.split(",")]


def _mixers(cfg: ModelConfig) -> list[str]:
    return [layer.mixer for layer in resolve(cfg)]


def _same_mixer(name: str, source: list[str], target: list[str]) -> bool:
    """Whether a name is outside of mixers, or its layer has the same mixer on both sides."""
    match = re.fullmatch(r"layers/(\d+)/mixer/.*", name)
    return match is None or source[int(match[1])] == target[int(match[1])]


def _replaced(value: Array, changed: np.ndarray, kept: np.ndarray) -> Array:
    """`changed` where layers are not `kept`, laid out as `value` is."""
    if kept.all():
        return value
    mask = kept.reshape(kept.shape + (1,) * (value.ndim - kept.ndim))
    replacement = jax.make_array_from_callback(value.shape, value.sharding, changed.__getitem__)
    return jax.numpy.where(mask, value, replacement) if kept.any() else replacement


def _some(names: tuple[str, ...], most: int = 3) -> str:
    """How many, and the first of them."""
    shown = ", ".join([*names[:most], *(["..."] if len(names) > most else [])])
    return f"{len(names)} ({shown})" if names else "0"
