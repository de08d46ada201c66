"""A sweep from its file to its results: what `launch.sweep` does."""

import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Console

from hydrax.core.build import ConfigError
from hydrax.sweep import local, slurm, stacked, table
from hydrax.sweep.runs import expand
from hydrax.sweep.slots import make_slots
from hydrax.sweep.status import RECORD, only_one
from hydrax.train.metrics import write_json


def sweep(
    name: str,
    workdir: str | pathlib.Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    executor: Literal["local", "slurm", "stacked"] = "local",
    parallel: int = 0,
    stack: int = 16,
    retries: int = 2,
    parameters: Sequence[str] = (),
    dry_run: bool = False,
) -> int:
    """Completes the runs of a sweep file in `workdir`; those that are finished are left alone.

    Returns:
      An exit code: 0 if all runs are finished, 1 if one is not, 128 + n if signal n stopped the sweep.

    Raises:
      ConfigError: whatever the user got wrong, before anything runs.
    """
    workdir = pathlib.Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError("workdir", str(workdir), "expected a folder")
    if executor == "slurm":
        slurm.settings(parameters)
    elif parameters:
        raise ConfigError("slurm", " ".join(parameters), f"expected with executor = 'slurm', and it is {executor!r}")
    runs = expand(name, workdir, overrides)
    watch = table.Watch(runs)
    wide = Console(width=max(150, Console().width))
    if dry_run:
        wide.print(table.render(runs, watch.statuses))
        return 0
    slots = make_slots(parallel) if executor == "local" else []
    with only_one(workdir / "lock") as alone:
        if not alone:
            raise ConfigError("workdir", str(workdir), "another launch.sweep is at work in it")
        write_json(workdir / RECORD, {"command": shlex.join(sys.orig_argv)})
        with watch:
            if executor == "local":
                reasons, stopped = local.run_all(runs, slots, retries=retries, watch=watch)
            elif executor == "stacked":
                reasons, stopped = stacked.run_all(runs, stack=stack, ahead=parallel or 1, watch=watch)
            else:
                reasons, stopped = slurm.run_all(
                    runs, workdir, parameters, parallel=parallel, retries=retries, watch=watch
                )
        table.save_results(workdir, runs, watch.statuses)
    wide.print(table.results(runs, watch.statuses))
    if any(now.summary for now in watch.statuses.values()):
        flags = (f"--runs={workdir}", f"--out={workdir / 'report'}")
        print(f"plots and tables of these: {shlex.join(('python', '-m', 'launch.report', *flags))}", flush=True)
    if stopped is not None:
        print(f"{stopped.name}: {table.counts(watch.statuses.values())}; the same command continues", flush=True)
        return 128 + stopped
    for run, why in reasons.items():
        print(f"{run}: {why}", file=sys.stderr)
    return 1 if reasons else 0
