"""Prints what a model costs before anything runs: parameters, FLOPs, and the memory of decoding.

python -m launch.cost --config=configs/quickstart.py
python -m launch.cost --config=lm:340m --config.model.pattern="24*gdn" --seq_len=32768 --batch=8
"""

import dataclasses
from typing import TYPE_CHECKING

from absl import flags
from rich.table import Table

from launch import cli

if TYPE_CHECKING:
    from hydrax.models.cost import Cost

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "a config file, or the name of one in configs/", required=True, flag_values=FLAGS)
flags.DEFINE_integer("seq_len", 2048, "tokens of a sequence", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("batch", 1, "sequences decoded together", lower_bound=1, flag_values=FLAGS)


@cli.command(FLAGS)
def main(overrides: cli.Overrides) -> None:
    cfg = cli.run_config(FLAGS.config, overrides)

    from rich.console import Console

    from hydrax.data.tokenizer import open_tokenizer
    from hydrax.models.cost import cost

    tokens = cfg.model.vocab_size or open_tokenizer(cfg.data.tokenizer).vocab_size
    model = dataclasses.replace(cfg.model, vocab_size=tokens)
    Console(width=max(100, Console().width)).print(table(cost(model, seq_len=FLAGS.seq_len, batch=FLAGS.batch)))


def table(cost: "Cost") -> Table:
    """A row per kind of layer, with the sums over its layers."""
    title = f"{cost.seq_len:,} tokens, {cost.batch} sequence{'s' * (cost.batch > 1)}"
    result = Table("layers", "of", "parameters", "FLOPs/token", "state bytes", "KV bytes", title=title)
    for column in result.columns[2:]:
        column.justify = "right"
    for block in dict.fromkeys(layer.block for layer in cost.layers):
        layers = [layer for layer in cost.layers if layer.block == block]
        sums = (sum(getattr(layer, n) for layer in layers) for n in ("parameters", "flops", "state_bytes", "kv_bytes"))
        parameters, flops, state, kv = sums
        result.add_row(str(len(layers)), block, *_cells(parameters, flops, state * cost.batch, kv * cost.batch))
    result.add_row("", "embedding, logits", f"{cost.embedding_parameters:,}", "", "", "")
    result.add_section()
    totals = (cost.parameters, cost.flops_per_token, cost.state_bytes, cost.kv_bytes)
    result.add_row(str(len(cost.layers)), "forward", *_cells(*totals))
    result.add_row("", "training step", "", f"{cost.train_flops_per_token:,.0f}", "", "")
    return result


def _cells(*values: float) -> list[str]:
    return [f"{value:,.0f}" for value in values]


if __name__ == "__main__":
    main()
