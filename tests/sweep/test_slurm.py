"""Jobs through submitit: its local executor stands in for nodes, scripts of a few lines for Slurm's commands."""

import json
import os
import pathlib
import re
import signal
import sys
import threading

import pytest

from hydrax.core.build import ConfigError
from hydrax.sweep import runs, slurm
from hydrax.sweep.status import status
from tests.sweep.conftest import BASE, run
from tests.sweep.processes import eventually, processes

pytestmark = pytest.mark.usefixtures("stand_in")

SBATCH = """#!{python}
import pathlib, shutil, sys
shutil.copy(sys.argv[1], pathlib.Path(__file__).with_name("script.sh"))
print("Submitted batch job 4711")
"""
SACCT = """#!/bin/sh
echo 'JobID|State|NodeList'
echo '4711_0|RUNNING|node1'
echo '4711_[1-2%2]|{waiting}|None assigned'
"""


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--slurm=nodes=2"], "slurm = 'nodes=2': expected with executor = 'slurm', and it is 'local'"),
        (["--slurm=nodes", "--executor=slurm"], "slurm = 'nodes': expected <parameter>=<value>"),
    ],
)
def test_parameters_are_refused_before_anything_is_written(flags, line, write, tmp_path):
    outcome = run(f"--sweep={write([BASE])}", f"--workdir={tmp_path / 'runs'}", *flags)
    assert (outcome.code, outcome.err) == (2, f"error: {line}\n")
    assert not (tmp_path / "runs").exists()


def test_without_submitit_one_line_names_the_extra(write, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "submitit", None)
    outcome = run(f"--sweep={write([BASE])}", f"--workdir={tmp_path / 'runs'}", "--executor=slurm")
    assert outcome.code == 2
    expected = "executor = 'slurm': the package submitit is not installed; expected `pip install 'hydrax[slurm]'`"
    assert outcome.err == f"error: {expected}\n"


@pytest.fixture
def installed(monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr(slurm, "REFRESH", 0.1)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(pathlib.Path(__file__).parents[2]), *sys.path]))


@pytest.fixture
def cluster(installed, monkeypatch, tmp_path) -> pathlib.Path:
    """A folder of commands, where sbatch leaves script.sh."""
    place = tmp_path / "bin"
    place.mkdir()
    for name, text in {
        "sbatch": SBATCH.format(python=sys.executable),
        "sacct": SACCT.format(waiting="PENDING"),
        "srun": "",
    }.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return place


def behaving(*behaviours: str, steps: int = 4) -> list[dict]:
    return [{**BASE, "train.steps": steps, "sample.prompt": b, "train.seed": i} for i, b in enumerate(behaviours)]


def nothing() -> None:
    """In the place of the table."""


def test_jobs_complete_runs_and_say_why_not(installed, write, tmp_path):
    workdir = tmp_path / "runs"
    found = runs.expand(write(behaving("", "fail once", "fail")), workdir)
    reasons, stopped = slurm.run_all(found, workdir, [], parallel=0, retries=1, watch=nothing, cluster="local")
    assert [status(r.folder).state for r in found] == ["finished", "finished", "failed"]
    assert [status(r.folder).attempts for r in found] == [1, 2, 2]
    assert stopped is None
    assert reasons == {found[2].name: "exit code 1: FloatingPointError: it never works"}


def test_a_preempted_job_saves_and_is_queued_again(installed, write, tmp_path):
    workdir = tmp_path / "runs"
    (found,) = runs.expand(write(behaving("slow", steps=60)), workdir)

    def preempt():
        eventually(lambda: status(found.folder).step > 3)
        (trainer,) = processes(found.folder)
        os.kill(trainer, signal.SIGUSR2)  # as Slurm may do; it must not even notice
        stat = pathlib.Path(f"/proc/{trainer}/stat").read_text()
        os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGUSR2)  # its parent: what submitit runs

    thread = threading.Thread(target=preempt)
    thread.start()
    assert slurm.run_all([found], workdir, [], parallel=0, retries=0, watch=nothing, cluster="local") == ({}, None)
    thread.join()
    log = (found.folder / "log.txt").read_text()
    saved = int(re.search(r"saved at (\d+)", log)[1])
    assert f"continuing after {saved}" in log
    lines = (found.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 61))
    assert status(found.folder).attempts == 2


