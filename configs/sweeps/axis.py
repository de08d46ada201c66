"""Where attention and recurrence meet: in layers, heads, parallel or a loop, at equal bytes of cache, on MQAR.

    python -m launch.sweep --sweep=sweeps/axis --workdir=runs/axis --executor=stacked --parallel=4
    python -m launch.sweep --sweep=sweeps/axis:h100 --workdir=runs/axis --executor=stacked --parallel=4

Arguments: size, tiny or h100 (one GPU). Four layers of width 64, of which a token keeps keys and values of 64 channels
each in all and 12 states of 16 x 16; the loop runs two layers twice. Tests assert that caches are equal; parameters are
not: the loop has fewer, and in parallel three query heads share keys. Expected, by arXiv 2411.13676: heads and parallel
at least as good as layers. Layers against heads on an H100: docs/results/axis_h100, where layers are ahead.
"""

from configs import common, sweeps
from hydrax.sweep import grid

GDN = {"key_dim": 16, "value_dim": 16, "conv_width": 4}
ATTENTION = {"key_dim": 16, "value_dim": 16}
SIZES = {
    "tiny": sweeps.TINY,
    "h100": {
        "steps": 3000,
        "rows": 64,
        "rates": (1e-3, 3e-3, 1e-2),
        "seeds": 3,
        "length": 128,
        "pairs": (8, 16, 32),
        "tokens": 256,
    },
}
ARMS = {
    "layer": {
        "model.pattern": "3*gdn,attn",
        "model.mixers": {"gdn": {**GDN, "heads": 4}, "attn": {**ATTENTION, "heads": 4}},
    },
    "head": {
        "model.pattern": "4*heads(1*attn, 3*gdn)",
        "model.mixers": {"gdn": GDN, "attn": ATTENTION},
    },
    "parallel": {
        "model.pattern": "4*parallel(attn, gdn)",
        "model.mixers": {"gdn": {**GDN, "heads": 3}, "attn": {**ATTENTION, "heads": 3, "kv_heads": 1}},
    },
    "loop": {
        "model.pattern": "loop(2, gdn, attn)",
        "model.mixers": {"gdn": {**GDN, "heads": 6}, "attn": {**ATTENTION, "heads": 2}},
    },
}


def get_sweep(arg: str = "") -> grid.Grid:
    """Arguments: size."""
    args = common.parse_arg(arg, size="tiny")
    size = common.one_of("size", args.size, SIZES)
    return grid.product([sweeps.mqar(size)], list(ARMS.values()), sweeps.repeats(size))
