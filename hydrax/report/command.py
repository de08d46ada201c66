"""From run folders to a report: what `launch.report` does."""

import dataclasses
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hydrax.core.build import ConfigError
from hydrax.report import page as pages
from hydrax.report.draw import draw, png, svg
from hydrax.report.page import Page, Picture, Table
from hydrax.report.plot import Bytes, Heat, Plot
from hydrax.report.plots import plots
from hydrax.report.read import LeftOut, Run, read, with_evaluations
from hydrax.report.study import RATE, Arm, Measure, Study, by_task, comparable, study
from hydrax.train.metrics import write_text


def report(
    folders: Sequence[str | pathlib.Path],
    out: str | pathlib.Path,
    *,
    evaluations: Sequence[str | pathlib.Path] = (),
    x: str | None = None,
    command: str = "",
) -> Page:
    """Writes report.html, report.md, figures/ and tables/ into `out`; returns what they say.

    Args:
      folders: run folders, or folders with such anywhere below.
      out: made if it is not there.
      evaluations: files of launch.evaluate about these runs.
      x: a config key in which arms differ: one more plot.
      command: the one that makes this report, to be quoted in it.

    Raises:
      ConfigError: there are no runs, none is finished, arms do not differ in `x`, a file of evaluations that has none
        of the runs, or `out` cannot be written.
    """
    out = pathlib.Path(out)
    if out.exists() and not out.is_dir():
        raise ConfigError("out", str(out), "expected a folder, or the path of a new one")
    runs, left = read(folders)
    runs = with_evaluations(runs, evaluations)
    finished = comparable(runs)
    left = left + [LeftOut(run.name, "finished", "no finite result") for run in runs if run not in finished]
    if not finished:
        states = Counter(run.state for run in left)
        counted = ", ".join(f"{n} {state}" for state, n in states.items())
        raise ConfigError("runs", ",".join(map(str, folders)), f"no finished run ({counted}); expected one at least")
    found = {task: study(members) for task, members in by_task(finished, x).items()}
    plotted = [_of_task(task, plot) for task, one in found.items() for plot in plots(one, x)]
    pictures = []
    try:
        for folder in (out / "figures", out / "tables"):
            folder.mkdir(parents=True, exist_ok=True)
        for plot in plotted:
            figure, table = draw(plot), Table(plot.name, *plot.table())
            picture = Picture(plot.title, plot.caption, svg(figure, plot.name), table)
            png(figure, out / "figures" / f"{plot.name}.png")
            (out / "figures" / f"{plot.name}.svg").write_bytes(picture.svg)
            pictures.append(picture)
        page = _page(found, folders, finished, left, pictures, command)
        for table in [page.results, *(picture.table for picture in pictures)]:
            write_text(out / "tables" / f"{table.name}.csv", table.csv())
        write_text(out / "report.html", pages.as_html(page))
        write_text(out / "report.md", pages.as_markdown(page))
    except OSError as error:
        raise ConfigError("out", str(out), f"cannot be written ({error.strerror}); expected a new folder") from None
    return page


def _of_task(task: str, plot: Plot | Heat) -> Plot | Heat:
    """The plot, named after its task if there are several."""
    if not task:
        return plot
    name = f"{re.sub(r'[^A-Za-z0-9]+', '_', task)}_{plot.name}"
    return dataclasses.replace(plot, name=name, title=f"{task}: {plot.title[:1].lower()}{plot.title[1:]}")


def _page(
    found: Mapping[str, Study],
    folders: Sequence[str | pathlib.Path],
    runs: Sequence[Run],
    left: Sequence[LeftOut],
    pictures: Sequence[Picture],
    command: str,
) -> Page:
    names = ", ".join(pathlib.Path(folder).resolve().name for folder in folders)
    return Page(
        title=f"{names}: {_counted(len(runs), 'run')} of {_counted(sum(len(s.arms) for s in found.values()), 'arm')}",
        summary=_summary(found, runs, left),
        results=_results(found),
        pictures=pictures,
        left_out=Table("left_out", ["run", "state", "why"], [[run.name, run.state, run.why] for run in left]),
        settings=Table("settings", ["key", "value"], [[key, repr(v)] for key, v in _common(found.values()).items()]),
        commands=_commands(runs, command),
        environment=_environment(runs),
    )


def _common(studies: Iterable[Study]) -> dict[str, Any]:
    """Keys and values that all runs of all tasks have in common."""
    shared = [{(key, repr(v)) for key, v in s.common.items()} for s in studies]
    first = next(iter(studies)).common
    return {key: v for key, v in first.items() if all((key, repr(v)) in of for of in shared)}


