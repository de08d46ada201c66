"""Jamba (arXiv 2403.19887): one layer of attention to seven of Mamba, and experts in every other layer.

    python -m launch.train --config=recipes/jamba --workdir=runs/jamba --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 65536 tokens>
    python -m launch.train --config=recipes/jamba:tiny --workdir=runs/jamba_tiny

Attention stands fifth of eight and knows no positions; Mamba norms its steps, keys and queries; 16 experts, two per
token, whose gates are not divided by their sum.
Hardware: 16 GPUs of 80 GB for parameters and optimiser alone (`--config.mesh.fsdp=16`). Not run by us.
Expected: 51570M parameters, 12B of them active. Rates, batches and losses were not published.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "52b": {
        "width": 4096,
        "layers": 32,
        "heads": 32,
        "kv_heads": 8,
        "ffn_dim": 14_336,
        "experts": 16,
        "vocab": 65_536,
    },
    "tiny": {
        "width": 32,
        "layers": 8,
        "heads": 4,
        "kv_heads": 2,
        "ffn_dim": 64,
        "experts": 4,
    },
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    model = {
        "d_model": s.width,
        "num_layers": s.layers,
        "pattern": "fill((4*mamba, attn, 3*mamba))",
        "mixers": {
            "mamba": {"bcdt_norm": True},
            "attn": {"heads": s.heads, "kv_heads": s.kv_heads, "rope": {"fraction": 0.0}},
        },
        "ffn_pattern": "fill((swiglu, moe))",
        "ffn_dim": s.ffn_dim,
        "moe": {"experts": s.experts, "top_k": 2, "renorm": False, "balance": 0.002, "z_loss": 0.0},
        "tie": False,
    }
    return pretraining(s, model, seq_len=4096, rows=1024, tokens=1e12, lr=3e-4)
