"""Shows what negative eigenvalues are for: models with and without them learn a word problem from short words.

    python -m launch.state_tracking --out=runs/state_tracking
    python -m launch.state_tracking --mixers=deltanet --seeds=1 --steps=100

The two models of a mixer differ in `allow_neg_eigval` alone and see the same words. Minutes on 4 CPU cores. Writes
state_tracking.json and state_tracking.png.
"""

import pathlib

from absl import flags
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hydrax.core.build import ConfigError
from launch import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("task", "parity", "one of hydrax.tasks.state_tracking", flag_values=FLAGS)
flags.DEFINE_list("mixers", ["gdn", "deltanet"], "mixers with the option allow_neg_eigval", flag_values=FLAGS)
flags.DEFINE_integer("seeds", 3, "models of each kind", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("steps", 300, "training steps", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("out", "runs/state_tracking", "folder of the results", flag_values=FLAGS)


@cli.command(FLAGS)
def main(overrides: cli.Overrides) -> None:
    from hydrax.eval import extrapolation, state_tracking
    from hydrax.eval.report import write
    from hydrax.tasks.state_tracking import word_problem

    problem = word_problem(FLAGS.task)
    models = state_tracking.pairs(FLAGS.mixers, problem)
    protocol = extrapolation.Protocol(seeds=FLAGS.seeds, steps=FLAGS.steps)
    out = pathlib.Path(FLAGS.out)
    if out.exists() and not out.is_dir():
        raise ConfigError("out", FLAGS.out, "expected a folder")
    write(out / "state_tracking.json", {"task": FLAGS.task}, "out")
    with Progress() as bar:
        bars = {(m, kind): bar.add_task(f"{m} {kind}", total=FLAGS.steps) for m in models for kind in models[m]}

        def record(mixer: str, kind: str, loss: float) -> None:
            bar.update(bars[mixer, kind], advance=1, description=f"{mixer} {kind}, loss {loss:.3f}")

        curves, summary = state_tracking.compare(problem, models, protocol, record)
    write(out / "state_tracking.json", {"task": FLAGS.task, **summary}, "out")
    extrapolation.draw(curves, "negative eigenvalues", protocol, out / "state_tracking.png")
    Console().print(table(FLAGS.task, summary["scaled_accuracy"], list(protocol.ranges)))


def table(task: str, scores: dict[str, dict[str, dict[str, list[float]]]], ranges: list[str]) -> Table:
    """A row per model: the scaled accuracies of all seeds in every range of lengths."""
    result = Table("mixer", "negative eigenvalues", *(f"lengths {r}" for r in ranges), title=f"scaled accuracy, {task}")
    for mixer, kinds in scores.items():
        for kind, by_range in kinds.items():
            result.add_row(mixer, kind, *(" ".join(f"{x:.3f}" for x in by_range[r]) for r in ranges))
    return result


if __name__ == "__main__":
    main()
