"""Disturbs training runs in every way that clusters do, and compares each with a run that nobody disturbed.

    python -m tests.faults.campaign --kills=40 --seed=0 --output=docs/results/faults.json

Every fault is counted; the campaign ends at the first run whose records differ, the first checkpoint that is lost
beyond the newest, or the first failure that does not say in one line what it is. On Linux; on CPUs, or with --gpus on
those of this host, each process on one of its own: that many processes at most (not run by us on several).
"""

import argparse
import ctypes
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from hydrax.train import checkpoint, metrics
from hydrax.train.processes import HEARTBEAT

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 160
CONFIG = {
    "model.d_model": 16,
    "model.pattern": "attn",
    "model.ffn": "none",
    "data.seq_len": 16,
    "data.val_fraction": 0.4,
    "data.threads": 1,
    "train.steps": STEPS,
    "train.batch_size": 8,
    "train.accumulate": 1,
    "train.dtype": "float32",
    "train.log_every": 1,
    "train.save_every": 5,
    "train.eval_every": 40,
    "train.eval_rows": 8,
    "optim.warmup": 2,
    "sample.tokens": 0,
}


class Trainer:
    """`launch.train` in one or more processes on one run folder."""

    def __init__(
        self,
        base: pathlib.Path,
        workdir: pathlib.Path,
        *,
        processes: int = 1,
        devices: int = 1,
        gpus: bool = False,
        before: Callable[[], object] | None = None,
    ):
        """Begins to train; each process has so many `devices`, or one of the `gpus`, and calls `before` first."""
        self.workdir = workdir
        self._left = set(_unfinished(workdir))  # by a process that was killed
        texts = {**CONFIG, "data.path": base / "text"}
        command = [sys.executable, "-m", "launch.train", "--config=quickstart", f"--workdir={workdir}"]
        command += [f"--config.{key}={value}" for key, value in texts.items()]
        settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        if gpus:  # kernels chosen by their speed would differ between two starts
            settings = {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}
        joined: list[list[str]] = [[]]
        if processes > 1:
            join = [f"--coordinator=localhost:{free_port()}", f"--processes={processes}"]
            joined = [[*join, f"--process_id={i}"] for i in range(processes)]
        self.outputs = [tempfile.TemporaryFile("w+") for _ in joined]  # noqa: SIM115
        self.processes = [
            subprocess.Popen(
                command + flags,
                cwd=ROOT,
                env=os.environ | settings | ({"CUDA_VISIBLE_DEVICES": f"{i}"} if gpus else {}),
                preexec_fn=before,
                stdout=file,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i, (flags, file) in enumerate(zip(joined, self.outputs, strict=True))
        ]

    def wait_for(self, reached: Callable[[], bool]) -> bool:
        """Whether that came true before a process ended."""
        while all(p.poll() is None for p in self.processes):
            if reached():
                return True
            time.sleep(0.001)
        return False

    def steps(self, count: int) -> Callable[[], bool]:
        """Whether there are that many records."""
        return lambda: sum(1 for _ in _lines(self.workdir)) >= count

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return not self._left.issuperset(_unfinished(self.workdir))

    def end(self) -> "Ended":
        """Waits for the end of all processes."""
        errors = [p.communicate(timeout=400)[1] for p in self.processes]
        outputs = []
        for file in self.outputs:
            file.seek(0)
            outputs.append(file.read())
            file.close()
        return Ended([p.returncode for p in self.processes], outputs, errors)

    def finish(self) -> str:
        """The output of process 0, once the run is complete."""
        ended = self.end()
        assert not any(ended.codes), ended
        return ended.outputs[0]


class Ended(NamedTuple):
    """What each process left: its exit code, stdout and stderr."""

    codes: list[int]
    outputs: list[str]
    errors: list[str]

    def failed(self, process: int, words: str) -> None:
        """Asserts that the process failed, with one line on stderr, and these words in it."""
        error = self.errors[process]
        assert self.codes[process] != 0 and words in error and error.count("\n") == 1, self


class Campaign:
    """The faults, each a method that disturbs runs in a folder of its own; `counts` says how often what happened."""

    def __init__(self, base: pathlib.Path, seed: int, gpus: int = 0):
        self.base, self.dice, self.counts, self.gpus = base, random.Random(seed), dict[str, int](), gpus
        self._whole: dict[tuple[int, int], list[dict]] = {}
        _text(base / "text")

    def trainer(self, workdir: pathlib.Path, **how: Any) -> Trainer:
        """On the devices of this campaign."""
        return Trainer(self.base, workdir, gpus=self.gpus > 0, **how)

    def whole(self, processes: int = 1, devices: int = 1) -> list[dict]:
        """The records of an undisturbed run."""
        key = processes, devices
        if key not in self._whole:
            workdir = self.base / f"whole{processes}x{devices}"
            self.trainer(workdir, processes=processes, devices=devices).finish()
            self._whole[key] = records(workdir)
        return self._whole[key]

    def complete(self, workdir: pathlib.Path, processes: int = 1) -> str:
        """Lets the run go on to its end and compares; gives the output."""
        output = self.trainer(workdir, processes=processes).finish()
        assert records(workdir) == self.whole(processes), f"the records of {workdir} differ"
        self._count("resumed curves bit-equal to the undisturbed one")
        return output

    def kills(self, count: int) -> None:
        """SIGKILL at random moments: from the start of the process on, between steps, and while a checkpoint is
        written."""
        workdir, run = self.base / "killed0", 0
        for kill in range(count):
            trainer = self.trainer(workdir)
            done = sum(1 for _ in _lines(workdir))
            if kill % 4 == 3:
                time.sleep(self.dice.random() * 4)  # start-up: imports, locks, restoring
            else:
                trainer.wait_for(trainer.steps(done + self.dice.randrange(1, 20)))
                if kill % 2:
                    trainer.wait_for(trainer.saving)
                time.sleep(self.dice.random() * 0.01)
            seen = _steps(workdir)
            hit = "SIGKILL during a save" if trainer.saving() else "SIGKILL between saves"
            trainer.processes[0].kill()
            killed = trainer.end().codes == [-signal.SIGKILL]
            self._count(hit if killed else "runs that ended before the kill")
            kept, damaged = checkpoint.newest(workdir)
            assert not damaged, f"{workdir}: damaged checkpoints {damaged} after a kill"
            assert not seen or (kept is not None and kept >= max(seen)), (
                f"{workdir}: step {max(seen)} lost, kept {kept}"
            )
            if (workdir / "summary.json").exists() or done > STEPS - 40:
                self.complete(workdir)
                run += 1
                workdir = self.base / f"killed{run}"
        self.complete(workdir)

    def stopped(self, name: str, processes: int = 1, at: int = 20, who: int = 0) -> pathlib.Path:
        """A run folder whose run was asked to stop by SIGTERM to process `who`: all end at one saved step."""
        workdir = self.base / name
        trainer = self.trainer(workdir, processes=processes)
        assert trainer.wait_for(trainer.steps(at)), trainer.end()
        trainer.processes[who].send_signal(signal.SIGTERM)
        output = trainer.finish()
        step = int(output.partition("SIGTERM: saved at step ")[2].partition(";")[0])
        assert checkpoint.newest(workdir) == (step, []), (step, _steps(workdir))
        return workdir

    def terminated(self) -> None:
        """SIGTERM on either of two processes."""
        for who in (0, 1):
            workdir = self.stopped(f"terminated{who}", processes=2, at=self.dice.randrange(5, 60), who=who)
            self._count("SIGTERM on one of two processes")
            self.complete(workdir, processes=2)

    def lost(self) -> None:
        """SIGKILL or SIGSTOP to one of several processes: the others end soon, each in one line."""
        cases = [(2, 0, signal.SIGKILL), (2, 1, signal.SIGKILL), (4, 3, signal.SIGKILL)]
        cases += [(2, 0, signal.SIGSTOP), (2, 1, signal.SIGSTOP)]
        for case, (processes, who, how) in enumerate(c for c in cases if c[0] <= (self.gpus or c[0])):
            workdir = self.base / f"lost{case}"
            trainer = self.trainer(workdir, processes=processes)
            assert trainer.wait_for(trainer.steps(self.dice.randrange(10, 60))), trainer.end()
            trainer.processes[who].send_signal(how)
            for process in trainer.processes[:who] + trainer.processes[who + 1 :]:
                process.wait(timeout=2 * HEARTBEAT)
            trainer.processes[who].kill()
            ended = trainer.end()
            for survivor in set(range(processes)) - {who}:
                ended.failed(survivor, "stopped: another process of the run is lost")
            self._count(f"{how.name} to one of {processes} processes")
            self.complete(workdir, processes=processes)

    def damaged(self) -> None:
        """The largest file of the newest checkpoint cut in half, or with one bit flipped anywhere in any file."""
        for kind in ("truncated", "bit flipped", "bit flipped"):
            workdir = self.stopped(f"damaged{sum(self.counts.values())}")
            newest = max(_steps(workdir))
            files = [
                p for p in (workdir / "checkpoints" / str(newest)).glob("*/**/*") if p.stat().st_size and p.is_file()
            ]
            path = (
                max(files, key=lambda p: p.stat().st_size) if kind == "truncated" else self.dice.choice(sorted(files))
            )
            content = bytearray(path.read_bytes())
            if kind == "truncated":
                content = content[: len(content) // 2]
            else:
                content[self.dice.randrange(len(content))] ^= 1 << self.dice.randrange(8)
            path.write_bytes(content)
            output = self.complete(workdir)
            assert f"checkpoint {newest} of {workdir} is damaged" in output, output
            self._count(f"{kind} checkpoint file")

    def full(self) -> None:
        """The checkpoint in the background finds no space, those before stand: no file may grow beyond a few kB, or the
        disk is full (a small tmpfs, which takes root)."""
        workdir = self.stopped("limited", at=30)
        self._refused(workdir, "File too large", before=_limit_files)
        self._count("full disk (RLIMIT_FSIZE)")
        self.complete(workdir)
        workdir = self.base / "full"
        workdir.mkdir()
        if os.geteuid() != 0 or not _mount(workdir, size="16m"):
            print("      no root, no tmpfs: a disk that is really full is left out", flush=True)
            return
        try:
            self.stopped("full", at=30)
            free = shutil.disk_usage(workdir).free
            (workdir / "ballast.tmp").write_bytes(bytes(free - 20_000))
            self._refused(workdir, "No space left on device")
            self._count("full disk (ENOSPC)")
            (workdir / "ballast.tmp").unlink()
            self.complete(workdir)
        finally:
            subprocess.run(["umount", workdir], check=True)

    def readonly(self) -> None:
        """A run folder that may not be written, also not by root."""
        workdir = self.stopped("readonly", at=30)
        folders = [workdir, *(p for p in workdir.rglob("*") if p.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        self._refused(workdir, "Permission denied", before=_obey_modes)
        for folder in folders:
            folder.chmod(0o755)
        self._count("read-only run folder")
        self.complete(workdir)

    def _refused(self, workdir: pathlib.Path, words: str, before: Callable[[], object] | None = None) -> None:
        """Asserts that a run cannot go on, and leaves the checkpoints as they are."""
        newest = checkpoint.newest(workdir)
        ended = self.trainer(workdir, before=before).end()
        ended.failed(0, "stopped: ")
        ended.failed(0, words)
        assert checkpoint.newest(workdir) == newest == (newest[0], [])

    def second(self) -> None:
        """A second trainer on the folder of a running one is refused, and does not disturb it."""
        workdir = self.base / "second"
        trainer = self.trainer(workdir)
        assert trainer.wait_for(trainer.steps(3)), trainer.end()
        refused = self.trainer(workdir).end()
        trainer.processes[0].kill()
        trainer.end()
        refused.failed(0, "is training in it")
        self._count("second trainer refused")
        self.complete(workdir)

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        print(f"{self.counts[what]:4d}  {what}", flush=True)


FAULTS = ("lost", "terminated", "damaged", "full", "readonly", "second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="SIGKILLs of a training process (40)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the damages (0)")
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=FAULTS, help="what else to do (everything)")
    parser.add_argument("--gpus", type=int, default=0, help="of this host to run on, at least 2 (0: on CPUs)")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file for the summary")
    given, began = parser.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory() as base:
        campaign = Campaign(pathlib.Path(base), given.seed, given.gpus)
        for fault in given.faults:
            getattr(campaign, fault)()
        if given.kills:
            campaign.kills(given.kills)
    summary = {
        "command": " ".join(["python -m tests.faults.campaign", *sys.argv[1:]]),
        "steps_per_run": STEPS,
        "counts": campaign.counts,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(summary, indent=2))
    if given.output:
        metrics.write_json(given.output, summary)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


def _lines(workdir: pathlib.Path) -> list[str]:
    path = workdir / "metrics.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def records(workdir: pathlib.Path) -> list[dict]:
    """All records without what clocks measured."""
    return [{k: v for k, v in r.items() if k != "timing"} for r in metrics.read(workdir / "metrics.jsonl")]


def _unfinished(workdir: pathlib.Path) -> list[tuple[str, int]]:
    """Name and inode of each checkpoint that has not got its final name."""
    entries = os.scandir(workdir / "checkpoints") if (workdir / "checkpoints").exists() else ()
    return [(e.name, e.inode()) for e in entries if "tmp" in e.name]


def _steps(workdir: pathlib.Path) -> list[int]:
    """The steps whose checkpoints are complete."""
    return [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]


def _limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))


def _obey_modes() -> None:
    """Gives up CAP_DAC_OVERRIDE, by which root writes where it may not."""
    drop, capability = 24, 1  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
    if os.geteuid() == 0:
        assert ctypes.CDLL(None).prctl(drop, capability) == 0


def _mount(place: pathlib.Path, size: str) -> bool:
    """Whether `place` now is a file system of its own, of this size."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place]
    return subprocess.run(command, capture_output=True).returncode == 0


def _text(folder: pathlib.Path) -> None:
    folder.mkdir()
    dice = random.Random(0)
    for i in range(8):
        words = (dice.choice(["alpha", "beta", "gamma", "delta", "epsilon"]) for _ in range(60))
        (folder / f"{i}.txt").write_text(" ".join(words), encoding="utf-8")


if __name__ == "__main__":
    main()
