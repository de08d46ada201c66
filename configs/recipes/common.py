"""What recipes share: the training setup of linear language models, that of published hybrids, the widths of mixers."""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import common
from hydrax.core.build import ConfigError

# Options by mixer; those that depend on the width of the model are left to the mixers' own defaults.
OPTIONS: dict[str, dict[int, dict]] = {
    "attn": {1024: {"heads": 16}, 2048: {"heads": 32}},
    "deltanet": {1024: {"heads": 8}, 2048: {"heads": 16}},
    "gdn": {1024: {"heads": 3, "key_dim": 256}, 2048: {"heads": 6, "key_dim": 256}},  # keys of 0.75 d_model
    "gla": {1024: {"heads": 4}, 2048: {"heads": 4}},
    "hgrn": {1024: {}, 2048: {}},
    "hgrn2": {1024: {"heads": 8}, 2048: {"heads": 16}},
    "lightning": {1024: {"heads": 8}, 2048: {"heads": 16}},
    "mamba2": {1024: {"key_dim": 128, "value_dim": 64}, 2048: {"key_dim": 128, "value_dim": 64}},
    "retention": {1024: {"heads": 4}, 2048: {"heads": 8}},
}
# Retention is twice as wide as the others, Mamba-2 stands alone: their feed-forward networks make up for it.
FFN = {"retention": {1024: 1536, 2048: 2816}}
DEFAULT_FFN = {1024: 2816, 2048: 5632}


def language_model(mixer: str, *, layers: int = 24, width: int = 1024) -> ConfigDict:
    """`layers` layers of one mixer and SwiGLU, trained as the linear models of flame are at 340M.

    AdamW at 1e-3 (3e-4 for a width of 2048), epsilon 1e-15, 1024 steps of warmup, cosine to a tenth; 0.5M tokens per
    step, rows of 4096, 10.7B tokens.
    """
    config = common.base()
    config.model.d_model = width
    config.model.pattern = f"{layers}*{mixer}"
    config.model.mixers[mixer] = OPTIONS[mixer][width]
    config.model.ffn_dim = FFN.get(mixer, DEFAULT_FFN)[width]
    config.model.vocab_size = 32_000
    config.model.tie = False
    config.data.seq_len = 4096
    config.train.batch_size = 128
    config.train.accumulate = 2
    config.train.steps = 20_480
    config.train.dtype = "bfloat16"
    config.train.remat = "mixer"
    config.train.eval_every = config.train.save_every = 1024
    config.optim.lr = 1e-3 if width == 1024 else 3e-4
    config.optim.eps = 1e-15
    config.optim.warmup = 1024
    config.optim.z_loss = 0.0
    return config


def steps(tokens: float, config: ConfigDict) -> int:
    """Steps that see so many tokens."""
    return math.ceil(tokens / (config.train.batch_size * config.data.seq_len))


def sized(arg: str, sizes: Mapping[str, Mapping[str, Any]], **others: Any) -> tuple[ConfigDict, ConfigDict]:
    """The row of a table of sizes that `size` in the argument names, by default the first, and the other arguments.

    Every table has the published model first and `tiny`, the same structure for a laptop, last.
    """
    args = common.parse_arg(arg, size=next(iter(sizes)), **others)
    return ConfigDict({"name": args.size, **choose("size", args.size, sizes)}), args


def choose(key: str, value: Any, allowed: Mapping[str, Any]) -> Any:
    """The entry of `allowed` under the argument `value`.

    Raises:
      ConfigError: there is none.
    """
    if value not in allowed:
        raise ConfigError(key, value, f"expected one of {', '.join(allowed)}")
    return allowed[value]


def pretraining(
    size: ConfigDict, model: Mapping[str, Any], *, seq_len: int, rows: int, tokens: float, lr: float, warmup: int = 2000
) -> ConfigDict:
    """A model with the vocabulary of its size, and its training: AdamW, clipping at 1, cosine to a tenth, bfloat16.

    `rows` of `seq_len` tokens per step, `tokens` in all. The size `tiny` trains on bytes for 30 steps instead.
    """
    config = common.base()
    config.model.update(model)
    config.optim.lr, config.optim.warmup = lr, warmup
    if size.name == "tiny":
        config.data.seq_len = 64
        config.train.update(steps=30, batch_size=8, eval_rows=8, eval_every=0, save_every=0)
        config.optim.update(lr=3e-3, warmup=5)
        config.sample.tokens = 0
        return config
    config.model.vocab_size = size.vocab
    config.data.seq_len = seq_len
    config.train.batch_size = rows
    config.train.steps = steps(tokens, config)
    config.train.dtype = "bfloat16"
    config.train.remat = "full"
    config.train.eval_every = config.train.save_every = 1000
    return config
