"""Times training steps of a config, of variants of it, and of the same model in another library, on random tokens.

    python -m launch.bench_train --config=quickstart --rounds=1 --steps=3
    python -m launch.bench_train --config=recipes/gdn_hybrid_340m --variants="train.remat=dots; train.remat=none" \\
        --peer=fla --out=runs/train.json

A variant is a list of overrides with commas between them; several variants, with semicolons between them, take turns,
each in a process that has the device to itself. flash-linear-attention trains models of gdn and attn, as it is and by
torch.compile; its kernels are compiled before, by many processes. A variant that fails is named with the reason. The
file holds command, environment and all rows so far; a picture lies beside it.
"""

import dataclasses
import pathlib
import shlex
from typing import Any

from absl import flags
from rich.console import Console

from hydrax.core.build import ConfigError, Raw
from launch import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "a config file, or the name of one in configs/", required=True, flag_values=FLAGS)
flags.DEFINE_string("variants", "", "overrides as key=value, key=value; key=value", flag_values=FLAGS)
flags.DEFINE_string("peer", "none", "another library beside: fla, none, or auto: if it can run", flag_values=FLAGS)
flags.DEFINE_integer(
    "prepare", 300, "seconds at most for compiling the peer's kernels before", lower_bound=0, flag_values=FLAGS
)
flags.DEFINE_integer("seconds", 900, "of a turn, at most", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("rounds", 2, "turns of each variant, in a new process", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("steps", 20, "timed steps per turn", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("out", "", "a .json file for the results; empty: print them only", flag_values=FLAGS)


@cli.command(FLAGS)
def main(overrides: cli.Overrides) -> None:
    variants = [text.strip() for text in FLAGS.variants.split(";")]
    cfgs = {text: cli.run_config(FLAGS.config, {**overrides, **_overrides(text)}) for text in variants}

    from hydrax.eval import kernels, report, training

    peer = kernels.peer(FLAGS.peer, "transformers")
    contenders = training.ours(cfgs, FLAGS.steps)
    if peer is not None:
        contenders += training.theirs(peer, next(iter(cfgs.values())), FLAGS.steps)
    given = [FLAGS[name].serialize() for name in FLAGS if FLAGS[name].present and name != "out"]
    given += [f"--config.{key}={value}" for key, value in overrides.items()]
    facts: dict[str, Any] = {"command": shlex.join(["python", "-m", "launch.bench_train", *given])}
    out = pathlib.Path(FLAGS.out) if FLAGS.out else None
    if out is not None:
        report.write(out, facts, "out")
        facts["environment"] = training.environment(peer)
    console = Console(width=max(120, Console().width))

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    if peer is not None and FLAGS.prepare:
        training.prepare(peer, next(iter(cfgs.values())), FLAGS.prepare, say)
    rows: list[training.Row] = []
    for turn, rows in training.compare(contenders, FLAGS.rounds, FLAGS.seconds):
        say(training.line(turn))
        if out is not None:
            report.write(out, facts | {"rows": [dataclasses.asdict(r) for r in rows]}, "out")
    console.print(training.table(rows))
    if out is not None:
        training.draw(rows, out.with_suffix(".png"))


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
