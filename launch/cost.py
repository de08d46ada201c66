"""Prints what a model costs before anything runs: parameters, FLOPs, and the memory of decoding.

python -m launch.cost --config=configs/quickstart.py
python -m launch.cost --config=lm:340m --config.model.pattern="24*gdn" --seq_len=32768 --batch=8
"""

import dataclasses
from typing import TYPE_CHECKING

from absl import flags
from rich.console import Console
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

    from hydrax.data.tokenizer import open_tokenizer
    from hydrax.models.cost import cost

    vocabulary = cfg.model.vocab_size or open_tokenizer(cfg.data.tokenizer).vocab_size
    model = dataclasses.replace(cfg.model, vocab_size=vocabulary)
    Console(width=max(100, Console().width)).print(table(cost(model, seq_len=FLAGS.seq_len, batch=FLAGS.batch)))


def table(cost: "Cost") -> Table:
    """A row per kind of layer, with the sums over its layers."""
    title = f"{cost.batch} x {cost.seq_len:,} tokens"
    result = Table("layers", "of", "parameters", "FLOPs/token", "state bytes", "KV bytes", title=title)
    for column in result.columns[2:]:
        column.justify = "right"
    for block in dict.fromkeys(layer.block for layer in cost.layers):
        layers = [layer for layer in cost.layers if layer.block == block]
        columns = {"parameters": 1, "flops": 1, "state_bytes": cost.batch, "kv_bytes": cost.batch}
        sums = (times * sum(getattr(layer, name) for layer in layers) for name, times in columns.items())
        result.add_row(str(len(layers)), block, *_cells(*sums))
    result.add_row("", "embedding, logits", f"{cost.embedding_parameters:,}", "", "", "", end_section=True)
    totals = _cells(cost.parameters, cost.flops_per_token, cost.state_bytes, cost.kv_bytes)
    result.add_row(str(len(cost.layers)), "forward", *totals)
    result.add_row("", "training step", "", *_cells(cost.train_flops_per_token), "", "")
    return result


def _cells(*values: float) -> list[str]:
    return [f"{value:,.0f}" for value in values]


if __name__ == "__main__":
    main()
