"""Prints what models cost before anything runs: parameters, FLOPs, and the memory of decoding.

    python -m launch.cost --config=configs/quickstart.py
    python -m launch.cost --config=lm:340m --config.model.pattern="24*gdn" --seq_len=32768 --batch=8
    python -m launch.cost --config=lm:100m --compare="12*heads(4*gdn, 2*attn)" --compare="model.loop.n=2" \\
        --match=parameters
    python -m launch.cost --config=lm:340m --mesh=fsdp=4,tensor=2

With --mesh, what a training step needs of every device of a mesh, compiled for virtual CPU devices: memory, what moves
between them, and the parts of the largest parameters. With --compare, a row per model: the first is --config, others
are made equal to it by --match. An arm is a pattern, a change <key>=<value> like those of --config.<key>, several of
these with ';' between them, or another config.
"""

import dataclasses
import pathlib

from absl import flags
from rich.console import Console

from hydrax.core.build import ConfigError
from launch import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "a config file, or the name of one in configs/", required=True, flag_values=FLAGS)
flags.DEFINE_multi_string("compare", [], "another arm of the comparison", flag_values=FLAGS)
flags.DEFINE_string("match", "none", "none, parameters, active, flops or cache", flag_values=FLAGS)
flags.DEFINE_string("knob", "", "the model's integer to turn for it; empty: ffn_dim, or a state's", flag_values=FLAGS)
flags.DEFINE_integer("seq_len", 2048, "tokens of a sequence", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("batch", 1, "sequences decoded together", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("mesh", "", "a training step on these devices, as fsdp=4,tensor=2", flag_values=FLAGS)
flags.DEFINE_string("json", "", "a file for all figures; empty: print them only", flag_values=FLAGS)


@cli.command(FLAGS)
def main(overrides: cli.Overrides) -> None:
    from hydrax.eval import costs, dry_run
    from hydrax.models.budget import arms
    from hydrax.train.source import vocabulary_of

    console = Console(width=max(150, Console().width))
    runs = [cli.run_config(FLAGS.config, overrides)]
    if FLAGS.mesh and FLAGS.compare:
        raise ConfigError("mesh", FLAGS.mesh, "expected no --compare beside it")
    if FLAGS.mesh:
        mesh = dry_run.mesh_sizes(FLAGS.mesh, runs[0].mesh)
        dry_run.show(dry_run.dry_run(dataclasses.replace(runs[0], mesh=mesh)), console, FLAGS.json)
        return
    runs += [cli.arm_config(text, FLAGS.config, overrides) for text in FLAGS.compare]
    sizes = [run.model.vocab_size or vocabulary_of(run.data) for run in runs]
    models = [dataclasses.replace(run.model, vocab_size=n) for run, n in zip(runs, sizes, strict=True)]
    matched = arms(models, FLAGS.match, FLAGS.knob or None, seq_len=FLAGS.seq_len, batch=FLAGS.batch)
    named = list(zip([models[0].pattern, *FLAGS.compare], matched, strict=True))
    if FLAGS.json:
        costs.save(pathlib.Path(FLAGS.json), named, FLAGS.match)
    console.print(costs.arms(named, FLAGS.match) if FLAGS.compare else costs.layers(matched[0].cost))


if __name__ == "__main__":
    main()
