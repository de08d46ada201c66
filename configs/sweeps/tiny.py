"""24 runs of seconds: two mixers, three rates, four seeds, on bytes of Python source. An example, and a test.

    python -m launch.sweep --sweep=sweeps/tiny --workdir=runs/tiny --parallel=4

Arguments: steps, of training (20).
"""

from configs import common
from hydrax.sweep import grid


def get_sweep(arg: str = "") -> grid.Grid:
    """Arguments: steps."""
    args = common.parse_arg(arg, steps=20)
    base = {
        "config": "quickstart",
        "model.d_model": 16,
        "model.mixers": {"attn": {"heads": 2}, "gla": {"heads": 2}},
        "data.seq_len": 32,
        "train.steps": args.steps,
        "train.batch_size": 4,
        "train.eval_every": 0,
        "train.eval_rows": 8,
        "train.save_every": 5,
        "train.log_every": 1,
        "optim.name": "adamw",
        "sample.tokens": 0,
    }
    mixers = grid.sweep("model.pattern", ["attn", "gla"])
    rates = grid.sweep("optim.lr", [0.003, 0.01, 0.03])
    seeds = grid.sweep("train.seed", range(4))
    return grid.product([base], mixers, rates, seeds)