def _summary(found: Mapping[str, Study], runs: Sequence[Run], left: Sequence[LeftOut]) -> list[str]:
    studies = list(found.values())
    quality, several = studies[0].quality, len(studies) > 1
    better = "higher" if quality.higher else "lower"
    rates = sorted({run.get(RATE) for run in runs})
    seeds = sorted({len(arm.best) for s in studies for arm in s.arms})
    told = list(dict.fromkeys(key for s in studies for key in s.told))
    differ = f"Arms differ in {', '.join(told)}. " if told else ""
    differ += f"Tasks, each with plots of its own: {', '.join(found)}. " if several else ""
    tried = f"{_counted(len(rates), 'learning rate')} ({', '.join(f'{r:g}' for r in rates)})"
    repeats = "1 seed" if seeds == [1] else f"{' or '.join(map(str, seeds))} seeds"
    return [
        f"{differ}Tried: {tried}; {repeats} per arm and rate. All figures of an arm are those of the learning rate "
        f"whose mean {quality.title} over seeds is best ({better} is better), by the same validation data.",
        "Bands and bars reach from the lowest to the highest seed; they are no confidence intervals of a distribution.",
        *(text for task, one in found.items() for text in _edges(task, one)),
        *([f"{_counted(len(left), 'run')} left out; see the end of the page."] if left else []),
    ]


def _edges(task: str, found: Study) -> list[str]:
    """A warning where a better rate may lie outside those that were tried."""
    names = [a.label for a in found.arms if len(a.by_rate) > 1 and a.rate in (min(a.by_rate), max(a.by_rate))]
    if not names:
        return []
    of = "every arm" if len(names) == len(found.arms) else ", ".join(names)
    on = f"{task}: the" if task else "The"
    return [f"{on} best rate is the lowest or the highest that was tried for {of}: a wider grid may change the order."]


def _results(found: Mapping[str, Study]) -> Table:
    """The arms of every task, best first; all have the measures that the tasks have in common."""
    studies = found.values()
    first = next(iter(studies))
    measures = [
        m for m in (*first.measures, *first.evaluated) if all(m in (*s.measures, *s.evaluated) for s in studies)
    ]
    columns = ["task"] if len(found) > 1 else []
    columns += ["arm", measures[0].title, "lowest", "highest", *(m.title for m in measures[1:])]
    columns += ["seeds", "learning rate", "parameters", "training FLOPs/token", "state", "KV cache", "tokens/s"]
    rows = [
        [*([task] if len(found) > 1 else []), *_result(measures, arm)]
        for task, one in found.items()
        for arm in sorted(one.arms, key=lambda arm: _rank(measures[0], arm))
    ]
    return Table("results", columns, rows)


def _rank(quality: Measure, arm: Arm) -> float:
    y = arm.band(quality.of)
    assert y is not None
    return -y.mean if quality.higher else y.mean


def _result(measures: Sequence[Measure], arm: Arm) -> list[Any]:
    bands = [y for m in measures if (y := arm.band(m.of))]
    cells: list[Any] = [arm.label, bands[0].mean, bands[0].low, bands[0].high, *(y.mean for y in bands[1:])]
    speed = arm.band(lambda run: run.summary.get("tokens_per_second"))
    cost = arm.cost
    costs = [cost.train_flops_per_token, Bytes(cost.state_bytes), Bytes(cost.kv_bytes)] if cost else 3 * [None]
    return [
        *cells,
        len(arm.best),
        arm.rate,
        arm.best[0].summary.get("parameters"),
        *costs,
        speed.mean if speed else None,
    ]


def _commands(runs: Sequence[Run], command: str) -> dict[str, Sequence[str]]:
    sweeps = list(dict.fromkeys(run.sweep for run in runs if run.sweep))
    known = [line for line in dict.fromkeys(run.command for run in runs if run.command) if line not in sweeps]
    unknown = [run.name for run in runs if not run.command]
    made: dict[str, Sequence[str]] = {"this report": [command]} if command else {}
    if sweeps:
        made["the sweep" if len(sweeps) == 1 else "the sweeps"] = sweeps
    if known:
        made["every run by itself" if sweeps else "the runs"] = known
    if unknown:
        made["not recorded"] = [f"# {name}: its config.json says all" for name in unknown]
    return made


def _environment(runs: Sequence[Run]) -> Table:
    """Every fact, with how many runs it holds for where they differ."""
    rows = []
    for key in dict.fromkeys(key for run in runs for key in _facts(run.environment)):
        values = Counter(_facts(run.environment).get(key, "not recorded") for run in runs)
        shown = [value if len(values) == 1 else f"{value} ({_counted(n, 'run')})" for value, n in values.items()]
        rows.append([key, "; ".join(shown)])
    return Table("environment", ["what", "value"], rows)


def _facts(environment: Mapping[str, Any]) -> dict[str, str]:
    plain = {k: str(v) for k, v in environment.items() if not isinstance(v, Mapping) and k != "command"}
    devices = ", ".join(f"{n} x {kind}" for kind, n in (environment.get("devices") or {}).items())
    packages = ", ".join(f"{name} {version}" for name, version in (environment.get("packages") or {}).items())
    return plain | ({"devices": devices} if devices else {}) | ({"packages": packages} if packages else {})


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
