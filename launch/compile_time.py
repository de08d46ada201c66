"""Compiles the training steps of one config with different patterns of layers, and compares the times.

    python -m launch.compile_time --config=quickstart --config.train.unroll=1 --out=docs/results/compile_time.json

Every sample is made in a new process, and no program comes from a cache. The file holds command, environment and rows.
"""

import dataclasses
import pathlib
import shlex

from absl import flags
from rich.console import Console
from rich.table import Table

from hydrax.core.build import Raw
from launch import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "a config file, or the name of one in configs/", required=True, flag_values=FLAGS)
flags.DEFINE_string(
    "patterns", "3*(3*gdn,attn); 12*(3*gdn,attn)", "what to compare, separated by semicolons", flag_values=FLAGS
)
flags.DEFINE_integer("repeats", 3, "samples of each, of which the best counts", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("out", "", "a .json file for the results; empty: print them only", flag_values=FLAGS)


@cli.command(FLAGS)
def main(overrides: cli.Overrides) -> None:
    patterns = [Raw(pattern.strip()) for pattern in FLAGS.patterns.split(";")]
    cfgs = [cli.run_config(FLAGS.config, {**overrides, "model.pattern": pattern}) for pattern in patterns]

    from hydrax.eval import compile_time, training
    from hydrax.eval.report import write

    given = [FLAGS[name].serialize() for name in FLAGS if FLAGS[name].present and name != "out"]
    given += [f"--config.{key}={value}" for key, value in overrides.items()]
    command = shlex.join(["python", "-m", "launch.compile_time", *given])
    facts = {"command": command, "environment": training.environment()}
    out = pathlib.Path(FLAGS.out) if FLAGS.out else None
    if out is not None:
        write(out, facts, "out")
    console = Console(width=max(100, Console().width))
    rows = compile_time.compare(
        cfgs, FLAGS.repeats, lambda cfg, seconds: console.print(f"{cfg.model.pattern}  {seconds:.1f} s", markup=False)
    )
    table = Table("pattern", "layers", "best s", "ratio")
    for row in rows:
        table.add_row(row.pattern, str(row.layers), f"{row.best:.1f}", f"{row.ratio:.2f}")
    console.print(table)
    if out is not None:
        write(out, {**facts, "rows": [dataclasses.asdict(row) for row in rows]}, "out")


if __name__ == "__main__":
    main()
