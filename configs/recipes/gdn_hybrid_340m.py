"""Three layers of Gated DeltaNet (arXiv 2412.06464) to one of softmax attention: what speed is compared with.

    python -m launch.bench_train --config=recipes/gdn_hybrid_340m --out=runs/train.json
    python -m launch.train --config=recipes/gdn_hybrid_340m --workdir=runs/gdn_hybrid_340m --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 32000 tokens>

Hardware: one GPU of 80 GB. Expected: 393M parameters, 40 % of the peak of an H100 in training steps
(docs/results/train_gdn_hybrid_340m_h100.json); not trained by us. It is flash-linear-attention's GatedDeltaNetConfig
with head_dim 128, num_heads 8, expand_v 1, intermediate_size 2816 and attention of 16 heads in every fourth of 24
layers. Rows of 4096 tokens, 8 of them at a time, each one document to the model, as that library trains by default.
"""

from ml_collections import ConfigDict

from configs import common
from configs.recipes.common import language_model


def get_config(arg: str = "") -> ConfigDict:
    """No arguments."""
    common.parse_arg(arg)
    config = language_model("attn")
    config.model.pattern = "6*(3*gdn,attn)"
    config.model.ffn_dim = 2816
    config.model.mixers.gdn = {"heads": 8, "key_dim": 128, "value_dim": 128}
    config.train.batch_size = 8
    config.train.accumulate = 1
    config.train.remat = "none"
    config.train.unroll = 6
    config.data.documents = False
    return config
