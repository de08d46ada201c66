"""Times the ops on this device, beside those of flash-linear-attention where it is installed, after a check of both.

    python -m launch.bench_kernels --out=runs/kernels.json
    python -m launch.bench_kernels --problems=gated_delta,delta --shapes=8x4096x16x128 --peer=fla

The two libraries take turns, in processes of their own. A peer whose results are not right keeps its time, marked as
such; one that fails or takes too long is named with the reason. Its kernels are compiled before, by many processes.
The file holds command, environment and all rows so far; a picture lies beside it.
"""

import pathlib
import shlex

from absl import flags
from rich.console import Console
from rich.progress import track

from hydrax.core.build import ConfigError, Raw, build
from launch import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("problems", "all", "names, or all", flag_values=FLAGS)
flags.DEFINE_string(
    "shapes", "8x4096x16x128,1x32768x16x128", "rows x tokens x heads x width of a head", flag_values=FLAGS
)
flags.DEFINE_string("peer", "auto", "the other library: fla, none, or auto: if it can run", flag_values=FLAGS)
flags.DEFINE_integer("rounds", 5, "turns of each library", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("calls", 50, "calls in a row per turn", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("seconds", 300, "of a library for one answer, at most", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "prepare", 300, "seconds at most for compiling the peer's kernels before", lower_bound=0, flag_values=FLAGS
)
flags.DEFINE_string("out", "", "a .json file for the results; empty: print them only", flag_values=FLAGS)


@cli.command(FLAGS)
def main(overrides: cli.Overrides) -> None:
    from hydrax.eval import kernels, kernels_report, report

    settings = build(
        kernels.Settings,
        {
            "problems": list(kernels.PROBLEMS) if FLAGS.problems == "all" else FLAGS.problems.split(","),
            "shapes": [_shape(text) for text in FLAGS.shapes.split(",")],
            "peer": kernels.peer(FLAGS.peer),
            "rounds": FLAGS.rounds,
            "calls": FLAGS.calls,
            "seconds": FLAGS.seconds,
            "prepare": FLAGS.prepare,
        },
    )
    given = [FLAGS[name].serialize() for name in FLAGS if FLAGS[name].present and name != "out"]
    command = shlex.join(["python", "-m", "launch.bench_kernels", *given])
    out = pathlib.Path(FLAGS.out) if FLAGS.out else None
    results = report.Report(out, command, kernels.environment(settings), settings, kernels_report.draw)
    console = Console(width=max(120, Console().width))
    kernels.prepare(settings, lambda text: console.print(text, highlight=False, markup=False))
    total = sum(len(kernels.PROBLEMS[name].shapes(settings.shapes)) for name in settings.problems)
    for rows in track(kernels.compare(settings), "", total, console=console, disable=not console.is_terminal):
        results.add(rows)
        for row in rows:
            console.print(kernels_report.line(row), highlight=False, markup=False)
    console.print(kernels_report.table(results.rows))
    results.draw()


def _shape(text: str) -> list[Raw]:
    numbers = text.split("x")
    if len(numbers) != 4 or not all(n.isdecimal() and int(n) for n in numbers):
        raise ConfigError("shapes", text, "expected rows x tokens x heads x width, as in 8x4096x16x128")
    return [Raw(n) for n in numbers]


if __name__ == "__main__":
    main()
