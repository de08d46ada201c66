"""Measures time per token and memory of mixers, each alone as one layer, at several lengths.

    python -m launch.bench --mixers=gdn,gla --d_model=256 --seq_lens=4096,65536 --out=runs/bench.json
    python -m launch.bench --d_model=1024 --dtype=bfloat16 --seq_lens=4096,32768,65536 --threads=8 --out=runs/gpu.json

The file holds command, environment, settings and rows, and is written anew after every mixer; a picture lies beside it.
"""

import dataclasses
import pathlib
import shlex

from absl import flags
from rich.console import Console
from rich.progress import track

from hydrax.core.build import Raw, build
from launch import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("mixers", "all", "names, or all with a recurrent state", flag_values=FLAGS)
flags.DEFINE_integer("d_model", 256, "width of the layer", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("batch", 1, "rows", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("seq_lens", "4096,65536", "tokens of a row, several lengths", flag_values=FLAGS)
flags.DEFINE_string("dtype", "float32", "of activations and matrices: float32 or bfloat16", flag_values=FLAGS)
flags.DEFINE_string("impl", "", "implementation of the ops; empty: their choice", flag_values=FLAGS)
flags.DEFINE_bool("forward_only", False, "leave out the backward pass", flag_values=FLAGS)
flags.DEFINE_integer("repeats", 20, "samples of a time, at most", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("seconds", 3.0, "of measuring, after which a time gets no further sample", flag_values=FLAGS)
flags.DEFINE_integer("threads", 1, "programs of a mixer compiled at the same time", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_bool("isolate", False, "a new process for every mixer", flag_values=FLAGS)
flags.DEFINE_string("out", "", "a .json file for the results; empty: print them only", flag_values=FLAGS)


@cli.command(FLAGS)
def main(overrides: cli.Overrides) -> None:
    from hydrax.eval import bench, report

    values = {f.name: FLAGS[f.name].value for f in dataclasses.fields(bench.Settings) if f.name in FLAGS}
    values["mixers"] = bench.everything(FLAGS.d_model) if FLAGS.mixers == "all" else FLAGS.mixers.split(",")
    values["seq_lens"] = [Raw(length) for length in FLAGS.seq_lens.split(",")]
    settings = build(bench.Settings, {**values, "impl": FLAGS.impl or None, "backward": not FLAGS.forward_only})
    bench.check(settings)

    # The command as it was given; its results themselves say where they are.
    given = [FLAGS[name].serialize() for name in FLAGS if FLAGS[name].present and name != "out"]
    out = pathlib.Path(FLAGS.out) if FLAGS.out else None
    command = shlex.join(["python", "-m", "launch.bench", *given])
    results = report.Report(out, command, bench.environment(settings), settings, report.draw_times)
    console = Console(width=max(120, Console().width))
    measured, total = bench.bench(settings), len(settings.mixers)
    for rows in track(measured, "", total, console=console, disable=not console.is_terminal):
        results.add(rows)
        for row in rows:
            console.print(report.line(row), highlight=False, markup=False)
    console.print(report.table(results.rows, settings))
    results.draw()


if __name__ == "__main__":
    main()
