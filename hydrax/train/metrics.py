"""Records of a run: `metrics.jsonl` always, TensorBoard and Weights & Biases if asked for."""

import contextlib
import hashlib
import importlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, Protocol

from hydrax.core.build import ConfigError

Record = dict[str, Any]


class Writer(Protocol):
    """Takes the records of a run, one per step and kind."""

    def write(self, step: int, values: Mapping[str, float], timing: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """One JSON object per line: step, values, and under `timing` whatever differs between equal runs."""

    def __init__(self, path: pathlib.Path):
        # Unbuffered: a record survives the process, and one that finds no room is not tried again at the end.
        self._path, self._file = path, path.open("ab", buffering=0)

    def write(self, step: int, values: Mapping[str, float], timing: Mapping[str, float]) -> None:
        # JSON has no NaN: a value that is not finite becomes null.
        finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
        line = (json.dumps({"step": step, **finite, "timing": dict(timing)}) + "\n").encode()
        with naming(self._path):
            while line:  # a disk that fills up takes a part first
                line = line[self._file.write(line) or 0 :]

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter:
    """Event files under `folder`; what an earlier process wrote after `step` is hidden."""

    def __init__(self, folder: pathlib.Path, step: int):
        module = _tensorboard()
        self._writer = module.SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float], timing: Mapping[str, float]) -> None:
        for name, value in {**values, **timing}.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A Weights & Biases run named after the run folder, continued when the folder is."""

    def __init__(self, project: str, workdir: pathlib.Path, config: Mapping[str, Any]):
        module = _wandb(project)
        identity = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]
        settings = {"project": project, "name": workdir.name, "id": identity, "resume": "allow"}
        self._run = module.init(dir=str(workdir), config=dict(config), **settings)

    def write(self, step: int, values: Mapping[str, float], timing: Mapping[str, float]) -> None:
        self._run.log({**values, **timing}, step=step)

    def close(self) -> None:
        self._run.finish()


def check_writers(*, tensorboard: bool, wandb: str | None) -> None:
    """Raises what `open_writers` would, and writes nothing."""
    if wandb is not None:
        _wandb(wandb)
    if tensorboard:
        _tensorboard()


def open_writers(
    workdir: pathlib.Path, step: int, *, tensorboard: bool, wandb: str | None, config: Mapping[str, Any]
) -> list[Writer]:
    """The writers of a run that continues after `step`.

    Raises:
      ConfigError: a writer whose package is not installed; the message names the extra.
    """
    writers: list[Writer] = []
    if wandb is not None:
        writers.append(WandbWriter(wandb, workdir, config))
    if tensorboard:
        writers.append(TensorBoardWriter(workdir / "tb", step))
    return [JsonlWriter(workdir / "metrics.jsonl"), *writers]


def read(path: pathlib.Path) -> list[Record]:
    """All complete records; a line torn by the death of its writer is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def append(path: pathlib.Path, step: int, values: Mapping[str, float]) -> None:
    """One more record in a file that is rarely written."""
    writer = JsonlWriter(path)
    writer.write(step, values, {})
    writer.close()


def cut_back(path: pathlib.Path, step: int) -> list[Record]:
    """Removes from the file, atomically, what lies after `step`; returns what remains."""
    records = [r for r in read(path) if r["step"] <= step]
    if path.exists():
        write_text(path, "".join(json.dumps(r) + "\n" for r in records))
    return records


def write_text(path: pathlib.Path, text: str) -> None:
    """The file as a whole or not at all, also if the process dies meanwhile."""
    partial = path.with_name(f"{path.name}.tmp")
    with naming(path):
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Puts the path into errors of writing, which do not know it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_json(path: pathlib.Path, values: Any) -> None:
    """Indented JSON, written atomically."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def _wandb(project: str) -> ModuleType:
    return _extra("wandb", "train.wandb", project, "wandb")


def _tensorboard() -> ModuleType:
    return _extra("tensorboardX", "train.tensorboard", True, "tensorboard")


def _extra(package: str, key: str, value: object, extra: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError:
        allowed = f"the package {package} is not installed; expected `pip install 'hydrax[{extra}]'`"
        raise ConfigError(key, value, allowed) from None
