"""Prints what models cost before anything runs: parameters, FLOPs, and the memory of decoding.

    python -m launch.cost --config=configs/quickstart.py
    python -m launch.cost --config=lm:340m --config.model.pattern="24*gdn" --seq_len=32768 --batch=8
    python -m launch.cost --config=lm:100m --compare="12*heads(4*gdn, 2*attn)" --compare="model.loop.n=2" \\
        --match=parameters

With --compare, a row per model: the first is --config, others are made equal to it by --match. An arm is a pattern, a
change <key>=<value> like those of --config.<key>, several of these with ';' between them, or another config.
"""

import dataclasses
import pathlib

from absl import flags
from rich.console import Console

from launch import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "a config file, or the name of one in configs/", required=True, flag_values=FLAGS)
flags.DEFINE_multi_string("compare", [], "another arm of the comparison", flag_values=FLAGS)
flags.DEFINE_string("match", "none", "none, parameters, active, flops or cache", flag_values=FLAGS)
flags.DEFINE_string("knob", "", "the model's integer to turn for it; empty: ffn_dim, or a state's", flag_values=FLAGS)
flags.DEFINE_integer("seq_len", 2048, "tokens of a sequence", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("batch", 1, "sequences decoded together", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("json", "", "a file for all figures; empty: print them only", flag_values=FLAGS)


@cli.command(FLAGS)
def main(overrides: cli.Overrides) -> None:
    from hydrax.data.tokenizer import open_tokenizer
    from hydrax.eval import costs
    from hydrax.models.budget import arms

    runs = [cli.run_config(FLAGS.config, overrides)]
    runs += [cli.arm_config(text, FLAGS.config, overrides) for text in FLAGS.compare]
    sizes = [run.model.vocab_size or open_tokenizer(run.data.tokenizer).vocab_size for run in runs]
    models = [dataclasses.replace(run.model, vocab_size=n) for run, n in zip(runs, sizes, strict=True)]
    found = arms(models, FLAGS.match, FLAGS.knob or None, seq_len=FLAGS.seq_len, batch=FLAGS.batch)
    named = list(zip([models[0].pattern, *FLAGS.compare], found, strict=True))
    if FLAGS.json:
        costs.save(pathlib.Path(FLAGS.json), named, FLAGS.match)
    table = costs.arms(named, FLAGS.match) if FLAGS.compare else costs.layers(found[0].cost)
    Console(width=max(150, Console().width)).print(table)


if __name__ == "__main__":
    main()
