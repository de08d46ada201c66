"""One layer of every running average, kernel map and serial recurrence, beside attention and the delta rule.

    python -m launch.sweep --sweep=sweeps/shootout:cpu --workdir=runs/shootout --executor=stacked --parallel=4
    python -m launch.sweep --sweep=sweeps/shootout:h100 --workdir=runs/shootout --executor=stacked --parallel=8

Arguments: size, tiny (a smoke test), cpu (half an hour on 4 cores) or h100 (one GPU); tasks, mqar, text (bytes of
Python source) or both, joined by +. All arms have two layers of width 64, a short convolution and the mixer with four
heads and otherwise its defaults; states and caches are not matched, the report shows them. Expected, by arXiv
2312.04927: softmax over the row or in windows recalls, averages with fixed decays do not, and on text they differ by
less.
"""

from configs import common, sweeps
from hydrax.core.build import ConfigError
from hydrax.sweep import grid

HEADS = {"heads": 4}
MIXERS = {
    "attn": HEADS,
    "gdn": HEADS,
    **dict.fromkeys(("aaren", "agent", "efficient"), HEADS),
    **dict.fromkeys(("based", "fastmax", "flow", "inline"), HEADS),
    **dict.fromkeys(("mega", "megalodon", "gecko", "rat"), HEADS),
    "lstm": HEADS,
    "gated_conv": {"preset": "based"},
    **{name: {} for name in ("sha_rnn", "short_long_conv", "token_gate", "max_pool")},
}
SIZES = {
    "tiny": sweeps.TINY,
    "cpu": {
        "steps": 400,
        "rows": 64,
        "rates": (3e-3, 1e-2),
        "seeds": 2,
        "length": 32,
        "pairs": (2, 4, 8),
        "tokens": 64,
    },
    "h100": {
        "steps": 3000,
        "rows": 64,
        "rates": (1e-3, 3e-3, 1e-2),
        "seeds": 3,
        "length": 128,
        "pairs": (4, 8, 16),
        "tokens": 128,
    },
}


def get_sweep(arg: str = "") -> grid.Grid:
    """Arguments: size, tasks."""
    args = common.parse_arg(arg, size="tiny", tasks="mqar+text")
    size = common.one_of("size", args.size, SIZES)
    tasks = {
        "mqar": sweeps.mqar(size),
        "text": {
            "config": "quickstart",
            **sweeps.trained(size),
            "model.ffn": "none",
            "optim.name": "adamw",
            "sample.tokens": 0,
        },
    }
    names = args.tasks.split("+")
    for name in names:
        if name not in tasks:
            raise ConfigError(
                "tasks", args.tasks, f"{name!r} is no task; expected names of {', '.join(tasks)} joined by +"
            )
    return grid.product([tasks[name] for name in names], arms(), sweeps.repeats(size))


def arms() -> grid.Grid:
    first = MIXERS["gated_conv"]
    return [
        {"model.pattern": f"gated_conv,{name}", "model.mixers": {"gated_conv": first, name: options}}
        for name, options in MIXERS.items()
    ]
