"""Makes a report from run folders: a page of plots with the tables behind them, and the commands that made the runs.

    python -m launch.report --runs=runs/ratio --out=reports/ratio
    python -m launch.report --runs=runs/mqar,runs/mqar_wide --out=reports/mqar
    python -m launch.report --runs=runs/sizes --out=reports/sizes --x=model.d_model
    python -m launch.report --runs=runs/ratio --evaluation=runs/evaluation/evaluation.json --out=reports/ratio

Folders are searched for finished runs, at any depth. Runs that differ in optim.lr and seeds alone are one arm, shown at
the learning rate that is best by the mean over its seeds. Which plots there are depends on what the runs have: quality
against linear:full ratio, cache and state; accuracy by length and depth; curves of loss; speed against length; learning
rates. The folder gets report.html, one file to send or to print; report.md; figures/*.svg and *.png; tables/*.csv.
"""

import pathlib
import shlex
import sys

from absl import flags

from launch import cli

FLAGS = flags.FlagValues()
flags.DEFINE_list("runs", None, "folders that hold runs, with commas between them", required=True, flag_values=FLAGS)
flags.DEFINE_string("out", None, "the folder of the report", required=True, flag_values=FLAGS)
flags.DEFINE_list("evaluation", [], "files of launch.evaluate about these runs", flag_values=FLAGS)
flags.DEFINE_string("x", "", "a config key to plot quality against, in which arms differ", flag_values=FLAGS)


@cli.command(FLAGS)
def main(overrides: cli.Overrides) -> None:
    from hydrax.report.command import report

    given = {"runs": ",".join(FLAGS.runs), "evaluation": ",".join(FLAGS.evaluation), "out": FLAGS.out, "x": FLAGS.x}
    command = shlex.join(["python", "-m", "launch.report", *(f"--{k}={v}" for k, v in given.items() if v)])
    page = report(FLAGS.runs, FLAGS.out, evaluations=FLAGS.evaluation, x=FLAGS.x or None, command=command)
    print(f"{page.title}, {len(page.pictures)} plots: {pathlib.Path(FLAGS.out) / 'report.html'}")
    for run, state, why in page.left_out.rows:
        print(f"left out: {run}: {state}, {why}", file=sys.stderr)


if __name__ == "__main__":
    main()
