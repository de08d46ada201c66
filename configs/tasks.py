"""Two layers, a short convolution and the mixer under test, on a synthetic task (arXiv 2312.04927, 2402.18668).

    python -m launch.train --config=tasks:mqar --workdir=runs/mqar
    python -m launch.train --config=tasks:mqar,mixer=attn --workdir=runs/mqar_attn --config.data.task_options.pairs=4,8

The argument is the task; `mixer` is the second layer, and a pattern with several layers replaces both. No layer has a
feed-forward network, so all that is learned is in the mixers. Hardware: any; 4 CPU cores train it in minutes. Expected,
by these papers: attention recalls every pair, recurrent mixers the more the larger their state is.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """`task`, `mixer`, and the width `d_model`."""
    args = common.parse_arg(arg, task="mqar", mixer="gdn", d_model=64)
    config = common.base()
    config.model.d_model = args.d_model
    config.model.pattern = f"gated_conv,{args.mixer}"
    config.model.ffn = "none"
    config.model.mixers.gated_conv = {"preset": "based"}
    config.data.task = args.task
    config.data.seq_len = 64
    config.train.steps = 1000
    config.train.batch_size = 128
    config.train.eval_every = 200
    config.train.eval_rows = 1024
    config.train.save_every = 500
    config.train.log_every = 20
    config.optim.name = "adamw"
    config.optim.lr = 3e-3
    config.optim.warmup = 50
    config.sample.tokens = 0
    return config
