"""How much attention a hybrid needs: layers of a linear mixer per layer of attention, from one to all, on text.

    python -m launch.sweep --sweep=sweeps/ratio --workdir=runs/ratio --config.data.path=/data/text
    python -m launch.sweep --sweep=sweeps/ratio:size=50m,mixers=gdn+hgrn2,tokens=0.065 --workdir=runs/ratio_50m \\
        --config.data.path=/data/text
    python -m launch.evaluate --workdir=runs/ratio_50m --suite=perplexity,recall_slices:2

Arguments: size, a variant of configs/lm.py (100m), tokens, of training in billions (2.5), and mixers, names joined by +
(gdn+gla+hgrn2+mamba2). Every mixer in five ratios, and attention alone. They are not matched: the models of 100m have
from 76M parameters (attention) to 102M (mamba2) without embeddings; `launch.cost --match` finds the ffn_dim that makes
two equal. Expected, by arXiv 2507.06457: the loss hardly depends on the ratio, recall rises steeply from the first
layers of attention and is level from 3:1. Not run by us.
"""

from configs import common
from hydrax import mixers
from hydrax.core.build import ConfigError
from hydrax.sweep import grid

RATIOS = (1, 3, 5, 11)


def get_sweep(arg: str = "") -> grid.Grid:
    """Arguments: size, tokens, mixers."""
    args = common.parse_arg(arg, size="100m", tokens=2.5, mixers="gdn+gla+hgrn2+mamba2")
    names = args.mixers.split("+")
    for name in names:
        if name not in mixers.names():
            raise ConfigError("mixers", args.mixers, f"{name!r} is no mixer; expected names joined by +")
    base = {"config": f"lm:{args.size},tokens={args.tokens}"}
    hybrids = [f"every({ratio}, {name}, attn)" for name in names for ratio in RATIOS]
    alone = [f"fill({name})" for name in (*names, "attn")]
    return grid.product([base], grid.chain(grid.sweep("model.pattern", hybrids), grid.sweep("model.pattern", alone)))
