"""A sweep on this machine: what fails is tried again, what is stopped goes on, and the results say what came out."""

import csv
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import threading

import pytest

from hydrax.core.build import ConfigError
from hydrax.sweep import local, runs, slots
from hydrax.sweep.status import status
from tests.sweep.conftest import BASE, run
from tests.sweep.processes import eventually, processes

pytestmark = pytest.mark.usefixtures("stand_in")


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def behaving(*behaviours: str, steps: int = 4) -> list[dict]:
    prompts = [{"sample.prompt": b, "train.seed": i} for i, b in enumerate(behaviours)]
    return [{**BASE, "train.steps": steps, **prompt} for prompt in prompts]


def statuses(sweep: str, workdir: pathlib.Path):
    return [status(r.folder) for r in runs.expand(sweep, workdir)]


def states(sweep: str, workdir: pathlib.Path) -> list[str]:
    return [s.state for s in statuses(sweep, workdir)]


def steps(folder: pathlib.Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_run_that_fails_stops_no_other(write, tmp_path):
    sweep = write(behaving("", "fail", "refuse", "fail once", "die once", ""))
    args = [f"--sweep={sweep}", f"--workdir={tmp_path / 'runs'}", "--parallel=3", "--retries=1"]
    outcome = run(*args)
    assert outcome.code == 1
    found = statuses(sweep, tmp_path / "runs")
    assert [s.state for s in found] == ["finished", "failed", "failed", "finished", "finished", "finished"]
    assert [s.attempts for s in found] == [1, 2, 1, 2, 2, 1]  # what refuses its input is not tried again
    assert [line.partition(": ")[2] for line in sorted(outcome.err.splitlines())] == [
        "exit code 1: FloatingPointError: it never works",
        "exit code 2: error: data.path = None: expected something else",
    ]
    died = runs.expand(sweep, tmp_path / "runs")[4].folder
    assert "continuing after 2" in (died / "log.txt").read_text()
    assert steps(died) == [1, 2, 3, 4]

    again = run(*args)  # finished runs are left alone, failed ones get new attempts
    assert again.code == 1
    assert [s.attempts for s in statuses(sweep, tmp_path / "runs")] == [1, 4, 2, 2, 2, 1]


def test_results(write, tmp_path):
    grid = [*behaving("", "fail"), {**BASE, "train.steps": 8, "optim.lr": 0.5, "sample.prompt": ""}]
    outcome = run(f"--sweep={write(grid)}", f"--workdir={tmp_path / 'runs'}", "--retries=0")
    rows = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert [(row["state"], row["val_loss"], row["parameters"]) for row in rows] == [
        ("finished", 0.25, 7),
        ("failed", None, None),
        ("finished", 0.125, 7),
    ]
    assert rows[2]["overrides"] == {"config": "quickstart", "train.steps": 8, "optim.lr": 0.5, "sample.prompt": ""}
    assert f"python -m launch.report --runs={tmp_path / 'runs'} --out={tmp_path / 'runs' / 'report'}\n" in outcome.out
    assert json.loads((tmp_path / "runs" / "sweep.json").read_text())["command"] == shlex.join(sys.orig_argv)
    with (tmp_path / "runs" / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["optim.lr"], row["train.seed"], row["val_bits_per_byte"]) for row in table] == [
        ("", "0", "0.5"),
        ("", "1", ""),
        ("0.5", "", "0.25"),
    ]
    assert rows[0]["run"] in outcome.out and "0.2500" in outcome.out


def test_a_dry_run_prints_the_table_and_writes_nothing(write, tmp_path):
    outcome = run(f"--sweep={write(behaving('', 'fail'))}", f"--workdir={tmp_path / 'runs'}", "--dry_run")
    assert outcome.code == 0
    assert outcome.out.count("waiting") == 3 and "0/4" in outcome.out
    assert not (tmp_path / "runs").exists()


