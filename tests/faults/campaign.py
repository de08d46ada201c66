"""Disturbs training runs in every way that clusters do, and compares each with a run that nobody disturbed.

    python -m tests.faults.campaign --kills=40 --seed=0 --output=docs/results/faults.json

Every fault is counted; the campaign ends at the first run whose records differ, the first checkpoint that is lost
beyond the newest, or the first failure that does not say in one line what it is. CPU only.
"""

import argparse
import json
import os
import pathlib
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from hydrax.train import checkpoint, metrics

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 400
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
    "train.eval_every": 100,
    "train.eval_rows": 8,
    "optim.warmup": 2,
    "sample.tokens": 0,
}


class Trainer:
    """`launch.train` in one or more processes on one run folder."""

    def __init__(self, base: pathlib.Path, workdir: pathlib.Path, *, processes: int = 1, file_limit: int = 0):
        self.workdir = workdir
        self._left = set(_unfinished(workdir))  # by a process that was killed
        texts = {**CONFIG, "data.path": base / "text"}
        command = [sys.executable, "-m", "launch.train", "--config=quickstart", f"--workdir={workdir}"]
        command += [f"--config.{key}={value}" for key, value in texts.items()]
        settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
        limit: Callable[[], None] | None = None
        if file_limit:
            limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))  # noqa: E731
        joined: list[list[str]] = [[]]
        if processes > 1:
            join = [f"--coordinator=localhost:{_free_port()}", f"--processes={processes}"]
            joined = [[*join, f"--process_id={i}"] for i in range(processes)]
        self.outputs = [tempfile.TemporaryFile("w+") for _ in joined]  # noqa: SIM115
        self.processes = [
            subprocess.Popen(
                command + flags, cwd=ROOT, env=os.environ | settings, preexec_fn=limit, stdout=file, stderr=file
            )
            for flags, file in zip(joined, self.outputs, strict=True)
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

    def end(self) -> tuple[list[int], list[str]]:
        """Exit codes and outputs."""
        codes = [p.wait(timeout=400) for p in self.processes]
        texts = []
        for file in self.outputs:
            file.seek(0)
            texts.append(file.read())
            file.close()
        return codes, texts

    def finish(self) -> str:
        """The output of process 0, once the run is complete."""
        codes, outputs = self.end()
        assert not any(codes), f"exit codes {codes}:\n" + "\n".join(outputs)
        return outputs[0]


class Campaign:
    """The faults, each a method that disturbs runs in a folder of its own; `counts` says how often what happened."""

    def __init__(self, base: pathlib.Path, seed: int):
        self.base, self.dice, self.counts = base, random.Random(seed), dict[str, int]()
        self._whole: dict[int, list[dict]] = {}
        _text(base / "text")

    def whole(self, processes: int = 1) -> list[dict]:
        """The records of an undisturbed run."""
        if processes not in self._whole:
            workdir = self.base / f"whole{processes}"
            Trainer(self.base, workdir, processes=processes).finish()
            self._whole[processes] = _records(workdir)
        return self._whole[processes]

    def complete(self, workdir: pathlib.Path, processes: int = 1) -> str:
        """Lets the run go on to its end and compares; gives the output."""
        output = Trainer(self.base, workdir, processes=processes).finish()
        assert _records(workdir) == self.whole(processes), f"the records of {workdir} differ"
        self._count("resumed curves bit-equal to the undisturbed one")
        return output

    def kills(self, count: int) -> None:
        """SIGKILL at random moments: from the start of the process on, between steps, and while a checkpoint is
        written."""
        workdir, run = self.base / "killed0", 0
        for kill in range(count):
            trainer = Trainer(self.base, workdir)
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
            ended = trainer.end()[0][0]
            self._count(hit if ended == -signal.SIGKILL else "runs that ended before the kill")
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
        trainer = Trainer(self.base, workdir, processes=processes)
        assert trainer.wait_for(trainer.steps(at)), trainer.end()
        trainer.processes[who].send_signal(signal.SIGTERM)
        codes, outputs = trainer.end()
        assert not any(codes), (codes, outputs)
        step = int(outputs[0].partition("SIGTERM: saved at step ")[2].partition(";")[0])
        assert checkpoint.newest(workdir) == (step, []), (step, _steps(workdir))
        return workdir

    def terminated(self) -> None:
        """SIGTERM on either of two processes."""
        for who in (0, 1):
            workdir = self.stopped(f"terminated{who}", processes=2, at=self.dice.randrange(5, 60), who=who)
            self._count("SIGTERM on one of two processes")
            self.complete(workdir, processes=2)

    def lost(self) -> None:
        """SIGKILL on either of two processes: the other one ends in one line."""
        for who in (0, 1):
            workdir = self.base / f"lost{who}"
            trainer = Trainer(self.base, workdir, processes=2)
            assert trainer.wait_for(trainer.steps(self.dice.randrange(10, 60))), trainer.end()
            trainer.processes[who].kill()
            codes, outputs = trainer.end()
            assert codes[1 - who] != 0, codes
            _one_line(outputs[1 - who], "another process of the run is lost")
            self._count("lost process of two")
            self.complete(workdir, processes=2)

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
        """No file may grow beyond a few kB: the checkpoint in the background fails, those before stand."""
        workdir = self.stopped("full", at=30)
        before = checkpoint.newest(workdir)[0]
        codes, outputs = Trainer(self.base, workdir, file_limit=12_000).end()
        assert codes[0] == 1, (codes, outputs)
        _one_line(outputs[0], "stopped: ")
        assert checkpoint.newest(workdir) == (before, [])
        self._count("full disk (RLIMIT_FSIZE)")
        self.complete(workdir)

    def second(self) -> None:
        """A second trainer on the folder of a running one is refused, and does not disturb it."""
        workdir = self.base / "second"
        trainer = Trainer(self.base, workdir)
        assert trainer.wait_for(trainer.steps(3)), trainer.end()
        codes, outputs = Trainer(self.base, workdir).end()
        trainer.processes[0].kill()
        trainer.end()
        assert codes == [2], (codes, outputs)
        _one_line(outputs[0], "is training in it")
        self._count("second trainer refused")
        self.complete(workdir)

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        print(f"{self.counts[what]:4d}  {what}", flush=True)


FAULTS = ("terminated", "lost", "damaged", "full", "second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="SIGKILLs of a training process (40)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the damages (0)")
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=FAULTS, help="what else to do (everything)")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file for the summary")
    given, began = parser.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory() as base:
        campaign = Campaign(pathlib.Path(base), given.seed)
        if given.kills:
            campaign.kills(given.kills)
        for fault in given.faults:
            getattr(campaign, fault)()
    summary = {
        "command": " ".join(["python -m tests.faults.campaign", *sys.argv[1:]]),
        "steps_per_run": STEPS,
        "counts": campaign.counts,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(summary, indent=2))
    if given.output:
        metrics.write_json(given.output, summary)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


def _lines(workdir: pathlib.Path) -> list[str]:
    path = workdir / "metrics.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _records(workdir: pathlib.Path) -> list[dict]:
    """All records without what clocks measured."""
    return [{k: v for k, v in r.items() if k != "timing"} for r in metrics.read(workdir / "metrics.jsonl")]


def _unfinished(workdir: pathlib.Path) -> list[tuple[str, int]]:
    """Name and inode of each checkpoint that has not got its final name."""
    entries = os.scandir(workdir / "checkpoints") if (workdir / "checkpoints").exists() else ()
    return [(e.name, e.inode()) for e in entries if "tmp" in e.name]


def _steps(workdir: pathlib.Path) -> list[int]:
    """The steps whose checkpoints are complete."""
    return [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]


def _one_line(output: str, words: str) -> None:
    assert "Traceback" not in output, output
    assert sum(words in line for line in output.splitlines()) == 1, output


def _text(folder: pathlib.Path) -> None:
    folder.mkdir()
    dice = random.Random(0)
    for i in range(8):
        words = (dice.choice(["alpha", "beta", "gamma", "delta", "epsilon"]) for _ in range(60))
        (folder / f"{i}.txt").write_text(" ".join(words), encoding="utf-8")


if __name__ == "__main__":
    main()
