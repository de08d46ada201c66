"""Language models with three layers of gated delta rule to one of attention, at four sizes.

    python -m launch.train --config=configs/lm.py:100m --workdir=runs/lm_100m --config.data.path=/data/text

Variants 50m, 100m, 340m, 1b3: 50M, 88M, 318M and 1.27B parameters without embeddings. 100m has been run, on one H100
(docs/results/lm_100m_h100.json, 100 steps); the others have not.
Ablations in one line: `--config.model.pattern="3*(3*gla,attn)"`, `--config.model.pattern="12*gdn"`.
"""

import math

from ml_collections import ConfigDict

from configs import common
from hydrax.core.build import ConfigError

# layers, d_model, key/value heads of attention, rows per step, of these at a time, peak rate
VARIANTS = {
    "50m": (14, 512, 2, 32, 32, 2e-3),
    "100m": (12, 768, 2, 64, 16, 1e-3),
    "340m": (24, 1024, 2, 128, 8, 6e-4),
    "1b3": (24, 2048, 4, 256, 32, 4e-4),
}
HEAD = 128  # width of a head, what the kernels are made for


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: variant, ratio (recurrent layers per attention layer), tokens (of training, in billions)."""
    args = common.parse_arg(arg, variant="100m", ratio=3, tokens=2.5)
    if args.variant not in VARIANTS:
        raise ConfigError("variant", args.variant, f"expected one of {', '.join(VARIANTS)}")
    layers, width, kv_heads, rows, at_once, rate = VARIANTS[args.variant]

    config = common.base()
    config.model.d_model = width
    config.model.num_layers = layers
    config.model.pattern = f"every({args.ratio}, gdn, attn)"
    config.model.mixers.gdn = {"heads": width // HEAD, "key_dim": HEAD, "value_dim": HEAD}
    config.model.mixers.attn = {"heads": width // HEAD, "kv_heads": kv_heads, "key_dim": HEAD}
    config.data.seq_len = 2048
    config.train.dtype = "bfloat16"
    config.train.batch_size = rows
    config.train.accumulate = rows // at_once
    config.train.steps = math.ceil(args.tokens * 1e9 / (rows * config.data.seq_len))
    config.train.remat = "mixer"
    config.train.eval_every = config.train.save_every = 1000
    config.optim.lr = rate
    config.optim.warmup = min(1000, config.train.steps // 10)
    return config
