"""The runs of a sweep as one array of Slurm jobs, through submitit, which queues a preempted job again."""

import ast
import importlib
import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hydrax.core.build import ConfigError
from hydrax.sweep.attempt import Stop, attempt, complete
from hydrax.sweep.status import status
from hydrax.train.metrics import write_json

if TYPE_CHECKING:
    from hydrax.sweep.runs import Run  # which imports JAX: jobs that only start a process do without

JOB = "job.json"
REFRESH = 2.0  # seconds between two calls of `watch`
DEFAULTS: dict[str, Any] = {"name": "hydrax", "timeout_min": 240, "stderr_to_stdout": True}
SHARED = (*DEFAULTS, "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb")
"""Parameters that submitit has for every cluster; all others are those of its SlurmExecutor."""
AT_WORK = ("PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING", "PREEMPTED", "SUSPENDED")
"""States of a job that has not had its last word."""


class Job:
    """One run, as submitit calls it on a node.

    Before a job is preempted or out of time, Slurm sends it SIGUSR2, and submitit calls `checkpoint`: the run saves,
    and its job is queued again. Slurm may send that signal to all processes, so those of the run have it blocked.
    """

    def __init__(self, folder: pathlib.Path, command: Sequence[str], retries: int):
        self.folder, self.command, self.retries = folder, command, retries

    def __call__(self) -> None:
        self._stop, self._why = Stop(), ""
        # In a thread of its own, for which `checkpoint` can wait when it interrupts the main thread.
        self._thread = threading.Thread(target=self._work)
        self._thread.start()
        self._thread.join()
        if self._why:
            raise RuntimeError(self._why)

    def checkpoint(self) -> Any:
        """Called by submitit on the first process of the job."""
        self._stop.signal = signal.SIGTERM
        self._thread.join()
        return _submitit().helpers.DelayedSubmission(Job(self.folder, self.command, self.retries))

    def _work(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})  # of this thread and the processes that it starts
        here = _submitit().JobEnvironment()
        if here.global_rank == 0:
            retries = self.retries if here.num_tasks == 1 else 0  # the processes of one run begin together
            self._why = complete(self.folder, self.command, os.environ, retries=retries, stop=self._stop) or ""
        elif status(self.folder).state != "finished":
            with (self.folder / f"log.{here.global_rank}.txt").open("ab") as log:
                code, last = attempt(self.command, os.environ, log, f"process {here.global_rank}", self._stop)
            self._why = f"exit code {code}: {last}" if code else ""


def run_all(
    runs: Sequence["Run"],
    workdir: pathlib.Path,
    parameters: Sequence[str],
    *,
    parallel: int,
    retries: int,
    watch: Callable[[], None],
    cluster: str = "slurm",
) -> tuple[dict[str, str], signal.Signals | None]:
    """Submits the runs that are not finished and have no job yet, and watches until all jobs have ended.

    SIGINT ends the watching alone.

    Args:
      runs: those of the sweep.
      workdir: where submitit keeps its files, in `slurm/`; nodes must see it under the same name.
      parameters: `<parameter>=<value>`, as submitit's executors have them.
      parallel: jobs at a time; 0: as many as Slurm allows.
      retries: further attempts within a job, where a run is one process.
      watch: called again and again.
      cluster: submitit's name of it; "local" stands in for Slurm in tests.

    Returns:
      Why runs are not finished, by name, and SIGINT if it came.

    Raises:
      ConfigError: no submitit, no Slurm, or parameters that one of them refuses.
    """
    submitit, place = _submitit(), workdir.resolve() / "slurm"
    unfinished = [run for run in runs if status(run.folder).state != "finished"]
    jobs = {run.name: job for run in unfinished if (job := _earlier(submitit, run, place)) is not None}
    new = [run for run in unfinished if run.name not in jobs]
    if new:
        executor = _executor(submitit, place, parameters, parallel, cluster)
        calls = [Job(run.folder.resolve(), run.command, retries) for run in new]
        jobs |= dict(zip((run.name for run in new), _submitted(executor, calls), strict=True))
    for run in new:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_json(run.folder / JOB, {"job": jobs[run.name].job_id})
    numbers = " ".join(sorted({job.job_id.split("_")[0] for job in jobs.values()}))
    print(f"jobs {numbers}", flush=True)
    try:
        while [name for name, job in jobs.items() if not job.done()]:
            watch()
            time.sleep(REFRESH)
    except KeyboardInterrupt:
        print(f"the jobs go on: the same command watches them again, `scancel {numbers}` ends them", flush=True)
        return {}, signal.SIGINT
    watch()
    reasons = {}
    for run in unfinished:
        if (now := status(run.folder)).state != "finished":
            reasons[run.name] = now.why or f"job {jobs[run.name].job_id} ended: {jobs[run.name].state}"
    return reasons, None


def _submitit() -> ModuleType:
    try:
        return importlib.import_module("submitit")
    except ImportError:
        allowed = "the package submitit is not installed; expected `pip install 'hydrax[slurm]'`"
        raise ConfigError("executor", "slurm", allowed) from None


def _earlier(submitit: ModuleType, run: "Run", place: pathlib.Path) -> Any:
    """The job of a run that an earlier call submitted, if Slurm still has it."""
    try:
        number = json.loads((run.folder / JOB).read_text(encoding="utf-8"))["job"]
    except (OSError, ValueError, KeyError):
        return None
    job = submitit.SlurmJob(place, number)
    return job if job.state in AT_WORK else None


def settings(parameters: Sequence[str]) -> dict[str, Any]:
    """Slurm's parameters by name.

    Raises:
      ConfigError: one is not of the form `<parameter>=<value>`.
    """
    pairs = [text.partition("=") for text in parameters]
    for text, (name, given, _) in zip(parameters, pairs, strict=True):
        if not (name and given):
            raise ConfigError("slurm", text, "expected <parameter>=<value>")
    return {name: _literal(value) for name, _, value in pairs}


def _executor(submitit: ModuleType, place: pathlib.Path, parameters: Sequence[str], parallel: int, cluster: str) -> Any:
    values = {**DEFAULTS, **settings(parameters)}
    if parallel:
        values["array_parallelism"] = parallel
    try:
        # A run longer than the time limit is queued again as often as it takes.
        executor = submitit.AutoExecutor(place, cluster=cluster, slurm_max_num_timeout=1_000_000)
        executor.update_parameters(**{k if k in SHARED else f"slurm_{k}": v for k, v in values.items()})
    except (RuntimeError, NameError, ValueError, AssertionError) as error:
        raise ConfigError("slurm", " ".join(parameters), str(error)) from None
    return executor


def _submitted(executor: Any, calls: Sequence[Job]) -> list[Any]:
    """One array of jobs."""
    jobs = []
    try:
        with executor.batch():
            jobs += [executor.submit(call) for call in calls]
    except RuntimeError as error:  # sbatch refused
        raise ConfigError("executor", "slurm", str(error)) from None
    return jobs


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
