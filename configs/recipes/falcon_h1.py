"""Falcon-H1 0.5B (arXiv 2507.22448): attention and Mamba-2 side by side in every layer.

    python -m launch.train --config=recipes/falcon_h1 --workdir=runs/falcon_h1 --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 32784 tokens>
    python -m launch.train --config=recipes/falcon_h1:tiny --workdir=runs/falcon_tiny

The branches' outputs are added, without norms; Mamba-2 has no output norm either. Of the fixed multipliers, those of
embeddings and keys are set; the others are constants in front of matrices, and left to their initialisation.
Hardware: 8 GPUs of 80 GB (`--config.mesh.fsdp=8`). Not run by us.
Expected: 522M parameters. Published 521M: the vocabulary is rounded up to a multiple of 128 here. No published loss;
rates and batches are ours.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "500m": {
        "width": 1024,
        "layers": 36,
        "heads": 8,
        "kv_heads": 2,
        "head_dim": 64,
        "mamba2": {"value_heads": 24, "key_dim": 128, "value_dim": 64},
        "ffn_dim": 2048,
        "vocab": 32_784,
    },
    "tiny": {
        "width": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "mamba2": {"value_heads": 3, "key_dim": 8, "value_dim": 16},
        "ffn_dim": 64,
    },
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    model = {
        "d_model": s.width,
        "pattern": f"{s.layers}*both",
        "blocks": {"both": {"mixer": "parallel(attn, mamba2)", "options": {"fusion": "concat"}}},
        "mixers": {
            "attn": {
                "heads": s.heads,
                "kv_heads": s.kv_heads,
                "key_dim": s.head_dim,
                "rope": {"theta": 1e11},
                "scale": 0.390625 * s.head_dim**-0.5,
            },
            "mamba2": {**s.mamba2, "norm": "none"},
        },
        "ffn_dim": s.ffn_dim,
        "norm_eps": 1e-5,
        "embed_scale": 32**0.5,
        "tie": False,
    }
    return pretraining(s, model, seq_len=4096, rows=1024, tokens=1e12, lr=3e-4)
