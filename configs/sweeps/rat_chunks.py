"""From attention to a recurrence: RAT with chunks of one token to chunks as long as the row, on MQAR.

    python -m launch.sweep --sweep=sweeps/rat_chunks --workdir=runs/rat_chunks --executor=stacked --parallel=4
    python -m launch.sweep --sweep=sweeps/rat_chunks:h100 --workdir=runs/rat_chunks --executor=stacked --parallel=8
    python -m launch.report --runs=runs/rat_chunks --out=runs/rat_chunks/report --x=model.mixers.rat.chunk

Arguments: size, tiny (3 chunks) or h100 (7 chunks: one GPU); attention stands beside. Expected, by arXiv 2507.04416:
the cache shrinks with the length of a chunk and quality falls slowly to 16 tokens; recall, which is all that MQAR asks
for, should fall as soon as a chunk holds several pairs.
"""

from configs import common, sweeps
from hydrax.sweep import grid

SIZES = {
    "tiny": {**sweeps.TINY, "chunks": (1, 8, 32)},
    "h100": {
        "steps": 3000,
        "rows": 64,
        "rates": (1e-3, 3e-3, 1e-2),
        "seeds": 3,
        "length": 128,
        "pairs": (4, 8, 16),
        "tokens": 128,
        "chunks": (1, 2, 4, 8, 16, 32, 128),
    },
}


def get_sweep(arg: str = "") -> grid.Grid:
    """Arguments: size."""
    args = common.parse_arg(arg, size="tiny")
    size = common.one_of("size", args.size, SIZES)
    arms = [arm("rat", chunk=chunk) for chunk in size["chunks"]]
    return grid.product([sweeps.mqar(size)], [arm("attn"), *arms], sweeps.repeats(size))


def arm(mixer: str, **options: int) -> grid.Entry:
    """A convolution, then four heads of the mixer."""
    mixers = {"gated_conv": {"preset": "based"}, mixer: {"heads": 4, **options}}
    return {"model.pattern": f"gated_conv,{mixer}", "model.mixers": mixers}
