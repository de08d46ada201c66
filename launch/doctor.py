"""Checks the kernels on this device against the definition of their ops, and says which to leave out.

    python -m launch.doctor
    python -m launch.doctor --ops=linear_attention,linear_scan

Outputs, final states and all gradients are compared with the recurrence in fp32, with and without documents. If a
kernel is wrong or fails, the exit code is 1, and the last line names the setting with which its op runs by XLA.
"""

import sys

from absl import flags
from rich.console import Console
from rich.progress import track

from launch import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("ops", "", "names of ops; empty: all with kernels", flag_values=FLAGS)
flags.DEFINE_integer("threads", 8, "programs compiled at the same time", lower_bound=1, flag_values=FLAGS)


@cli.command(FLAGS)
def main(overrides: cli.Overrides) -> None:
    from hydrax.eval import doctor

    planned = doctor.examinations(FLAGS.ops.split(",") if FLAGS.ops else [])
    console = Console(width=max(140, Console().width))
    found = doctor.examine(planned, FLAGS.threads)
    findings = list(track(found, "", len(planned), console=console, disable=not console.is_terminal))
    served = [finding for finding in findings if not finding.refusal]
    if served:
        console.print(doctor.table(served))
    for line in doctor.summary(findings):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if doctor.wrong(findings):
        sys.exit(1)


if __name__ == "__main__":
    main()
