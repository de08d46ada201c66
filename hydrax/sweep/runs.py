"""From a sweep file to runs: every entry resolved and checked before anything starts."""

import dataclasses
import hashlib
import json
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

from hydrax.core.build import ConfigError, Raw, build, plain
from hydrax.core.config import evaluate, load_config
from hydrax.infer.sample import check_settings
from hydrax.sweep.grid import Entry
from hydrax.train import folder
from hydrax.train.config import RunConfig
from hydrax.train.source import vocabulary_of

MAIN = "launch.train"
CONFIG = "config"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of a sweep. Its folder has a name to read that ends in `id`, by which it is found again."""

    id: str  # a hash of the overrides: the same whatever else is in the grid
    overrides: dict[str, Any]  # as the config has them: dotted keys, and `config`, the base
    cfg: RunConfig
    folder: pathlib.Path
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.folder.name


def expand(sweep: str, workdir: str | pathlib.Path, overrides: Mapping[str, Any] | None = None) -> list[Run]:
    """The runs of the sweep file, in its order; entries that say the same are one run.

    Args:
      sweep: path or name of a file with `get_sweep`, e.g. `sweeps/ratio` or `configs/sweeps/ratio.py:size=340m`.
      workdir: holds the folders of all runs.
      overrides: flags for all entries; they win over what an entry says.

    Raises:
      ConfigError: there is no such sweep; an entry is wrong, and the error names it with key, value and what is
        allowed; an override of what the entries vary; a folder that belongs to a run with another config.
    """
    entries, overrides, workdir = _entries(sweep), dict(overrides or {}), pathlib.Path(workdir)
    for key, value in overrides.items():
        if len({as_text(entry[key]) if key in entry else None for entry in entries}) > 1:
            raise ConfigError(key, value, f"{sweep} varies this key; expected one that all its entries have in common")
    runs: dict[str, Run] = {}
    for number, entry in enumerate(entries, 1):
        try:
            run = _run({**entry, **overrides}, workdir)
        except ConfigError as error:
            place = f"{sweep}, entry {number} of {len(entries)}, {entry}: {error.key}"
            raise ConfigError(place, error.value, error.allowed) from None
        runs.setdefault(run.id, run)
    keys = varied(list(runs.values()))
    return [_named(run, keys) for run in runs.values()]


def varied(runs: list[Run]) -> list[str]:
    """The keys in which the runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.overrides)
    return [key for key in keys if len({json.dumps(run.overrides.get(key)) for run in runs}) > 1]


def as_text(value: Any) -> str:
    """A value as it stands on the command line."""
    value = value.item() if hasattr(value, "item") else plain(value)  # numpy's scalars have other reprs
    return str(value) if isinstance(value, str) else repr(value)


def _entries(sweep: str) -> list[Entry]:
    entries = evaluate(sweep, "sweep")
    if not isinstance(entries, list) or not entries:
        raise ConfigError("sweep", sweep, f"get_sweep returned {entries!r}, expected a list of entries")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
            place = f"{sweep}, entry {number} of {len(entries)}"
            raise ConfigError(place, entry, 'expected a dict such as {"config": "quickstart", "optim.lr": 0.01}')
    return entries


def _run(entry: Entry, workdir: pathlib.Path) -> Run:
    """What the entry stands for; built from the very text that the command will get. Its folder may be preliminary."""
    if CONFIG not in entry:
        raise ConfigError(CONFIG, None, "expected the config to start from, here or as --config")
    texts = {key: as_text(value) for key, value in entry.items() if key != CONFIG}
    base = str(entry[CONFIG])
    cfg = build(RunConfig, load_config(base, **{key: Raw(text) for key, text in texts.items()}).to_dict())
    check_settings(cfg.sample.temperature, cfg.sample.top_p, "sample")
    vocabulary = vocabulary_of(cfg.data)
    resolved = {CONFIG: base, **{key: _value(folder.as_dict(cfg), key) for key in texts}}
    identity = hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:8]
    place = next(workdir.glob(f"*-{identity}"), None)
    if place is not None:  # with the vocabulary that the run has found: it must not be that of another config
        model = dataclasses.replace(cfg.model, vocab_size=cfg.model.vocab_size or vocabulary)
        folder.enter(place, dataclasses.replace(cfg, model=model))
    command = (sys.executable, "-m", MAIN, *(f"--{CONFIG}.{key}={text}" for key, text in texts.items()))
    return Run(identity, resolved, cfg, place or workdir / identity, (*command, f"--{CONFIG}={base}"))


def _named(run: Run, keys: list[str]) -> Run:
    """With its folder: the one it has, or a new one named after what it has under `keys`."""
    place = run.folder
    if place.name == run.id:
        place = place.with_name(f"{_words(run.overrides, keys)}-{run.id}")
    return dataclasses.replace(run, folder=place, command=(*run.command, f"--workdir={place}"))


def _words(overrides: Mapping[str, Any], keys: list[str]) -> str:
    """For reading: text as it is, other values behind their key."""
    words = []
    for key in keys or [CONFIG]:
        value = overrides.get(key, "")
        text = pathlib.PurePath(value).name if isinstance(value, str) else f"{key.split('.')[-1]}{value}"
        words.append(re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-."))
    return "-".join(filter(None, words))[:60].rstrip("-.") or "run"


def _value(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values[name]
    return values
