"""The Inception token mixer (arXiv 2205.12956), causal: convolution, max pooling and attention share the heads.

    python -m launch.train --config=recipes/inception --workdir=runs/inception --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 32000 tokens>
    python -m launch.train --config=recipes/inception:tiny --workdir=runs/inception_tiny

Every layer has the same number of heads, of which attention has an eighth in the first layer and seven eighths in the
last, more with every layer in between; convolution and pooling share the others evenly. All are joined as they are
under one projection. The paper's model is one of images; sizes, rates and batches are ours.
Hardware: 1 GPU of 80 GB. Not run by us.
Expected: 102M parameters. Published for images: low frequencies are the work of attention in deep layers, high ones of
convolution and pooling in shallow ones.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "102m": {"width": 768, "layers": 12, "heads": 24, "ffn_dim": 2048, "vocab": 32_000},
    "tiny": {"width": 64, "layers": 3, "heads": 16, "ffn_dim": 128},
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    model = {
        "d_model": s.width,
        "pattern": ",".join(f"layer{i}" for i in range(s.layers)),
        "blocks": {f"layer{i}": layer(i / (s.layers - 1), s.heads) for i in range(s.layers)},
        "ffn_dim": s.ffn_dim,
    }
    return pretraining(s, model, seq_len=2048, rows=256, tokens=10e9, lr=1e-3)


def layer(depth: float, heads: int) -> dict[str, Any]:
    """The block at a depth from 0, the first, to 1, the last."""
    attention = round(heads * (1 / 8 + 6 / 8 * depth))
    pooled = (heads - attention) // 2
    parts = f"{attention}*attn, {pooled}*max_pool, {heads - attention - pooled}*depthwise_conv"
    return {"mixer": f"heads({parts})", "options": {"fusion": "concat"}}
