"""RetNet (arXiv 2307.08621): 24 layers of 4 heads, values twice as wide as keys, and a narrower FFN for it.

    python -m launch.train --config=recipes/retnet_340m --workdir=runs/retnet_340m --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 32000 tokens>

Hardware: 8 GPUs of 80 GB (`--config.mesh.fsdp=8`). Not run by us.
Expected: 380M parameters. Published, at 20B tokens of FineWeb-Edu in hybrids of 24:1: 0.436, the mean of six tasks
(arXiv 2507.06457, see `recipes/systematic`).
"""

from ml_collections import ConfigDict

from configs import common
from configs.recipes.common import language_model


def get_config(arg: str = "") -> ConfigDict:
    """No arguments."""
    common.parse_arg(arg)
    return language_model("retention")
