"""How much attention recall needs: of 8 layers, 0, 1, 2, 4 or all are full attention, the others linear, on MQAR.

    python -m launch.sweep --sweep=sweeps/mqar_ratio --workdir=runs/mqar_ratio --executor=stacked --parallel=4
    python -m launch.sweep --sweep=sweeps/mqar_ratio:h100 --workdir=runs/mqar_ratio --executor=stacked --parallel=8

Arguments: size, tiny (4 layers, 0, 1 or all of attention, 2 seeds: `make study-tiny`, minutes on 4 CPU cores) or h100
(9 arms, 2 rates, 2 seeds: one GPU). Expected, by arXiv 2507.06457: recall rises steeply up to two layers of attention,
and then hardly; sweeps/ratio is the same question on text.
"""

from configs import common
from hydrax.sweep import grid

MIXERS = ("gdn", "hgrn2")
SIZES = {
    "tiny": {
        "layers": 4,
        "full": (0, 1),
        "d_model": 32,
        "steps": 300,
        "rows": 16,
        "rates": (3e-3, 1e-2),
        "seeds": 2,
        "length": 32,
        "pairs": (2, 4, 8),
        "tokens": 64,
    },
    "h100": {
        "layers": 8,
        "full": (0, 1, 2, 4),
        "d_model": 128,
        "steps": 2000,
        "rows": 64,
        "rates": (1e-3, 3e-3),
        "seeds": 2,
        "length": 256,
        "pairs": (16, 32, 64),
        "tokens": 1024,
    },
}


def get_sweep(arg: str = "") -> grid.Grid:
    """Arguments: size."""
    args = common.parse_arg(arg, size="tiny")
    size = common.one_of("size", args.size, SIZES)
    heads = size["d_model"] // 32
    linear = {"heads": heads, "key_dim": 16, "value_dim": 32}
    base = {
        "config": "tasks:mqar",
        "model.d_model": size["d_model"],
        "model.num_layers": size["layers"],
        "model.mixers": {"attn": {"heads": heads}, "gdn": linear, "hgrn2": linear},
        "data.seq_len": size["length"],
        "data.task_options": {"pairs": size["pairs"], "vocabulary": size["tokens"]},
        "train.steps": size["steps"],
        "train.batch_size": size["rows"],
        "train.eval_every": size["steps"] // 4,
        "train.eval_rows": 512,
        "train.log_every": 20,
        "optim.warmup": size["steps"] // 20,
    }
    arms = [layered(mixer, full, size["layers"]) for mixer in MIXERS for full in size["full"]]
    patterns = grid.sweep("model.pattern", [*arms, "fill(attn)"])
    rates, seeds = grid.sweep("optim.lr", size["rates"]), grid.sweep("train.seed", range(size["seeds"]))
    return grid.product([base], patterns, rates, seeds)


def layered(mixer: str, full: int, layers: int) -> str:
    """`full` layers of attention at equal distances, the last layer one of them, among those of the mixer."""
    return f"every({layers // full - 1}, {mixer}, attn)" if full else f"fill({mixer})"
