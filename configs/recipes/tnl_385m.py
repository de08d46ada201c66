"""TransNormerLLM (arXiv 2307.14995): lightning attention, learned phases in the first layer, SRMSNorm, SGLU.

    python -m launch.train --config=recipes/tnl_385m --workdir=runs/tnl_385m --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 64000 tokens>

Hardware: 8 GPUs of 80 GB (`--config.mesh.fsdp=8`). Not run by us.
Expected: 399M parameters, 333M of them outside of the tied embeddings; the published 385M fits a vocabulary of about
50000. The claim of the paper: tokens per second do not depend on the length of the rows
(`python -m launch.bench --mixers=lightning`). The training recipe is not published; this one is that of the other
linear models.
"""

import math

from ml_collections import ConfigDict

from configs import common
from configs.recipes.common import language_model


def get_config(arg: str = "") -> ConfigDict:
    """No arguments."""
    common.parse_arg(arg)
    config = language_model("lightning")
    config.model.pattern = "first,23*lightning"
    config.model.mixers.lightning = {"preset": "tnl", "heads": 8}
    config.model.blocks.first = {"mixer": "lightning", "options": {"preset": "tnl_first"}}
    config.model.norm = "srmsnorm"
    config.model.ffn = "sglu"
    config.model.embed_scale = math.sqrt(config.model.d_model)
    config.model.vocab_size = 64_000
    config.model.tie = True
    return config
