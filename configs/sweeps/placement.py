"""Where the layers of attention stand: two of eight first, last, at both ends, in the middle or spread, on MQAR.

    python -m launch.sweep --sweep=sweeps/placement --workdir=runs/placement --executor=stacked --parallel=4
    python -m launch.sweep --sweep=sweeps/placement:h100 --workdir=runs/placement --executor=stacked --parallel=5

Arguments: size, tiny or h100 (one GPU). All arms cost the same. Expected, by arXiv 2510.04800: attention in front is
worst, in the middle best, spread between.
"""

from configs import common, sweeps
from hydrax.sweep import grid

PLACES = {"first": (0, 1), "last": (6, 7), "ends": (0, 7), "middle": (3, 4), "spread": (3, 7)}
SIZES = {
    "tiny": sweeps.TINY,
    "h100": {
        "steps": 2000,
        "rows": 64,
        "rates": (1e-3, 3e-3),
        "seeds": 3,
        "length": 256,
        "pairs": (16, 32, 64),
        "tokens": 1024,
    },
}


def get_sweep(arg: str = "") -> grid.Grid:
    """Arguments: size."""
    args = common.parse_arg(arg, size="tiny")
    size = common.one_of("size", args.size, SIZES)
    base = {
        **sweeps.mqar(size),
        "model.num_layers": 8,
        "model.mixers": {"attn": {"heads": 2}, "gdn": {"heads": 2, "key_dim": 16, "value_dim": 32}},
    }
    patterns = [f"select({list(places)}, attn, gdn)" for places in PLACES.values()]
    arms = grid.sweep("model.pattern", patterns)
    return grid.product([base], arms, sweeps.repeats(size))
