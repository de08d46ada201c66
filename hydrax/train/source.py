"""What a run learns from, text (`hydrax.data`) or a task (`hydrax.tasks`), behind one interface."""

import dataclasses
import hashlib
import itertools
import sys
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from hydrax import tasks
from hydrax.core.build import ConfigError
from hydrax.data.landmarks import Landmarks, tokens_per_row
from hydrax.data.loader import DataConfig, open_data
from hydrax.data.modes import ModesConfig, modes
from hydrax.data.pack import Batch
from hydrax.data.tokenizer import open_tokenizer
from hydrax.models.mix import landmarks
from hydrax.models.spec import resolve
from hydrax.tasks.base import BLOCK, IGNORE, Sample, Split, Task, block, sha256
from hydrax.train.config import RunConfig


class Source(Protocol):
    """Batches of a run; see `hydrax.data.loader.Data`, whose methods these are."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def slices(self) -> tuple[str, ...]: ...

    @property
    def sha256(self) -> str: ...

    def train_batches(
        self, batch_size: int, seed: int, start_step: int = 0, part: slice = slice(None)
    ) -> Iterator[Batch]: ...

    def val_batches(self, batch_size: int, rows: int | None = None, part: slice = slice(None)) -> Iterator[Batch]: ...


def open_source(cfg: RunConfig) -> Source:
    """The data of a run.

    Raises:
      ConfigError: as `open_data` and `open_task`, or layers whose landmarks the data does not have.
    """
    every = cfg.data.landmark_every
    for section in {section for layer in resolve(cfg.model) for section in landmarks(layer.mix)} - {every}:
        raise ConfigError("data.landmark_every", every, f"expected {section}, the section of landmark layers")
    if cfg.data.task is None:
        return open_data(cfg.data, cfg.model.prefix.meta_tokens)
    return open_task(cfg.data, cfg.train.seed)


def vocabulary_of(cfg: DataConfig) -> int:
    """Number of token ids of a config's data, without reading these."""
    tokens = open_tokenizer(cfg.tokenizer).vocab_size if cfg.task is None else make_task(cfg).vocabulary
    return tokens + (cfg.landmark_every > 0)


def make_task(cfg: DataConfig) -> Task:
    """The task of a config, rows of `data.seq_len` tokens, the landmarks that will stand between them counted.

    Raises:
      ConfigError: an unknown task, or options that are not its own.
    """
    name, options = str(cfg.task), dict(cfg.task_options)
    if "length" in options:
        raise ConfigError("data.task_options.length", options["length"], "expected none; data.seq_len is the length")
    try:
        fields = tasks.fields(name)
        every = cfg.landmark_every
        length = tokens_per_row(cfg.seq_len, every) if every else cfg.seq_len
        return tasks.make(name, options | ({"length": length} if "length" in fields else {}))
    except ConfigError as error:
        if error.key == "length":
            raise ConfigError("data.seq_len", error.value, error.allowed) from None
        raise error.under("data" if error.key == "task" else "data.task_options") from None


