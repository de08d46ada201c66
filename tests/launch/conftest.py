"""A small corpus, a tiny config, and a run that has finished, shared by the tests of the commands."""

import contextlib
import io
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import pytest

import launch.bench
import launch.bench_attention
import launch.bench_averages
import launch.bench_kernels
import launch.bench_train
import launch.compile_time
import launch.cost
import launch.doctor
import launch.evaluate
import launch.prepare
import launch.report
import launch.sample
import launch.sweep
import launch.train

MAINS = {
    "train": launch.train.main,
    "sample": launch.sample.main,
    "cost": launch.cost.main,
    "bench": launch.bench.main,
    "bench_attention": launch.bench_attention.main,
    "bench_averages": launch.bench_averages.main,
    "bench_kernels": launch.bench_kernels.main,
    "bench_train": launch.bench_train.main,
    "compile_time": launch.compile_time.main,
    "doctor": launch.doctor.main,
    "prepare": launch.prepare.main,
    "report": launch.report.main,
    "sweep": launch.sweep.main,
    "evaluate": launch.evaluate.main,
}
CONFIG = """
from configs import common

def get_config(arg=""):
    config = common.base()
    config.model.d_model = 16
    config.model.pattern = "gla"
    config.model.mixers.gla = {"heads": 2}
    config.data.path = PATH
    config.data.seq_len = 16
    config.data.val_fraction = 0.3
    config.train.steps = 2
    config.train.batch_size = 8
    config.train.eval_rows = 8
    config.optim.warmup = 1
    config.sample.tokens = 4
    return config
"""


class Outcome(NamedTuple):
    code: int | str | None
    out: str
    err: str


def run(command: str, *args: str) -> Outcome:
    """The exit code, stdout and stderr of a command run in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: int | str | None = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            MAINS[command]([f"launch.{command}", *args])
        except SystemExit as stop:
            code = stop.code
    return Outcome(code, out.getvalue(), err.getvalue())


def contents(folder: pathlib.Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the bytes of files."""
    files = {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*") if not p.is_fifo()}
    return {p.relative_to(folder).as_posix(): b for p, b in files.items() if "__pycache__" not in p.parts}


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a config that trains in seconds."""
    folder = tmp_path_factory.mktemp("input")
    (folder / "text").mkdir()
    for i in range(12):
        (folder / "text" / f"{i}.txt").write_text(f"document {i} says: " + "a hybrid of everything. " * (i + 4))
    path = folder / "tiny.py"
    path.write_text(CONFIG.replace("PATH", repr(str(folder / "text"))))
    return str(path)


@pytest.fixture(scope="session")
def finished(config: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a finished run; tests copy it before they change it."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    outcome = run("train", f"--config={config}", f"--workdir={workdir}")
    assert outcome.code == 0, outcome.err
    return workdir


def command_line(command: str, config: str, workdir: pathlib.Path, extra: Sequence[str]) -> list[str]:
    """The arguments every command needs, then `extra`; an extra flag replaces one of the same name."""
    needed = {
        "train": {"config": config, "workdir": workdir},
        "cost": {"config": config},
        "sample": {"workdir": workdir},
        "evaluate": {"workdir": workdir, "out": workdir.parent / "evaluation"},
        "bench": {},
        "bench_attention": {},
        "bench_averages": {},
        "bench_kernels": {},
        "bench_train": {"config": config},
        "compile_time": {"config": config},
        "prepare": {"source": pathlib.Path(config).parent / "text", "out": workdir},
    }
    given = {arg.lstrip("-").partition("=")[0] for arg in extra}
    return [*(f"--{k}={v}" for k, v in needed[command].items() if k not in given), *extra]
