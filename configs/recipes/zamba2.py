"""Zamba2 2.7B (arXiv 2411.15242): layers of Mamba-2, nine of them fed by one of two transformer blocks they share.

    python -m launch.train --config=recipes/zamba2 --workdir=runs/zamba2 --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 32000 tokens>
    python -m launch.train --config=recipes/zamba2:tiny --workdir=runs/zamba2_tiny

The activation is the tanh form of GELU, the published one the exact form.
A shared block reads the stream beside the embeddings, twice the width, without residuals and positions; every place
has a low-rank change of its gate and up projections and a matrix of its own for what comes out.
Hardware: 8 GPUs of 80 GB (`--config.mesh.fsdp=8`). Not run by us.
Expected: 2665M parameters. Published 2662M: there, gate and up share the narrow half of their change. No published
loss; the training recipe could not be verified.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "2b7": {
        "width": 2560,
        "layers": 54,
        "pattern": "6*mamba2, 3*(by_a, 5*mamba2, by_b, 5*mamba2), by_a, 4*mamba2, by_b, 3*mamba2, by_a, 2*mamba2",
        "heads": 32,
        "ffn_dim": 10_240,
        "rank": 128,
        "mamba2": {"key_dim": 64, "value_dim": 64},
        "vocab": 32_000,
    },
    "tiny": {
        "width": 32,
        "layers": 6,
        "pattern": "2*(mamba2, by_a, by_b)",
        "heads": 4,
        "ffn_dim": 64,
        "rank": 4,
        "mamba2": {"key_dim": 8, "value_dim": 16},
    },
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    shared = {
        "mixer": "attn",
        # heads are twice as wide as usual, scores are scaled as if they were not
        "options": {"heads": s.heads, "rope": {"fraction": 0.0}, "scale": (s.width / s.heads) ** -0.5},
        "ffn": "geglu",
        "ffn_dim": s.ffn_dim,
        "shared": True,
        "lora_rank": s.rank,
        "lora_on": ("ffn.gate", "ffn.up"),
    }
    model = {
        "d_model": s.width,
        "num_layers": s.layers,
        "pattern": s.pattern,
        "blocks": {
            "a": shared,
            "b": shared,
            "by_a": {"mixer": "mamba2", "feed": "a"},
            "by_b": {"mixer": "mamba2", "feed": "b"},
        },
        "mixers": {"mamba2": s.mamba2},
        "ffn": "none",
        "norm_eps": 1e-5,
    }
    return pretraining(s, model, seq_len=4096, rows=1024, tokens=1e12, lr=3e-4)
