"""Gated DeltaNet (arXiv 2412.06464): 21 layers of 3 heads, keys of 256 and values of 512 per head.

    python -m launch.train --config=recipes/gdn_340m --workdir=runs/gdn_340m --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 32000 tokens>

Hardware: 8 GPUs of 80 GB (`--config.mesh.fsdp=8`). Not run by us.
Expected: 380M parameters. A published file of this name has 6 heads (`:heads=6`), which makes half a billion.
Published, at 20B tokens of FineWeb-Edu, without attention: 0.442, the mean of six tasks (arXiv 2507.06457, see
`recipes/systematic`).
"""

from ml_collections import ConfigDict

from configs import common
from configs.recipes.common import language_model


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: heads."""
    args = common.parse_arg(arg, heads=3)
    config = language_model("gdn", layers=21)
    config.model.mixers.gdn.heads = args.heads
    return config
