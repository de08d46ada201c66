"""How much attention a hybrid needs: layers of a linear mixer per layer of attention, from one to all, for four mixers.

    python -m launch.sweep --sweep=sweeps/ratio --workdir=runs/ratio --config.data.path=/data/text
    python -m launch.sweep --sweep=sweeps/ratio:size=340m,tokens=10 --workdir=runs/ratio_340m --executor=slurm ...

Arguments: size, a variant of configs/lm.py (100m), and tokens, of training in billions (2.5). 21 runs: every mixer in
five ratios, and attention alone. They are not matched: the models of 100m have from 76M parameters (attention) to 102M
(mamba2) without embeddings; `launch.cost --match` finds the ffn_dim that makes two equal. Not run by us.
"""

from configs import common
from hydrax.sweep import grid

MIXERS = ("gdn", "gla", "hgrn2", "mamba2")
RATIOS = (1, 3, 5, 11)


def get_sweep(arg: str = "") -> grid.Grid:
    """Arguments: size, tokens."""
    args = common.parse_arg(arg, size="100m", tokens=2.5)
    base = {"config": f"lm:{args.size},tokens={args.tokens}"}
    hybrids = [f"every({ratio}, {mixer}, attn)" for mixer in MIXERS for ratio in RATIOS]
    alone = [f"fill({mixer})" for mixer in (*MIXERS, "attn")]
    return grid.product([base], grid.chain(grid.sweep("model.pattern", hybrids), grid.sweep("model.pattern", alone)))
