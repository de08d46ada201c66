"""Trains a language model from a config file, or continues the run in the run folder.

    python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m launch.train --config=quickstart --workdir=runs/gla --config.model.pattern="2*(3*gla,attn)"
    python -m launch.train --config=lm:340m,ratio=7 --workdir=runs/lm --config.data.path=/data/text

The run folder receives config.json, layers.json, environment.json, metrics.jsonl, checkpoints/, sample.txt and
summary.json.
"""

from absl import flags

from launch import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "a config file, or the name of one in configs/", required=True, flag_values=FLAGS)
flags.DEFINE_string("workdir", None, "the run folder", required=True, flag_values=FLAGS)
flags.DEFINE_string("coordinator", None, "host:port of process 0, if the run has several", flag_values=FLAGS)
flags.DEFINE_integer("processes", None, "how many processes the run has", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("process_id", None, "which of them this one is, from 0", lower_bound=0, flag_values=FLAGS)


@cli.command(FLAGS)
def main(overrides: cli.Overrides) -> None:
    cfg = cli.run_config(FLAGS.config, overrides)

    from hydrax.eval import ngram
    from hydrax.infer.sample import check_settings, write_sample
    from hydrax.train.loop import train

    check_settings(cfg.sample.temperature, cfg.sample.top_p, "sample")  # not after hours of training
    train(cfg, FLAGS.workdir, baselines={"trigram": ngram.bits_per_byte}, finish=write_sample)


if __name__ == "__main__":
    main()
