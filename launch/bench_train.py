"""Times training steps of a config, and of variants of it, on random tokens on one device.

    python -m launch.bench_train --config=quickstart --rounds=1 --steps=3
    python -m launch.bench_train --config=recipes/gdn_hybrid_340m --variants="train.remat=dots; train.remat=none" \\
        --out=runs/train.json

A variant is a list of overrides with commas between them; several variants, with semicolons between them, take turns.
The file holds command, environment and rows.
"""

import dataclasses
import pathlib
import shlex

from absl import flags
from rich.console import Console

from hydrax.core.build import ConfigError, Raw
from launch import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "a config file, or the name of one in configs/", required=True, flag_values=FLAGS)
flags.DEFINE_string("variants", "", "overrides as key=value, key=value; key=value", flag_values=FLAGS)
flags.DEFINE_integer("rounds", 2, "turns of each variant, in a new process", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("steps", 20, "timed steps per turn", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("out", "", "a .json file for the results; empty: print them only", flag_values=FLAGS)


@cli.command(FLAGS)
def main(overrides: cli.Overrides) -> None:
    variants = [text.strip() for text in FLAGS.variants.split(";")]
    cfgs = {text: cli.run_config(FLAGS.config, {**overrides, **_overrides(text)}) for text in variants}

    from hydrax.eval import report, training

    given = [FLAGS[name].serialize() for name in FLAGS if FLAGS[name].present and name != "out"]
    given += [f"--config.{key}={value}" for key, value in overrides.items()]
    facts = {"command": shlex.join(["python", "-m", "launch.bench_train", *given])}
    out = pathlib.Path(FLAGS.out) if FLAGS.out else None
    if out is not None:
        report.write(out, facts, "out")
    console = Console(width=max(120, Console().width))

    def record(variant: str, found: training.Sample) -> None:
        best = 1e3 * min(found.step_seconds)
        console.print(f"{variant or FLAGS.config}: {best:,.1f} ms per step at best", highlight=False, markup=False)

    rows = training.compare(cfgs, FLAGS.rounds, FLAGS.steps, record)
    console.print(training.table(rows))
    if out is not None:
        found = {"environment": training.environment(), "rows": [dataclasses.asdict(row) for row in rows]}
        report.write(out, facts | found, "out")


def _overrides(text: str) -> dict[str, Raw]:
    """Those of a variant; commas inside brackets belong to a value."""
    found: dict[str, Raw] = {}
    depth, start = 0, 0
    for i, character in enumerate(f"{text},"):
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            entry, start = text[start:i].strip(), i + 1
            key, given, value = entry.partition("=")
            if entry and not given:
                raise ConfigError("variants", entry, "expected key=value, key=value; key=value")
            if entry:
                found[key.strip().removeprefix("config.")] = Raw(value.strip())
    return found


if __name__ == "__main__":
    main()