@pytest.mark.slow
def test_a_run_of_two_processes(installed, write, tmp_path):
    workdir = tmp_path / "runs"
    (found,) = runs.expand(write(behaving("slow", steps=60)), workdir)
    asked = {"parallel": 0, "retries": 2, "watch": nothing, "cluster": "local"}
    assert slurm.run_all([found], workdir, ["tasks_per_node=2"], **asked) == ({}, None)
    assert status(found.folder).state == "finished"
    assert "== attempt 1" in (found.folder / "log.txt").read_text()
    assert "== process 1" in (found.folder / "log.1.txt").read_text()

    (failing,) = runs.expand(write(behaving("fail")), workdir)
    reasons, _ = slurm.run_all([failing], workdir, ["tasks_per_node=2"], **asked)
    assert reasons == {failing.name: "exit code 1: FloatingPointError: it never works"}
    assert status(failing.folder).attempts == 1  # processes of one run begin together or not at all


def test_an_array_of_jobs(cluster, write, monkeypatch, tmp_path):
    """What sbatch gets; and a second call, while Slurm has the jobs, submits nothing."""
    workdir = tmp_path / "runs"
    found = runs.expand(write(behaving("", "", "")), workdir)

    def look_once():
        raise KeyboardInterrupt

    asked = ["partition=gpu", "gpus_per_node=1", "timeout_min=600", "signal_delay_s=300"]
    ended = slurm.run_all(found, workdir, asked, parallel=2, retries=0, watch=look_once)
    assert ended == ({}, signal.SIGINT)
    script = (cluster / "script.sh").read_text()
    lines = dict(re.findall(r"#SBATCH --([\w-]+)=?(.*)", script))
    assert (
        lines
        | {
            "array": "0-2%2",
            "gpus-per-node": "1",
            "job-name": "hydrax",
            "open-mode": "append",
            "partition": "gpu",
            "signal": "USR2@300",
            "time": "600",
        }
        == lines
    )
    assert f"-u -m submitit.core._submit {workdir}/slurm" in script and "\nsrun " in script
    jobs = [json.loads((r.folder / "job.json").read_text())["job"] for r in found]
    assert jobs == ["4711_0", "4711_1", "4711_2"]

    (cluster / "script.sh").unlink()
    slurm.run_all(found, workdir, asked, parallel=2, retries=0, watch=look_once)
    assert not (cluster / "script.sh").exists()
    (cluster / "sacct").write_text(SACCT.format(waiting="NODE_FAIL"))
    import submitit

    submitit.SlurmJob.watcher.clear()
    slurm.run_all(found, workdir, asked, parallel=2, retries=0, watch=look_once)
    assert "array=0-1%2" in (cluster / "script.sh").read_text()  # those two only


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        (["partition"], r"slurm = 'partition': expected <parameter>=<value>"),
        (["partitoin=gpu"], r"slurm = 'partitoin=gpu': Unknown argument 'partitoin' .* Valid arguments: .*partition"),
        (["nodes=two"], r"slurm = 'nodes=two': Parameter \"nodes\" expected type <class 'int'>"),
    ],
)
def test_wrong_parameters(cluster, parameters, says, write, tmp_path):
    found = runs.expand(write([BASE]), tmp_path / "runs")
    with pytest.raises(ConfigError, match=f"^{says}"):
        slurm.run_all(found, tmp_path / "runs", parameters, parallel=0, retries=0, watch=nothing)
    assert not (cluster / "script.sh").exists()


def test_a_refusal_of_sbatch_is_one_line(cluster, write, tmp_path):
    (cluster / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2; exit 1\n")
    outcome = run(
        f"--sweep={write([BASE])}", f"--workdir={tmp_path / 'runs'}", "--executor=slurm", "--slurm=partition=gpu"
    )
    assert outcome.code == 2
    said = "sbatch: error: invalid partition specified: gpu"  # which submitit repeats
    assert outcome.err.splitlines()[-1] == f"error: executor = 'slurm': {said}"


def test_where_there_is_no_slurm(installed, monkeypatch, write, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = runs.expand(write([BASE]), tmp_path / "runs")
    with pytest.raises(ConfigError, match=r"srun"):
        slurm.run_all(found, tmp_path / "runs", [], parallel=0, retries=0, watch=nothing)