def stop(*pids: int) -> None:
    """Stops processes: before they are, a signal of a lower number would reach them first."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    eventually(lambda: all("State:\tT" in pathlib.Path(f"/proc/{pid}/status").read_text() for pid in pids))


def waits(pid: int, number: signal.Signals) -> bool:
    """Whether the stopped process has such a signal before it."""
    (pending,) = re.findall(r"^ShdPnd:\s*(\w+)", pathlib.Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(pending, 16) >> (number - 1) & 1)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_sweep_saves_and_goes_on(sent, code, write, tmp_path):
    sweep, workdir = write(behaving("slow", "slow", "slow", steps=40)), tmp_path / "runs"
    args = [f"--sweep={sweep}", f"--workdir={workdir}", "--parallel=2"]

    def interrupt():
        eventually(lambda: [s.step > 3 for s in statuses(sweep, workdir)] == [True, True, False])
        pids = [pid for r in runs.expand(sweep, workdir) for pid in processes(r.folder)]
        stop(*pids)
        os.kill(os.getpid(), sent)
        if sent == signal.SIGTERM:
            eventually(lambda: all(waits(pid, sent) for pid in pids))
            os.kill(os.getpid(), signal.SIGHUP)  # which changes nothing
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    outcome = run(*args)
    thread.join()
    assert outcome.code == code, outcome.err
    assert f"{sent.name}: 1 waiting, 2 broken; the same command continues" in outcome.out
    assert states(sweep, workdir) == ["broken", "broken", "waiting"]
    folders = [r.folder for r in runs.expand(sweep, workdir)]
    saved = [int((f / "saved").read_text()) for f in folders[:2]]
    assert all(f"saved at {n}" in (f / "log.txt").read_text() for f, n in zip(folders, saved, strict=False))
    assert run(*args).code == 0
    assert all(f"continuing after {n}" in (f / "log.txt").read_text() for f, n in zip(folders, saved, strict=False))
    for place in folders:
        assert steps(place) == list(range(1, 41))


def test_what_watches_may_fail(write, tmp_path):
    """A terminal that is gone: processes are asked to save, and nothing is left behind."""
    workdir = tmp_path / "runs"
    (found,) = runs.expand(write(behaving("slow", steps=10_000)), workdir)

    def watch():
        if status(found.folder).step > 2:
            raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="the terminal is gone"):
        local.run_all([found], slots.make_slots(1), retries=0, watch=watch)
    assert "saved at" in (found.folder / "log.txt").read_text() and processes(found.folder) == []


def test_a_second_ctrl_c_kills(write, tmp_path):
    sweep, workdir = write(behaving("slow", steps=10_000)), tmp_path / "runs"
    (found,) = runs.expand(sweep, workdir)

    def interrupt():
        eventually(lambda: status(found.folder).step > 2)
        (pid,) = processes(found.folder)
        stop(pid)  # it will not save any more
        os.kill(os.getpid(), signal.SIGINT)
        eventually(lambda: waits(pid, signal.SIGTERM))  # two signals at once may be one to Python
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run(f"--sweep={sweep}", f"--workdir={workdir}").code == 130
    thread.join()
    assert states(sweep, workdir) == ["broken"] and processes(found.folder) == []


def test_what_a_dead_sweep_left_running_is_waited_for(write, tmp_path):
    sweep, workdir = write(behaving("slow", "", steps=30)), tmp_path / "runs"
    main = "import sys, launch.sweep, hydrax.sweep.runs as r; r.MAIN = 'tests.sweep.trainer'; launch.sweep.main()"
    dead = subprocess.Popen([sys.executable, "-c", main, f"--sweep={sweep}", f"--workdir={workdir}", "--parallel=1"])
    left, _ = runs.expand(sweep, workdir)
    eventually(lambda: status(left.folder).step > 2)
    refused = run(f"--sweep={sweep}", f"--workdir={workdir}")
    assert (refused.code, refused.err) == (2, f"error: workdir = '{workdir}': another launch.sweep is at work in it\n")
    dead.kill()
    dead.wait()
    assert status(left.folder).state == "running" and len(processes(left.folder)) == 1
    assert run(f"--sweep={sweep}", f"--workdir={workdir}", "--parallel=2").code == 0
    assert [s.attempts for s in statuses(sweep, workdir)] == [1, 1]
    assert steps(left.folder) == list(range(1, 31))


def test_runs_get_equal_shares_of_the_cores(write, tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    sweep, workdir = write(behaving("", "", "", "")), tmp_path / "runs"
    assert run(f"--sweep={sweep}", f"--workdir={workdir}", f"--parallel={len(cores)}").code == 0
    for found in statuses(sweep, workdir):
        assert found.summary["cores"][0] in cores and len(found.summary["cores"]) == 1
    assert sorted(os.sched_getaffinity(0)) == cores


def test_every_slot_is_a_gpu(monkeypatch, write, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [s.name for s in slots.make_slots()] == ["GPU 3", "GPU 5"]
    with pytest.raises(ConfigError, match=r"parallel = 3: expected at most 2, one run per device"):
        slots.make_slots(3)
    sweep, workdir = write(behaving("slow", "slow")), tmp_path / "runs"
    assert run(f"--sweep={sweep}", f"--workdir={workdir}").code == 0
    assert {s.summary["device"] for s in statuses(sweep, workdir)} == {"3", "5"}


def test_without_a_choice_of_platform_gpus_are_found(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/bin/sh\necho 'GPU 0: one (UUID: a)'\necho 'GPU 1: another (UUID: b)'\n")
    listing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert [s.environment for s in slots.make_slots()] == [{"CUDA_VISIBLE_DEVICES": n} for n in "01"]


def test_every_slot_is_a_tpu_chip(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setattr(
        slots.glob, "glob", lambda pattern: ["/dev/accel0", "/dev/accel1"] if "accel" in pattern else []
    )
    chips = [s.environment for s in slots.make_slots()]
    assert [c["TPU_VISIBLE_DEVICES"] for c in chips] == ["0", "1"]
    assert len({c["TPU_MESH_CONTROLLER_PORT"] for c in chips}) == 2
