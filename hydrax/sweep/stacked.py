"""The runs of a sweep in this process: those that differ in rate and seed alone are trained side by side."""

import concurrent.futures
import datetime
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from hydrax.core.build import ConfigError
from hydrax.sweep.attempt import Stop
from hydrax.sweep.local import REFRESH, passing_on_signals
from hydrax.sweep.runs import Run
from hydrax.sweep.status import ATTEMPTS, LOG, status, try_lock
from hydrax.train import folder, metrics
from hydrax.train.loop import summarise
from hydrax.train.stacked import Stack

NOTE = "stacked.json"
"""What was trained together, in the folder of each run."""

VARIED = (("optim", "lr"), ("train", "seed"))
"""In what the runs of a group may differ."""

Reasons = dict[str, str]


def groups(runs: Sequence[Run], stack: int) -> list[list[Run]]:
    """Runs that one program can train, at most `stack` together; larger groups are cut into nearly equal parts."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        values = folder.as_dict(run.cfg)
        for section, key in VARIED:
            del values[section][key]
        found.setdefault(json.dumps(values, sort_keys=True), []).append(run)
    return [
        [members[int(i)] for i in part]
        for members in found.values()
        for part in np.array_split(np.arange(len(members)), -(-len(members) // stack))
    ]


def run_all(
    runs: Sequence[Run], *, stack: int, ahead: int, watch: Callable[[], None]
) -> tuple[Reasons, signal.Signals | None]:
    """Completes the runs group by group; a group that fails does not stop the others.

    The programs of the next `ahead` groups are compiled meanwhile, each in a thread. There are no checkpoints: a group
    that is stopped begins anew.

    Returns:
      Why runs are not finished, by name, and the signal that stopped them, if one did.
    """
    left = [run for run in runs if status(run.folder).state != "finished"]
    reasons: Reasons = {}
    waiting = groups(left, stack)
    with passing_on_signals() as (stop, received), concurrent.futures.ThreadPoolExecutor(ahead) as pool:
        made: list[concurrent.futures.Future[Stack]] = []
        try:
            for i, group in enumerate(waiting):
                made += [pool.submit(_made, group) for group in waiting[len(made) : i + 1 + ahead]]
                while not made[i].done() and stop.signal is None:
                    watch()
                    concurrent.futures.wait([made[i]], REFRESH)
                if stop.signal is not None:
                    break
                why = _complete(group, made[i], stop, watch)
                made[i] = concurrent.futures.Future()  # its programs and its data are no longer needed
                reasons |= why
                watch()
        finally:
            pool.shutdown(cancel_futures=True)
    if received:
        reasons |= {r.name: "stopped" for r in left if status(r.folder).state != "finished" and r.name not in reasons}
    return reasons, received[0] if received else None


def _made(group: Sequence[Run]) -> Stack:
    return Stack([run.cfg for run in group])


def _complete(
    group: Sequence[Run], made: concurrent.futures.Future[Stack], stop: Stop, watch: Callable[[], None]
) -> Reasons:
    """Trains a group; why which of its runs are not finished."""
    with ExitStack() as held:
        try:
            writers = [held.enter_context(_attempt(run, group)) for run in group]
            stacked = made.result()
            recorder = _Recorder(group, stacked, writers, watch)
            stacked.train(recorder.record, recorder.validate, lambda: stop.signal is not None)
            if stop.signal is not None:
                return {run.name: "stopped" for run in group}
            return recorder.finish()
        except Exception as error:  # of whatever kind: the other groups go on
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            return {run.name: _failed(run, why) for run in group}


@contextmanager
def _attempt(run: Run, group: Sequence[Run]) -> Iterator[metrics.Writer]:
    """Holds the run's folder, and describes it; yields the writer of its records.

    Raises:
      ConfigError: another process trains in it, or it has checkpoints, which this would not continue.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with folder.lock(run.folder), (run.folder / LOG).open("ab") as log:
        if not try_lock(log):
            raise ConfigError("workdir", str(run.folder), "another process writes its log; expected none")
        if any((run.folder / "checkpoints").glob("*")):
            allowed = "it has checkpoints, from which --executor=local continues; expected none, or that executor"
            raise ConfigError("workdir", str(run.folder), allowed)
        count = status(run.folder).attempts + 1
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        log.write(f"\n== attempt {count}, {now}: one of {len(group)} runs trained side by side\n".encode())
        log.flush()
        metrics.write_json(run.folder / ATTEMPTS, {"count": count})
        metrics.cut_back(run.folder / "metrics.jsonl", 0)
        writer = metrics.JsonlWriter(run.folder / "metrics.jsonl")
        try:
            yield writer
        finally:
            writer.close()


