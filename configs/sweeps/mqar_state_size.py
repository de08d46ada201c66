"""Recall against the bytes of a state, on MQAR: behind a convolution, four heads of a mixer, or three and attention.

    python -m launch.sweep --sweep=sweeps/mqar_state_size --workdir=runs/mqar_state_size --executor=stacked --parallel=4
    python -m launch.sweep --sweep=sweeps/mqar_state_size:h100 --workdir=runs/mqar_state_size --executor=stacked \\
        --parallel=8

Arguments: size, tiny (4 arms, 2 rates, 1 seed: minutes on CPU cores) or h100 (17 arms, 4 rates, 3 seeds: one GPU). All
arms have two layers, of which the second has four heads with 16 channels of values.
Expected, by arXiv 2312.04927 and 2402.18668: attention recalls all pairs, windows those that they reach, and recurrent
mixers more the larger their state is, the delta rule most at equal bytes. Report the best rate of every arm. On an
H100: docs/results/mqar_state_size_h100, where delta rules are not ahead of constant decays.
"""

from configs import common, sweeps
from hydrax.sweep import grid

LINEAR = ("gla", "mamba2", "gdn", "kda", "lightning")
HYBRIDS = ("gla", "mamba2", "gdn")
HEADS, VALUES = 4, 16
KEYS = (8, 32)  # of the linear mixers: states of 512 and 2048 elements
WINDOWS = (16, 32)
SIZES = {
    "tiny": sweeps.TINY,
    "h100": {
        "steps": 3000,
        "rows": 64,
        "rates": (1e-3, 3e-3, 1e-2, 3e-2),
        "seeds": 3,
        "length": 64,
        "pairs": (4, 8, 16),
        "tokens": 128,
    },
}


def get_sweep(arg: str = "") -> grid.Grid:
    """Arguments: size."""
    args = common.parse_arg(arg, size="tiny")
    size = common.one_of("size", args.size, SIZES)
    arms = tiny_arms() if args.size == "tiny" else all_arms()
    return grid.product([sweeps.mqar(size)], arms, sweeps.repeats(size))


def all_arms() -> grid.Grid:
    """Attention, windows, convolution, linear mixers of both sizes, and hybrids of the smaller size."""
    return [
        arm("attn"),
        *(arm("swa", window=n) for n in WINDOWS),
        arm("gated_conv"),
        *(arm(mixer, key_dim=keys) for mixer in LINEAR for keys in KEYS),
        *(arm(mixer, f"heads(1*attn,3*{mixer})", key_dim=KEYS[0]) for mixer in HYBRIDS),
    ]


def tiny_arms() -> grid.Grid:
    return [arm("attn"), *(arm("gla", key_dim=keys) for keys in KEYS), arm("gated_conv")]


def arm(mixer: str, layer: str = "", **options: int) -> grid.Entry:
    """A convolution, then that layer, the mixer alone if it is not given."""
    heads: dict[str, int] = {"value_heads" if mixer == "mamba2" else "heads": HEADS, "value_dim": VALUES}
    attention = {"heads": HEADS, "key_dim": VALUES}
    given: dict[str, dict] = {"attn": attention, "swa": attention, "gated_conv": {"preset": "based"}}
    mixers = {**given, mixer: {**given.get(mixer, heads), **options}}
    return {"model.pattern": f"gated_conv,{layer or mixer}", "model.mixers": mixers}
