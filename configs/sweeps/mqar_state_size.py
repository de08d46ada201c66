"""Recall against the bytes of a state, on MQAR: a short convolution, then four layers of a mixer, or three and attention.

    python -m launch.sweep --sweep=sweeps/mqar_state_size --workdir=runs/mqar_state_size --executor=stacked --parallel=4
    python -m launch.sweep --sweep=sweeps/mqar_state_size:h100 --workdir=runs/mqar_state_size --executor=stacked \\
        --parallel=8

Arguments: size, tiny (4 arms, 2 rates, 1 seed: minutes on CPU cores) or h100 (17 arms, 4 rates, 3 seeds: one GPU).
Expected, by arXiv 2312.04927 and 2402.18668: attention recalls all pairs, windows those that they reach, and recurrent
mixers more the larger their state is, the delta rule most at equal bytes. Report the best rate of every arm.
"""

from configs import common
from hydrax.sweep import grid

LINEAR = ("gla", "mamba2", "gdn", "kda", "lightning")
HYBRIDS = ("gla", "mamba2", "gdn")
KEYS = (8, 32)  # of the linear mixers: with 2 heads of 32 value channels, states of 512 and 2048 elements
WINDOWS = (16, 64)
SIZES = {
    "tiny": {"steps": 60, "rows": 16, "rates": (3e-3, 1e-2), "seeds": 1, "length": 32, "pairs": (2, 4), "tokens": 64},
    "h100": {
        "steps": 2000,
        "rows": 128,
        "rates": (1e-3, 3e-3, 1e-2, 3e-2),
        "seeds": 3,
        "length": 128,
        "pairs": (4, 8, 16, 32),
        "tokens": 512,
    },
}


def get_sweep(arg: str = "") -> grid.Grid:
    """Arguments: size."""
    args = common.parse_arg(arg, size="tiny")
    size = common.one_of("size", args.size, SIZES)
    base = {
        "config": "tasks:mqar",
        "model.d_model": 64,
        "data.seq_len": size["length"],
        "data.task_options": {"pairs": size["pairs"], "vocabulary": size["tokens"]},
        "train.steps": size["steps"],
        "train.batch_size": size["rows"],
        "train.eval_every": size["steps"] // 4,
        "train.eval_rows": 512,
        "train.log_every": 20,
        "optim.warmup": size["steps"] // 20,
    }
    arms = tiny_arms() if args.size == "tiny" else all_arms()
    rates, seeds = grid.sweep("optim.lr", size["rates"]), grid.sweep("train.seed", range(size["seeds"]))
    return grid.product([base], arms, rates, seeds)


def all_arms() -> grid.Grid:
    """Attention, windows, convolution, linear mixers of both sizes, and hybrids of the smaller size."""
    return [
        _arm(alone("attn"), "attn", {"heads": 1}),
        *(_arm(alone("swa"), "swa", {"heads": 1, "window": n}) for n in WINDOWS),
        _arm("5*gated_conv", "gated_conv", {"preset": "based"}),
        *(linear(alone(mixer), mixer, keys) for mixer in LINEAR for keys in KEYS),
        *(hybrid(mixer) for mixer in HYBRIDS),
    ]


def tiny_arms() -> grid.Grid:
    return [
        _arm(alone("attn"), "attn", {"heads": 1}),
        *(linear(alone("gla"), "gla", keys) for keys in KEYS),
        _arm("5*gated_conv", "gated_conv", {"preset": "based"}),
    ]


def alone(mixer: str) -> str:
    """Four layers of that mixer."""
    return f"gated_conv,4*{mixer}"


def linear(pattern: str, mixer: str, keys: int) -> grid.Entry:
    """A model with 2 heads of that mixer, `keys` x 32 each."""
    heads = "value_heads" if mixer == "mamba2" else "heads"
    return _arm(pattern, mixer, {heads: 2, "key_dim": keys, "value_dim": 32})


def hybrid(mixer: str) -> grid.Entry:
    """Three layers of the mixer with its smaller state, then attention."""
    entry = linear(f"gated_conv,3*{mixer},attn", mixer, KEYS[0])
    entry["model.mixers"]["attn"] = {"heads": 1}
    return entry


def _arm(pattern: str, mixer: str, options: dict) -> grid.Entry:
    mixers = {"gated_conv": {"preset": "based"}, mixer: options}
    return {"model.pattern": pattern, "model.mixers": mixers}
