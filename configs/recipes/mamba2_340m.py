"""Mamba-2 (arXiv 2405.21060): 48 layers without feed-forward networks, state 128, heads of 64.

    python -m launch.train --config=recipes/mamba2_340m --workdir=runs/mamba2_340m --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 32000 tokens>

Hardware: 8 GPUs of 80 GB (`--config.mesh.fsdp=8`). Not run by us.
Expected: 382M parameters.
"""

from ml_collections import ConfigDict

from configs import common
from configs.recipes.common import language_model


def get_config(arg: str = "") -> ConfigDict:
    """No arguments."""
    common.parse_arg(arg)
    config = language_model("mamba2", layers=48)
    config.model.ffn = "none"
    return config
