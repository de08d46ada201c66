"""Continues a prompt with the model of a run folder, and prints the text as it is made.

    python -m launch.sample --workdir=runs/quickstart --prompt="def main(" --tokens=200
    python -m launch.sample --workdir=runs/quickstart --temperature=0
    python -m launch.sample --workdir=runs/quickstart --policy=streaming:window=256,sink_tokens=4

A policy has softmax layers read a part of the keys; --help lists the policies with their options.
The model then computes another function than the one that was trained.
"""

from absl import flags

from hydrax.core.build import LARGEST, ConfigError
from launch import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "the run folder", required=True, flag_values=FLAGS)
flags.DEFINE_string("prompt", "", "text to continue; empty: a new document", flag_values=FLAGS)
flags.DEFINE_integer("tokens", 256, "tokens to generate at most", 1, LARGEST, flag_values=FLAGS)
flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token every time", flag_values=FLAGS)
flags.DEFINE_float("top_p", 0.95, "sample among the likeliest tokens of this mass; 1: all", flag_values=FLAGS)
flags.DEFINE_string("policy", None, "keys that softmax layers read, <name>:<option>=<value>,...", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "another seed, another text", 0, LARGEST, flag_values=FLAGS)


@cli.command(FLAGS)
def main(overrides: cli.Overrides) -> None:
    from hydrax.data.tokenizer import open_tokenizer
    from hydrax.infer import policy as policies
    from hydrax.infer.sample import check_settings, stream_text
    from hydrax.train.checkpoint import load_run

    check_settings(FLAGS.temperature, FLAGS.top_p)
    policy = None if FLAGS.policy is None else policies.of(FLAGS.policy)
    model, cfg = load_run(FLAGS.workdir)
    if cfg.data.task is not None:
        raise ConfigError("workdir", FLAGS.workdir, f"expected a run on text; it learnt the task {cfg.data.task}")
    tokenizer = open_tokenizer(cfg.data.tokenizer)
    pieces = stream_text(
        model,
        tokenizer,
        FLAGS.prompt,
        tokens=FLAGS.tokens,
        temperature=FLAGS.temperature,
        top_p=FLAGS.top_p,
        seed=FLAGS.seed,
        policy=policy,
        landmark_every=cfg.data.landmark_every,
    )
    print(FLAGS.prompt, end="", flush=True)
    for text in pieces:
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