@dataclasses.dataclass(frozen=True)
class TaskData:
    """Endless training rows, no two of them the same by design, and validation rows; row n depends on (seed, n) alone.

    A batch is a dict of tokens int32 [B,T], targets int32 and weights fp32 (1 where something is asked). Where the task
    knows how many answers Q a row has at most, `asked` int32 [B,Q] says where they are, and targets and weights are
    [B,Q]. Batches of validation also have slices fp32 [B,S], 1 where a row belongs to a slice. With a schedule of modes
    there are modes int32 [B,T]. Landmarks have the id behind the task's, and none of them is the last of a row.
    """

    name: str
    task: Task
    seed: int  # of validation rows
    threads: int
    modes: ModesConfig
    sha256: str  # over the first blocks of both splits
    landmark_every: int = 0

    @property
    def vocabulary(self) -> int:
        return self.task.vocabulary + (self.landmark_every > 0)

    @property
    def slices(self) -> tuple[str, ...]:
        return self.task.slices

    def train_batches(
        self, batch_size: int, seed: int, start_step: int = 0, part: slice = slice(None)
    ) -> Iterator[Batch]:
        """Endless batches; batch n is a function of (seed, n), found in O(1). With `part`, only these rows of each."""
        import grain  # takes seconds to import

        done = start_step * batch_size
        numbers = grain.MapDataset.range(done // BLOCK, sys.maxsize // BLOCK)
        made = numbers.map(lambda number: self._block(seed, "train", number))
        ahead = grain.ReadOptions(self.threads, prefetch_buffer_size=2 * self.threads)
        for batch in _cut(iter(made.to_iter_dataset(ahead)), batch_size, done % BLOCK):
            yield {name: x[part] for name, x in batch.items()}

    def val_batches(self, batch_size: int, rows: int | None = None, part: slice = slice(None)) -> Iterator[Batch]:
        """Once over `rows` validation rows (None: a block), the last batch filled up with rows that ask for nothing."""
        rows = BLOCK if rows is None else rows
        made = (self._block(self.seed, "eval", number) for number in itertools.count())
        for first, batch in zip(range(0, rows, batch_size), _cut(made, batch_size, 0), strict=False):
            real = np.arange(first, first + batch_size)[:, None] < rows
            batch["weights"] = batch["weights"] * real
            yield {name: x[part] for name, x in batch.items()}

    def _block(self, seed: int, split: Split, number: int) -> Batch:
        sample = block(self.task, self.name, seed=seed, split=split, number=number)
        inputs, targets = laid(sample, self.landmark_every, self.task.vocabulary)
        batch = {"tokens": inputs, **_targets(targets, self.task.labels(split))}
        if split == "eval":
            member = sample["meta"].get("slice", np.zeros(BLOCK, np.int32))
            batch["slices"] = np.eye(max(len(self.slices), 1), dtype=np.float32)[member]
        index = np.broadcast_to(np.arange(batch["tokens"].shape[1], dtype=np.int32), batch["tokens"].shape)
        whole = {"segment_ids": np.ones_like(index), "positions": index}
        chosen = modes(self.modes, whole, number * BLOCK + np.arange(BLOCK), seed=seed)
        return batch if chosen is None else {**batch, "modes": chosen}


def open_task(cfg: DataConfig, seed: int) -> TaskData:
    """The task of a config, its training rows those of `seed`.

    Raises:
      ConfigError: as `make_task`, or rows of a length that is not `data.seq_len`.
    """
    task, name = make_task(cfg), str(cfg.task)
    train = block(task, name, seed=seed, split="train", number=0)
    length = laid(train, cfg.landmark_every, task.vocabulary)[0].shape[1]
    if length != cfg.seq_len:
        raise ConfigError("data.seq_len", cfg.seq_len, f"expected {length}, the length of the rows of {name}")
    digests = [sha256(train), sha256(block(task, name, seed=cfg.seed, split="eval", number=0))]
    digest = hashlib.sha256("".join(digests).encode()).hexdigest()
    return TaskData(name, task, cfg.seed, cfg.threads, cfg.modes, digest, cfg.landmark_every)


def laid(sample: Sample, every: int, landmark: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, between them landmarks of that id that ask for nothing; `every` 0: none."""
    if not every:
        return sample["inputs"], sample["targets"]
    return Landmarks(every, landmark).lay(sample["inputs"]), Landmarks(every, IGNORE).lay(sample["targets"])


def _targets(targets: np.ndarray, labels: int | None) -> dict[str, np.ndarray]:
    """Targets and weights, of all tokens or, with at most `labels` answers per row, of these alone."""
    asked = targets >= 0
    if labels is None or labels >= targets.shape[1]:
        return {"targets": np.where(asked, targets, 0), "weights": asked.astype(np.float32)}
    most = int(asked.sum(1).max())
    if most > labels:
        raise ValueError(f"a row has {most} answers, its task said at most {labels}")
    places = np.argsort(~asked, axis=1, kind="stable")[:, :labels]
    batch = _targets(np.take_along_axis(targets, places, 1), None)
    return {"asked": places.astype(np.int32), **batch}


def _cut(blocks: Iterator[Batch], size: int, skipped: int) -> Iterator[Batch]:
    """Rows of blocks, but the first `skipped`, in batches of `size`."""
    rest = {name: x[skipped:] for name, x in next(blocks).items()}
    while True:
        parts, have = [rest], len(rest["tokens"])
        while have < size:
            parts.append(next(blocks))
            have += len(parts[-1]["tokens"])
        joined = rest if len(parts) == 1 else {name: np.concatenate([p[name] for p in parts]) for name in rest}
        yield {name: x[:size] for name, x in joined.items()}
        rest = {name: x[size:] for name, x in joined.items()}
