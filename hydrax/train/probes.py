"""Probes: what a language model of bytes recalls while it is trained, on tasks in bytes that it is not trained on."""

import dataclasses
from typing import Any

import numpy as np

from hydrax import tasks
from hydrax.core.build import ConfigError
from hydrax.data.landmarks import tokens_per_row
from hydrax.data.tokenizer import ByteTokenizer
from hydrax.tasks import text
from hydrax.tasks.base import IGNORE, Sample, Task, block, sha256
from hydrax.train.config import RunConfig
from hydrax.train.source import TaskData

LINE_BREAK = 10
IDS = np.arange(text.VOCABULARY, dtype=np.int32)
IDS[[text.PAD, text.BOS, text.EOS]] = ByteTokenizer.pad, ByteTokenizer.bos, ByteTokenizer.eos
IDS[text.SEP] = LINE_BREAK


@dataclasses.dataclass(frozen=True)
class AsText(Task):
    """A task in bytes as text of `ByteTokenizer`: its special tokens, and a new line before the question."""

    task: text.TextTask

    @property
    def vocabulary(self) -> int:
        return len(ByteTokenizer.pieces)

    @property
    def slices(self) -> tuple[str, ...]:
        return self.task.slices

    def labels(self, split: str) -> int | None:
        return self.task.labels(split)

    def sample(self, rng: np.random.Generator, rows: int, split: str) -> Sample:
        made = self.task.sample(rng, rows, split)
        asked = made["targets"] != IGNORE
        return {**made, "inputs": IDS[made["inputs"]], "targets": np.where(asked, IDS[made["targets"]], IGNORE)}


def make_probe(name: str, options: Any, length: int, path: str) -> AsText:
    """A task in bytes with these options, by default on rows of `length` tokens alone; `path` is where they are.

    Raises:
      ConfigError: no such task, none in bytes, or bad options.
    """
    if not isinstance(options, dict):
        raise ConfigError(path, options, "expected the options of a task, as {'length': 512}")
    if name not in tasks.TABLE or not issubclass(tasks.TABLE[name], text.TextTask):
        known = ", ".join(name for name, kind in tasks.TABLE.items() if issubclass(kind, text.TextTask))
        raise ConfigError(path, name, f"expected a task in bytes, one of {known}")
    try:
        task = tasks.make(name, {"length": length, "eval_factors": (1,), **options})
    except ConfigError as error:
        raise error.under(path) from None
    assert isinstance(task, text.TextTask)
    return AsText(task)


def open_probes(cfg: RunConfig) -> dict[str, TaskData]:
    """The probes of `train.probes`, by name.

    Raises:
      ConfigError: as `make_probe`, or the run does not learn text in bytes.
    """
    if not cfg.train.probes:
        return {}
    if cfg.data.task is not None or cfg.data.tokenizer != ByteTokenizer.name:
        raise ConfigError("train.probes", dict(cfg.train.probes), "expected none but for text in bytes")
    found, every = {}, cfg.data.landmark_every
    length = tokens_per_row(cfg.data.seq_len, every) if every else cfg.data.seq_len - cfg.model.prefix.meta_tokens
    for name, options in cfg.train.probes.items():
        task = make_probe(name, options, length, f"train.probes.{name}")
        digest = sha256(block(task, name, seed=cfg.data.seed, split="eval", number=0))
        found[name] = TaskData(name, task, cfg.data.seed, cfg.data.threads, cfg.data.modes, digest, every)
    return found
