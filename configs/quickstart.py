"""A hybrid of gated delta rule and attention on bytes, small enough for a laptop.

    python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart

Data: the source of Python's standard library. 2.3M parameters, 2.5M tokens. Hardware: 4 CPU cores.
Time and expected number: not measured yet.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """No arguments."""
    common.parse_arg(arg)
    config = common.base()
    config.model.d_model = 128
    config.model.pattern = "2*(3*gdn,attn)"
    config.model.mixers.gdn = {"heads": 4, "key_dim": 32, "value_dim": 32}
    config.model.mixers.attn = {"heads": 4, "key_dim": 32}
    config.data.seq_len = 256
    config.train.steps = 600
    config.train.batch_size = 16
    config.train.eval_every = 200
    config.train.eval_rows = 64
    config.train.save_every = 200
    config.optim.lr = 2e-3
    config.optim.warmup = 50
    return config
