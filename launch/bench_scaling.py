"""Times training steps on 1, 2, 4, 8 devices of one host, after a check of their losses against one device.

    python -m launch.bench --scaling --out=runs/scaling.json
    python -m launch.bench --scaling --cells=fsdp,context/gdn --devices=1,2 --trace=runs/traces --out=runs/scaling.json
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python -m launch.bench --scaling --size=tiny --out=runs/scaling_tiny.json

Cells: fsdp (a 1.3B hybrid, weak scaling), context (one sequence of 128k, 512k and 1M tokens; gdn, mamba2 and a hybrid,
each by every strategy), tensor, expert. Each runs in a process of its own, in which the same layers, small and in fp32,
train on the mesh and on one device first; what differs is not timed. The predicted time adds bytes over links to what
the fewest devices took; memory is predicted as by `launch.cost --mesh`. The file holds command, environment and rows,
and is written anew after every row; a picture lies beside it.
"""

import pathlib
import shlex

from absl import flags
from rich.console import Console
from rich.progress import track

from hydrax.core.build import build
from launch import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("cells", "", "beginnings of cells, several; empty: all", flag_values=FLAGS)
flags.DEFINE_string("devices", "", "numbers of devices; empty: powers of two up to all", flag_values=FLAGS)
flags.DEFINE_enum("size", "full", ["full", "tiny"], "of the models: full, or tiny to try it", flag_values=FLAGS)
flags.DEFINE_integer("steps", 10, "timed steps", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("limit", 900, "seconds for a cell on so many devices", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("trace", "", "a folder for the profile of a step of every cell; empty: none", flag_values=FLAGS)
flags.DEFINE_string("out", "", "a .json file for the results; empty: print them only", flag_values=FLAGS)


@cli.command(FLAGS)
def main(overrides: cli.Overrides) -> None:
    from hydrax.eval import report, scaling_bench, scaling_matrix, timing
    from hydrax.train import folder

    cells = scaling_matrix.chosen(FLAGS.cells)
    platform, found = scaling_bench.present()
    values = {name: FLAGS[name].value for name in ("size", "steps", "limit")}
    values |= {"cells": [cell.label for cell in cells], "devices": scaling_bench.counts(FLAGS.devices, found)}
    settings = build(scaling_bench.Settings, {**values, "trace": FLAGS.trace or None})
    given = [FLAGS[name].serialize() for name in FLAGS if FLAGS[name].present and name != "out"]
    command = shlex.join(["python", "-m", "launch.bench", "--scaling", *given])
    out = pathlib.Path(FLAGS.out) if FLAGS.out else None
    results = report.Report(out, command, timing.isolated(folder.environment), settings, scaling_bench.draw)
    console = Console(width=max(150, Console().width))
    total = sum(n >= cell.least for cell in cells for n in settings.devices)
    measured = scaling_bench.bench(cells, settings, platform)
    for row in track(measured, "", total, console=console, disable=not console.is_terminal):
        results.add([row])
        console.print(scaling_bench.line(row), highlight=False, markup=False)
    console.print(scaling_bench.table(results.rows))
    for cell, ratio in scaling_bench.moved_by_length(results.rows).items():
        console.print(f"{cell}: {ratio:.2f} times the bytes for the longest row", highlight=False, markup=False)
    results.draw()


if __name__ == "__main__":
    main()
