"""Run folders as training leaves them, with figures made up by the tests."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from hydrax.core.build import build, override
from hydrax.train import folder
from hydrax.train.config import RunConfig
from hydrax.train.metrics import JsonlWriter, Record, write_json

SMALL = {"model.d_model": 16, "model.vocab_size": 64, "data.seq_len": 64, "train.steps": 40, "train.batch_size": 4}
ENVIRONMENT = {"python": "3.11.7", "packages": {"jax": "0.10.2"}, "backend": "cpu", "devices": {"cpu": 1}, "git": "abc"}


def config(**keys: Any) -> dict[str, Any]:
    """The resolved config of a small run; keys have `__` for dots."""
    values: dict[str, Any] = {}
    for key, value in {**SMALL, **{k.replace("__", "."): v for k, v in keys.items()}}.items():
        override(values, key, value)
    return folder.as_dict(build(RunConfig, values))


def write_run(
    place: pathlib.Path,
    values: Mapping[str, Any],
    summary: Mapping[str, Any] | None = None,
    records: Sequence[Record] = (),
    environment: Mapping[str, Any] = ENVIRONMENT,
) -> pathlib.Path:
    """A run folder; one without a summary is unfinished."""
    place.mkdir(parents=True)
    write_json(place / "config.json", values)
    write_json(place / "environment.json", environment)
    writer = JsonlWriter(place / "metrics.jsonl")
    for record in records:
        fields = {k: v for k, v in record.items() if k not in ("step", "timing")}
        writer.write(record["step"], fields, record.get("timing", {"seconds": 0.1 * record["step"]}))
    writer.close()
    if summary is not None:
        facts = {"steps": values["train"]["steps"], "parameters": 1000, "tokens_per_second": 100.0, "baselines": {}}
        write_json(place / "summary.json", {**facts, **summary})
    return place


def read_csv(path: pathlib.Path) -> list[dict[str, str]]:
    import csv

    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
