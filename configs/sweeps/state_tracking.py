"""What tracks a state: words of groups, eigenvalues in [0, 1] or [-1, 1], pure and with attention.

    python -m launch.sweep --sweep=sweeps/state_tracking --workdir=runs/state_tracking --executor=stacked --parallel=4
    python -m launch.sweep --sweep=sweeps/state_tracking:h100 --workdir=runs/state_tracking --executor=stacked \\
        --parallel=8

Arguments: size, tiny (parity, 4 arms) or h100 (parity, S3 and swaps of S5, 6 arms: one GPU). Words of evaluation are up
to 8 times as long as those of training. Expected, by arXiv 2411.12537: only negative eigenvalues carry parity and swaps
beyond the length of training; attention does not. On an H100: docs/results/state_tracking_h100.
"""

from configs import common, sweeps
from hydrax.sweep import grid

SIZES = {
    "tiny": {"steps": 60, "rows": 16, "rates": (3e-3, 1e-2), "seeds": 1, "length": 16, "groups": ("parity",)},
    "h100": {
        "steps": 1500,
        "rows": 128,
        "rates": (1e-3, 3e-3, 1e-2),
        "seeds": 3,
        "length": 32,
        "groups": ("parity", "s3", "s5_swaps"),
    },
}
PURE = ("deltanet", "gdn")


def get_sweep(arg: str = "") -> grid.Grid:
    """Arguments: size."""
    args = common.parse_arg(arg, size="tiny")
    size = common.one_of("size", args.size, SIZES)
    base = {
        "config": "tasks:group_words",
        **sweeps.trained({**size, "evaluations": 3}),
        "optim.weight_decay": 0.0,
    }
    tasks = grid.sweep("data.task_options", [{"group": group} for group in size["groups"]])
    mixers = PURE if args.size == "h100" else PURE[1:]
    arms = [arm(f"{mixer},{mixer}", mixer, negative) for mixer in mixers for negative in (False, True)]
    arms += [arm("gdn,attn", "gdn", True), {"model.pattern": "attn,attn", "model.mixers": {"attn": {"heads": 2}}}]
    return grid.product([base], tasks, arms, sweeps.repeats(size))


def arm(pattern: str, mixer: str, negative: bool) -> grid.Entry:
    """Two heads of 32 x 32; `negative`: eigenvalues down to -1."""
    options = {"heads": 2, "key_dim": 32, "value_dim": 32, "allow_neg_eigval": negative}
    return {"model.pattern": pattern, "model.mixers": {mixer: options, "attn": {"heads": 2}}}
