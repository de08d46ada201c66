"""Recall beyond the length of training: attention in a hybrid with rotary positions or without, against pure models.

    python -m launch.sweep --sweep=sweeps/extrapolation --workdir=runs/extrapolation --executor=stacked --parallel=4
    python -m launch.sweep --sweep=sweeps/extrapolation:h100,times=4 --workdir=runs/extrapolation4 --executor=stacked \\
        --parallel=5

Arguments: size, tiny or h100, and times, the length of evaluation rows over that of training rows (4). The pairs are
those of training. Expected, by arXiv 2501.18795: rotary positions fail beyond the length of training, and a hybrid
whose attention has none, its order coming from the recurrent layers, does not. On an H100 at 4 times the length:
docs/results/extrapolation4_h100, where neither hybrid fails.
"""

from configs import common, sweeps
from hydrax.sweep import grid

SIZES = {
    "tiny": sweeps.TINY,
    "h100": {
        "steps": 3000,
        "rows": 64,
        "rates": (1e-3, 3e-3),
        "seeds": 3,
        "length": 64,
        "pairs": (4, 8),
        "tokens": 128,
    },
}
PATTERNS = ("attn,attn,attn,attn", "gdn,gdn,gdn,gdn", "3*gdn,attn")


def get_sweep(arg: str = "") -> grid.Grid:
    """Arguments: size, times."""
    args = common.parse_arg(arg, size="tiny", times=4)
    size = common.one_of("size", args.size, SIZES)
    base = sweeps.mqar({**size, "eval_rows": 256}, eval_length=args.times * size["length"])
    arms = [arm(pattern, rotary) for pattern in PATTERNS for rotary in (True, False) if rotary or "attn" in pattern]
    return grid.product([base], arms, sweeps.repeats(size))


def arm(pattern: str, rotary: bool) -> grid.Entry:
    """That pattern, attention with rotary positions or without."""
    attention = {"heads": 2} if rotary else {"heads": 2, "rope": {"fraction": 0.0}}
    return {
        "model.pattern": pattern,
        "model.mixers": {"attn": attention, "gdn": {"heads": 2, "key_dim": 16, "value_dim": 32}},
    }
