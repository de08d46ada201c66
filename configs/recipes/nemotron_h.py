"""Nemotron-H 8B (arXiv 2504.03624): 24 layers of Mamba-2, four of attention, 24 feed-forward networks.

    python -m launch.train --config=recipes/nemotron_h --workdir=runs/nemotron_h --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 131072 tokens>
    python -m launch.train --config=recipes/nemotron_h:tiny --workdir=runs/nemotron_tiny

The paper counts mixers and networks as layers, 52 in all. Here a network belongs to the mixer before it; the Mamba-2
before each attention, `bare`, has none. Attention knows no positions; the networks are squared ReLU.
Hardware: 8 GPUs of 80 GB (`--config.mesh.fsdp=8`). Not run by us.
Expected: 8101M parameters. No published loss; the training recipe could not be verified.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "8b": {
        "width": 4096,
        "pattern": "3*mamba2, bare, attn, 3*(4*mamba2, bare, attn), 5*mamba2",
        "heads": 32,
        "kv_heads": 8,
        "mamba2": {"heads": 8, "key_dim": 128, "value_dim": 64},
        "ffn_dim": 21_504,
        "vocab": 131_072,
    },
    "tiny": {
        "width": 32,
        "pattern": "mamba2, 2*(bare, attn), 2*mamba2",
        "heads": 4,
        "kv_heads": 2,
        "mamba2": {"heads": 2, "key_dim": 8, "value_dim": 16},
        "ffn_dim": 128,
    },
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    model = {
        "d_model": s.width,
        "pattern": s.pattern,
        "blocks": {"bare": {"mixer": "mamba2", "ffn": "none"}},
        "mixers": {
            "mamba2": s.mamba2,
            "attn": {"heads": s.heads, "kv_heads": s.kv_heads, "rope": {"fraction": 0.0}},
        },
        "ffn": "relu2",
        "ffn_dim": s.ffn_dim,
        "norm_eps": 1e-5,
        "tie": False,
    }
    return pretraining(s, model, seq_len=8192, rows=768, tokens=15e12, lr=3e-4)
