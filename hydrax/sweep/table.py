"""What a sweep shows while it runs, and the table of results that it leaves."""

import csv
import io
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from hydrax.sweep.runs import Run, varied
from hydrax.sweep.status import State, Status, status
from hydrax.train.metrics import write_json, write_text

STYLES: dict[State, str] = {
    "waiting": "dim",
    "running": "cyan",
    "finished": "green",
    "broken": "yellow",
    "failed": "red",
}
RESULTS = {
    "val_accuracy": ("accuracy", ".4f"),
    "val_loss": ("validation loss", ".4f"),
    "val_bits_per_byte": ("bits/byte", ".4f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "parameters": ("parameters", ","),
}
"""Final figures: what to call them, and how to write them. Runs of text have no accuracy."""

Statuses = dict[str, Status]


class Watch:
    """The runs of a sweep as they go on: a live table on a terminal, a line per change of state elsewhere."""

    def __init__(self, runs: Sequence[Run]):
        self.runs = list(runs)
        self.statuses: Statuses = {run.name: status(run.folder) for run in runs}
        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._live is not None:
            self._live.update(render(self.runs, self.statuses), refresh=True)
            self._live.stop()

    def __call__(self) -> None:
        """Reads the folders and shows what changed."""
        before = self.statuses
        self.statuses = {r.name: s if (s := before[r.name]).summary else status(r.folder) for r in self.runs}
        if self._live is not None:
            self._live.update(render(self.runs, self.statuses, self._console.height - 8), refresh=True)
            return
        for name, now in self.statuses.items():
            if _said(now) != _said(before[name]):
                print(f"{name}: {_said(now)}", flush=True)


def render(runs: Sequence[Run], statuses: Mapping[str, Status], rows: int | None = None) -> Table:
    """A row per run; where there are more than `rows`, only of those that are neither waiting nor finished."""
    keys = varied(list(runs))
    table = Table("run", *keys, "state", "step", "loss", "tokens/s", "attempts", caption=counts(statuses.values()))
    hidden = ("waiting", "finished") if rows is not None and len(runs) > rows else ()
    for run in runs:
        now = statuses[run.name]
        if now.state in hidden:
            continue
        table.add_row(
            run.name,
            *(str(run.overrides.get(key, "")) for key in keys),
            f"[{STYLES[now.state]}]{now.state}[/]",
            f"{now.step}/{run.cfg.train.steps}",
            "" if now.loss is None else f"{now.loss:.4f}",
            "" if now.tokens_per_second is None else f"{now.tokens_per_second:,.0f}",
            str(now.attempts),
        )
    return table


def counts(statuses: Iterable[Status]) -> str:
    """How many runs are in which state."""
    found = Counter(now.state for now in statuses)
    return ", ".join(f"{found[state]} {state}" for state in STYLES if found[state])


def save_results(workdir: pathlib.Path, runs: Sequence[Run], statuses: Mapping[str, Status]) -> None:
    """Writes results.json and results.csv: a row per run with its state, its overrides and its final figures."""
    rows = [_row(run, statuses[run.name]) for run in runs]
    write_json(workdir / "results.json", rows)
    keys = list(dict.fromkeys(key for row in rows for key in row["overrides"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "state", *keys, *RESULTS])
    for row in rows:
        overrides = [row["overrides"].get(key) for key in keys]
        writer.writerow([row["run"], row["state"], *overrides, *(row[name] for name in RESULTS)])
    write_text(workdir / "results.csv", text.getvalue())


def results(runs: Sequence[Run], statuses: Mapping[str, Status]) -> Table:
    """The finished runs with their final figures."""
    keys = varied(list(runs))
    shown = {name for now in statuses.values() for name, value in (now.summary or {}).items() if value is not None}
    named = {name: about for name, about in RESULTS.items() if name in shown}
    table = Table("run", *keys, *(title for title, _ in named.values()), title="results")
    for run in runs:
        if summary := statuses[run.name].summary:
            figures = [_figure(summary.get(name), form) for name, (_, form) in named.items()]
            table.add_row(run.name, *(str(run.overrides.get(key, "")) for key in keys), *figures)
    return table


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _row(run: Run, now: Status) -> dict[str, Any]:
    figures = {name: (now.summary or {}).get(name) for name in RESULTS}
    return {"run": run.name, "state": now.state, "overrides": run.overrides, **figures}


def _said(now: Status) -> str:
    if now.summary:
        name = "val_accuracy" if now.summary.get("val_accuracy") is not None else "val_bits_per_byte"
        title, form = RESULTS[name]
        return f"finished, {_figure(now.summary.get(name), form)} {title}"
    if now.state == "running":
        return f"running, attempt {now.attempts}"
    return f"{now.state}{', ' + now.why if now.why else ''}"
