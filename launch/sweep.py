"""Trains all runs of a sweep, several at a time, and collects their results; the same command goes on after any death.

    python -m launch.sweep --sweep=sweeps/tiny --workdir=runs/tiny --parallel=4
    python -m launch.sweep --sweep=configs/sweeps/ratio.py --workdir=runs/ratio --config.data.path=/data/text
    python -m launch.sweep --sweep=sweeps/ratio --workdir=runs/ratio --executor=slurm \\
        --slurm=partition=gpu --slurm=gpus_per_node=1 --slurm=timeout_min=600
    python -m launch.sweep --sweep=sweeps/mqar_state_size --workdir=runs/mqar --executor=stacked --parallel=4

--executor=stacked trains the runs that differ in optim.lr and train.seed alone side by side, in this process and on one
device: small models then cost little more together than one of them alone. It compiles the programs of --parallel
groups (0: 1) ahead of the one that trains, writes no checkpoints, and begins a group anew that was stopped.

A sweep is a Python file with get_sweep(arg=""), which returns a list of dicts: flags of launch.train, config and dotted
keys of it. Every run has a folder in the workdir with its log.txt; results.json and results.csv lie beside them.
"""

import sys

from absl import flags

from launch import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("sweep", None, "a sweep file, or the name of one in configs/", required=True, flag_values=FLAGS)
flags.DEFINE_string("workdir", None, "the folder of all runs", required=True, flag_values=FLAGS)
flags.DEFINE_string("config", "", "the base of all runs; empty: what the sweep says", flag_values=FLAGS)
flags.DEFINE_enum("executor", "local", ["local", "slurm", "stacked"], "where runs run", flag_values=FLAGS)
flags.DEFINE_integer("parallel", 0, "runs at a time; 0: one per device, or 4 cores", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("stack", 16, "stacked: runs side by side at most", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("retries", 2, "further attempts at a run that fails", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_bool("dry_run", False, "print the table of runs only", flag_values=FLAGS)
flags.DEFINE_multi_string("slurm", [], "<parameter>=<value> of a Slurm job, as submitit has it", flag_values=FLAGS)


@cli.command(FLAGS)
def main(overrides: cli.Overrides) -> None:
    from hydrax.sweep import command

    base = {"config": FLAGS.config} if FLAGS.config else {}
    sys.exit(
        command.sweep(
            FLAGS.sweep,
            FLAGS.workdir,
            {**base, **overrides},
            executor=FLAGS.executor,
            parallel=FLAGS.parallel,
            stack=FLAGS.stack,
            retries=FLAGS.retries,
            dry_run=FLAGS.dry_run,
            parameters=FLAGS.slurm,
        )
    )


if __name__ == "__main__":
    main()
