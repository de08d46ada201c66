"""How much attention recall needs: of the layers behind a short convolution, some are attention, the others linear.

    python -m launch.sweep --sweep=sweeps/mqar_ratio --workdir=runs/mqar_ratio --executor=stacked --parallel=4
    python -m launch.sweep --sweep=sweeps/mqar_ratio:h100 --workdir=runs/mqar_ratio --executor=stacked --parallel=8

The task is MQAR. Arguments: size, tiny (4 layers, 0, 1, 2 or all of attention, 2 rates, 2 seeds: `make study-tiny`,
minutes on 4 CPU cores) or h100 (8 layers, 0, 1, 2, 4 or all, 2 rates, 2 seeds: one GPU). The states are small, so that
they cannot hold all pairs. Expected, by arXiv 2507.06457: recall rises steeply with the first layers of attention, and
then hardly; sweeps/ratio is the same question on text.
"""

from configs import common, sweeps
from hydrax.sweep import grid

MIXERS = ("gdn", "hgrn2")
SIZES = {
    "tiny": {
        "layers": 4,
        "full": (0, 1, 2),
        "d_model": 32,
        "state": (4, 8),
        "steps": 400,
        "rows": 64,
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
        "state": (16, 32),
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
    linear = {"heads": heads, "key_dim": size["state"][0], "value_dim": size["state"][1]}
    base = {
        **sweeps.mqar(size),
        "model.mixers": {"gated_conv": {"preset": "based"}, "attn": {"heads": heads}, "gdn": linear, "hgrn2": linear},
    }
    arms = [layered(mixer, full, size["layers"]) for mixer in MIXERS for full in size["full"]]
    patterns = grid.sweep("model.pattern", [*arms, f"gated_conv,{size['layers']}*attn"])
    return grid.product([base], patterns, sweeps.repeats(size))


def layered(mixer: str, full: int, layers: int) -> str:
    """`full` layers of attention at equal distances, the last layer one of them, among those of the mixer."""
    if not full:
        return f"gated_conv,{layers}*{mixer}"
    return f"gated_conv,{full}*({layers // full - 1}*{mixer},attn)"
