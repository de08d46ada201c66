"""Run folders as a report reads them: what is finished with all it recorded, and why the rest is left out."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydrax.core.build import ConfigError
from hydrax.models.cost import Cost, cost
from hydrax.models.layers import LayerSpec
from hydrax.models.spec import model_config, resolve
from hydrax.sweep.status import ATTEMPTS, LOG, RECORD, status
from hydrax.train import metrics

MARKS = ("config.json", "summary.json", "metrics.jsonl", ATTEMPTS)
"""Any of these makes a folder that of a run."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run. `command` is the one that made it, and `sweep` that of its sweep, if they are recorded."""

    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    records: Sequence[metrics.Record]
    environment: Mapping[str, Any]
    command: str | None
    sweep: str | None = None
    evaluated: Mapping[str, float] = dataclasses.field(default_factory=dict)  # by launch.evaluate, suite/figure

    def get(self, key: str) -> Any:
        """The value of a dotted key of the config; None: absent."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    @property
    def seq_len(self) -> int:
        return int(self.config["data"]["seq_len"])

    @property
    def layers(self) -> Sequence[LayerSpec]:
        """The resolved layers; none if this version does not know the model."""
        return _layers(json.dumps(self.config["model"]))

    @property
    def cost(self) -> Cost | None:
        """That of decoding one sequence of the training length; None if this version does not know the model."""
        return _cost(json.dumps(self.config["model"]), self.seq_len)

    @property
    def fixed_bytes(self) -> int | None:
        """Of the cost's bytes, those in layers whose memory no longer grows: recurrent states and full windows."""
        now, later = self.cost, _cost(json.dumps(self.config["model"]), 2 * self.seq_len)
        if now is None or later is None:
            return None
        pairs = zip(now.layers, later.layers, strict=True)
        return sum(a.state_bytes + (a.kv_bytes if a.kv_bytes == b.kv_bytes else 0) for a, b in pairs)


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A run that is in no plot."""

    name: str
    state: str
    why: str


def read(folders: Sequence[str | pathlib.Path]) -> tuple[list[Run], list[LeftOut]]:
    """The runs at and below the folders, by name.

    Raises:
      ConfigError: a folder that does not exist, or folders in which no run is.
    """
    runs: list[Run] = []
    left: list[LeftOut] = []
    for name, folder in _find(folders).items():
        found = _read(name, folder)
        (runs if isinstance(found, Run) else left).append(found)  # type: ignore[arg-type]
    if not runs and not left:
        shown = ",".join(map(str, folders))
        raise ConfigError("runs", shown, "no runs found; expected folders of runs, with config.json and summary.json")
    return runs, left


def with_evaluations(runs: Sequence[Run], files: Sequence[str | pathlib.Path]) -> list[Run]:
    """The runs with what launch.evaluate found of them, by the last parts of their names.

    Raises:
      ConfigError: a file that is no evaluation.json, or in which none of the runs is.
    """
    found: dict[str, dict[str, float]] = {}
    for file in files:
        results = _object(pathlib.Path(file)).get("runs")
        if not isinstance(results, dict) or not all(isinstance(of_run, dict) for of_run in results.values()):
            raise ConfigError("evaluation", str(file), "expected an evaluation.json of launch.evaluate")
        names = {name: pathlib.PurePath(name).name for name in results}
        if not {run.name.rpartition("/")[2] for run in runs} & set(names.values()):
            raise ConfigError("evaluation", str(file), "has none of these runs; expected results of some of them")
        for name, last in names.items():
            found.setdefault(last, {}).update(_figures(results[name]))
    return [dataclasses.replace(run, evaluated=found.get(run.name.rpartition("/")[2], {})) for run in runs]


def _figures(results: Mapping[str, Any], path: str = "") -> dict[str, float]:
    """The finite numbers in nested results, by their path."""
    flat: dict[str, float] = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            flat |= _figures(value, f"{path}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            flat[f"{path}{key}"] = float(value)
    return flat


def _find(folders: Sequence[str | pathlib.Path]) -> dict[str, pathlib.Path]:
    """Run folders by name: their path below the folder that was given."""
    places: dict[pathlib.Path, pathlib.Path] = {}
    for text in folders:
        root = pathlib.Path(text)
        if not root.is_dir():
            raise ConfigError("runs", str(text), "no such folder; expected one or more, with commas between them")
        places |= {place: root for place in _walk(root) if place not in places}
    short = [p.relative_to(root).as_posix() if p != root else p.resolve().name for p, root in places.items()]
    long = [p.as_posix() for p in places]
    return dict(sorted(zip(short if len(set(short)) == len(short) else long, places, strict=True)))


def _walk(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Run folders at and below a folder; there is none inside another."""
    for place, below, files in os.walk(root):
        if set(MARKS) & set(files):
            below.clear()
            yield pathlib.Path(place)


def _read(name: str, folder: pathlib.Path) -> Run | LeftOut:
    now = status(folder)
    if now.summary is None:
        why = now.why or (f"ended after step {now.step}" if now.state == "broken" else f"at step {now.step}")
        return LeftOut(name, now.state, why)
    config = _object(folder / "config.json")
    for section in ("model", "data", "train", "optim"):
        if not isinstance(config.get(section), dict):
            return LeftOut(name, "broken", f"its config.json has no section {section}, or cannot be read")
    if not isinstance(config["data"].get("seq_len"), int):
        return LeftOut(name, "broken", "its config.json has no data.seq_len")
    records, environment = metrics.read(folder / "metrics.jsonl"), _object(folder / "environment.json")
    sweep = _object(folder.absolute().parent / RECORD).get("command")
    command = _command(folder, environment)
    return Run(name, config, now.summary, records, environment, command, _portable(sweep) if sweep else None)


def _command(folder: pathlib.Path, environment: Mapping[str, Any]) -> str | None:
    """What environment.json says, or for older runs of a sweep the first line of its log."""
    if text := environment.get("command"):
        return _portable(str(text))
    log = folder / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    found = next(filter(None, (re.match(r"== attempt \d+, \S+: (.*)", line) for line in lines)), None)
    return _portable(found[1]) if found else None


def _portable(command: str) -> str:
    """With the Python of whoever runs it."""
    return re.sub(r"^\S*python[\d.]*(?= )", "python", command)


def _object(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is none to read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


@functools.cache
def _layers(model: str) -> Sequence[LayerSpec]:
    try:
        return tuple(resolve(model_config(json.loads(model))))
    except ConfigError:  # of another version
        return ()


@functools.cache
def _cost(model: str, seq_len: int) -> Cost | None:
    try:
        return cost(json.loads(model), seq_len=seq_len)
    except ConfigError:  # of another version
        return None
