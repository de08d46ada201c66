"""Evaluates trained runs: their text, their memory, and the tasks of lm-evaluation-harness.

    python -m launch.evaluate --workdir=runs/a,runs/b --suite=perplexity,extrapolation --out=runs/evaluation
    python -m launch.evaluate --workdir=runs/a --suite=perplexity,recall_slices --data=/data/other_text
    python -m launch.evaluate --workdir=runs/a --suite=recall:fda=fda.jsonl,recall:fda_twice=fda.jsonl --context=2048
    python -m launch.evaluate --workdir=runs/a --suite=lm_eval:lambada_openai,lm_eval:my_task --include=my_tasks

Suites: perplexity (nats and bits per byte); extrapolation (nats by position, to --factor times the training length);
recall_slices[:n] (the loss on n-grams that the text has shown before, and on the rest; n = 2, or 6 to 8 for bytes);
recall:<kind>=<file> (completion of facts; kinds fda, swde, squad, each also with _twice, and the fields of the file are
in docs/evaluation.md); task (the run's own task), task:<name>[;option=value] (one in bytes);
policy:<name>[;option=value] (what softmax layers miss that read a part of the keys: recall of attention mass, errors);
lm_eval:<task> (a task or group of lm-evaluation-harness; `pip install 'hydrax[eval]'`). Text is the validation split of
each run, or --data. Writes evaluation.json and pictures.
"""

import dataclasses
import functools
import pathlib
import shlex
import sys

from absl import flags
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from hydrax.core.build import build
from launch import cli

FLAGS = flags.FlagValues()
flags.DEFINE_list("workdir", None, "run folders, with commas between", required=True, flag_values=FLAGS)
flags.DEFINE_list("suite", ["perplexity"], "suites, with commas between", flag_values=FLAGS)
flags.DEFINE_string("out", "runs/evaluation", "folder of the results", flag_values=FLAGS)
flags.DEFINE_string("data", None, "text to read: a file, folder, glob or prepared folder", flag_values=FLAGS)
flags.DEFINE_string("include", None, "a folder of tasks of lm-evaluation-harness", flag_values=FLAGS)
flags.DEFINE_integer("sequences", 512, "of text at most, of the training length", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("examples", 0, "of a recall set or task at most; 0: all", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("factor", 8, "extrapolate to that many training lengths", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_integer("context", 0, "tokens of prompts; 0: the training length", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("tokens_at_once", 2**14, "tokens of a batch", lower_bound=1, flag_values=FLAGS)


@cli.command(FLAGS)
def main(overrides: cli.Overrides) -> None:
    from hydrax.eval import evaluate, evaluate_report
    from hydrax.eval.report import check_place, write
    from hydrax.train.folder import environment

    suites = evaluate.parse(FLAGS.suite)
    values = {field.name: FLAGS[field.name].value for field in dataclasses.fields(evaluate.Settings)}
    settings = build(evaluate.Settings, values)
    workdirs = evaluate.present(FLAGS.workdir)
    file = pathlib.Path(FLAGS.out, "evaluation.json")
    check_place(file, "out")  # not after hours of evaluation
    facts = {"command": shlex.join(sys.argv), "environment": environment(), "settings": dataclasses.asdict(settings)}
    results: dict[str, dict] = {}
    columns = (SpinnerColumn(), TextColumn("{task.description} {task.completed} done"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        watch = lambda text: functools.partial(bar.advance, bar.add_task(text, total=None))  # noqa: E731
        for name, item, found in evaluate.evaluate(workdirs, suites, settings, watch):
            results.setdefault(name, {})[item] = found
            write(file, {**facts, "runs": results}, "out")
    pictures = evaluate_report.draw(results, suites, file.parent)
    Console().print(evaluate_report.table(results, suites))
    print(*(f"wrote {path}" for path in (file, *pictures)), sep="\n")


if __name__ == "__main__":
    main()
