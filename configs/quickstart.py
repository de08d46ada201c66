"""A hybrid of gated delta rule and attention, three layers to one, on bytes of Python source.

    make quickstart
    python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart

Data: the source of the standard library of the Python that runs it. Model: 2.1M parameters. Hardware: 4 CPU cores, a
few minutes. Expected: at most 2.4 bits per byte on held-out files, and at least 0.15 below the trigram of bytes that
the same run computes; docs/results/quickstart.json is what one run gave.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """No arguments."""
    common.parse_arg(arg)
    config = common.base()
    config.model.d_model = 192
    config.model.pattern = "3*gdn,attn"
    config.model.mixers.gdn = {"heads": 2, "chunk_size": 32}
    config.model.mixers.attn = {"heads": 4}
    config.data.seq_len = 256
    config.train.steps = 200
    config.train.batch_size = 8  # few tokens per step: at this scale many updates matter more than smooth ones
    config.train.log_every = 5
    config.train.eval_every = 100
    config.train.eval_rows = 256
    config.train.save_every = 100
    config.train.unroll = 3
    config.optim.name = "muon"
    config.optim.lr = 0.02
    config.optim.schedule = "wsd"
    config.optim.decay_fraction = 0.4
    config.optim.final_fraction = 0.0
    config.optim.warmup = 10
    config.sample.prompt = "def "
    return config
