"""The run folder: what an existing one means, and the files that describe a run."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any, Literal

import jax

from hydrax.core.build import ConfigError, build, differences, plain
from hydrax.models.spec import resolve
from hydrax.train.config import RunConfig
from hydrax.train.metrics import write_json

FREE = ("mesh",)
"""Sections in which a resumed run may differ from its beginning."""

BESIDE = ("attempts.json", "job.json", "log*.txt")
"""What a sweep keeps in the folder of a run, possibly before the run begins."""

LOCK = "lock"
"""Held by the process that trains in the folder; the kernel releases it when the process dies, however it dies."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def as_dict(cfg: RunConfig) -> dict[str, Any]:
    """The config as JSON has it (lists for tuples)."""
    return plain(dataclasses.asdict(cfg))


def layers(cfg: RunConfig) -> list[dict[str, Any]]:
    """The resolved layer list, one entry per layer."""
    return [{"mixer": layer.mixer, **plain(dataclasses.asdict(layer))} for layer in resolve(cfg.model)]


def enter(workdir: pathlib.Path, cfg: RunConfig) -> Literal["fresh", "resume", "complete"]:
    """Which case the folder is; see `loop.train`. Nothing is written.

    Raises:
      ConfigError: the folder holds something else, or a run of another config.
    """
    if not workdir.exists():
        return "fresh"
    if not workdir.is_dir():
        raise ConfigError("workdir", str(workdir), "expected a folder")
    if not (workdir / "config.json").exists():
        # A process that died before its first file was complete leaves only its lock and *.tmp.
        foreign = sorted(p.name for p in workdir.iterdir() if not any(map(p.match, ("*.tmp", LOCK, *BESIDE))))
        if foreign:
            allowed = f"the folder holds {foreign[0]!r} but no config.json; expected a new folder or that of a run"
            raise ConfigError("workdir", str(workdir), allowed)
        return "fresh"
    old, new = _without_free(read_config(workdir)), _without_free(as_dict(cfg))
    if changed := differences(old, new):
        allowed = (
            f"the folder belongs to a run with another config; expected a new folder, or back: {'; '.join(changed)}"
        )
        raise ConfigError("workdir", str(workdir), allowed)
    return "complete" if (workdir / "summary.json").exists() else "resume"


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the folder if there is none, and keeps other trainers out of it.

    Raises:
      ConfigError: another process trains in it, or it cannot be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        allowed = f"it cannot be made ({error.strerror}); expected a folder that can be written"
        raise ConfigError("workdir", str(workdir), allowed) from None
    with (workdir / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            allowed = f"{file.read().strip() or 'another process'} is training in it; expected another folder, or none"
            raise ConfigError("workdir", str(workdir), allowed) from None
        except OSError as error:  # a file system without locks
            print(f"{workdir} cannot be locked ({error.strerror}): let no second run write to it", flush=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
    """The contents of config.json.

    Raises:
      ConfigError: there is none, or it cannot be read.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise ConfigError("workdir", str(workdir), "expected the folder of a run, with config.json and checkpoints")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError("workdir", str(workdir), f"config.json cannot be read ({error})") from None


def describe(workdir: pathlib.Path, cfg: RunConfig) -> None:
    """Writes config.json first (it marks the folder as a run's), then layers.json and environment.json.

    The latter has the command line of this process, too.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", as_dict(cfg))
    write_json(workdir / "layers.json", layers(cfg))
    write_json(workdir / "environment.json", {**environment(), "command": shlex.join(sys.orig_argv)})


def describe_program(workdir: pathlib.Path, compiled: jax.stages.Compiled) -> None:
    """Writes program.json: bytes that a device needs for a training step, and XLA's counts, which leave out kernels."""
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    sizes = {name: getattr(memory, f"{name}_size_in_bytes", None) for name in ("argument", "temp", "output", "alias")}
    counts = {name: (costs or {}).get(name) for name in ("flops", "bytes accessed")}
    write_json(workdir / "program.json", {"bytes": sizes, "xla": counts})


def environment() -> dict[str, Any]:
    """Versions, devices and source revision."""
    kinds = [d.device_kind for d in jax.devices()]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "devices": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "processes": jax.process_count(),
        "git": _revision(),
    }


def parse(values: dict[str, Any], workdir: pathlib.Path) -> RunConfig:
    """The config of a saved run.

    Raises:
      ConfigError: it was written by a version with other keys.
    """
    try:
        return build(RunConfig, values)
    except ConfigError as error:
        raise ConfigError("workdir", str(workdir), f"its config does not fit this version ({error})") from None


def _without_free(values: dict[str, Any]) -> dict[str, Any]:
    return {section: keys for section, keys in values.items() if section not in FREE}


def _revision() -> str | None:
    """Commit of the source tree, marked if it has changes; None outside of one."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