class _Recorder:
    """Records and summaries of a group's runs."""

    def __init__(
        self, group: Sequence[Run], stacked: Stack, writers: Sequence[metrics.Writer], watch: Callable[[], None]
    ):
        self._group, self._stacked, self._writers, self._watch = group, stacked, writers, watch
        self._bad, self._skipped = np.zeros(len(group), int), np.zeros(len(group), int)
        self._lost: Reasons = {}
        self._began = self._shown = time.perf_counter()
        for run, cfg in zip(group, stacked.cfgs, strict=True):
            folder.describe(run.folder, cfg)
            note = {
                "about": "trained by launch.sweep --executor=stacked; there are no checkpoints, and seconds are those "
                "of all members together",
                "members": [member.name for member in group],
                "impl": stacked.impl,
                "steps_per_dispatch": stacked.steps,
                "compile_seconds": round(stacked.compile_seconds, 3),
            }
            metrics.write_json(run.folder / NOTE, note)

    def record(self, step: int, values: dict[str, np.ndarray]) -> None:
        cfg = self._stacked.cfgs[0]
        values = dict(values)
        self._bad = np.where(values.pop("taken") > 0, 0, self._bad + 1)
        self._skipped = values["skipped"].astype(int)
        for i in np.flatnonzero(self._bad == cfg.train.max_skipped):
            why = f"no finite loss or gradient in {cfg.train.max_skipped} steps in a row, up to step {step}"
            self._lost.setdefault(self._group[int(i)].name, why)
        if step % cfg.train.log_every == 0 or step == cfg.train.steps:
            self._write(step, values)
        if (now := time.perf_counter()) - self._shown > REFRESH:
            self._watch()
            self._shown = now

    def validate(self, step: int, values: dict[str, np.ndarray]) -> None:
        self._write(step, values)

    def _write(self, step: int, values: dict[str, np.ndarray]) -> None:
        cfg, seconds = self._stacked.cfgs[0], time.perf_counter() - self._began
        timing = {"seconds": round(seconds, 3)}
        if "loss" in values:
            timing["tokens_per_second"] = round(step * cfg.train.batch_size * cfg.data.seq_len / seconds, 1)
        for i, writer in enumerate(self._writers):
            if self._group[i].name not in self._lost:
                writer.write(step, {name: float(x[i]) for name, x in values.items()}, timing)

    def finish(self) -> Reasons:
        """Writes the summaries of the runs that have a result; why the others have none."""
        for i, run in enumerate(self._group):
            if run.name in self._lost:
                _failed(run, self._lost[run.name])
                continue
            records = metrics.read(run.folder / "metrics.jsonl")
            member = _Member(self._stacked, i)
            summary = summarise(member, member.cfg.train.steps, int(self._skipped[i]), records, {})
            metrics.write_json(run.folder / "summary.json", {**summary, "stacked": len(self._group)})
        return self._lost


class _Member:
    """What `summarise` needs of a run."""

    def __init__(self, stacked: Stack, i: int):
        self.cfg, self.data, self.plan = stacked.cfgs[i], stacked.data[i], stacked.plan
        self.compile_seconds = stacked.compile_seconds


def _failed(run: Run, why: str) -> str:
    count: Any = status(run.folder).attempts
    metrics.write_json(run.folder / ATTEMPTS, {"count": count, "failed": why})
    return why
