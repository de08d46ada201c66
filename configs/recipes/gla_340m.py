"""Gated linear attention (arXiv 2312.06635): 24 layers of 4 heads with a decay per key channel.

    python -m launch.train --config=recipes/gla_340m --workdir=runs/gla_340m --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 32000 tokens>

Hardware: 8 GPUs of 80 GB (`--config.mesh.fsdp=8`). Not run by us.
Expected: 374M parameters. Published, at 20B tokens of FineWeb-Edu in hybrids of 6:1: 0.441, the mean of six tasks
(arXiv 2507.06457, see `recipes/systematic`).
"""

from ml_collections import ConfigDict

from configs import common
from configs.recipes.common import language_model


def get_config(arg: str = "") -> ConfigDict:
    """No arguments."""
    common.parse_arg(arg)
    return language_model("gla")
