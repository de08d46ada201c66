"""MiniMax-01 (arXiv 2501.08313): seven layers of Lightning attention to one of softmax, and 32 experts everywhere.

    python -m launch.train --config=recipes/minimax_01 --workdir=runs/minimax_01 --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 200064 tokens>
    python -m launch.train --config=recipes/minimax_01:tiny --workdir=runs/minimax_tiny

The stream carries α times the normalised input of every sublayer (α = (2 layers)^¼), the decay of Lightning attention
falls to none in the last layer, and attention turns half of its channels.
Hardware: 128 GPUs of 80 GB for parameters and optimiser alone (`--config.mesh.fsdp=128`). Not run by us.
Expected: 456090M parameters. The training recipe (rates, batches, stages) could not be verified; no published loss.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "456b": {
        "width": 6144,
        "layers": 80,
        "heads": 64,
        "kv_heads": 8,
        "head_dim": 128,
        "experts": 32,
        "expert_dim": 9216,
        "vocab": 200_064,
    },
    "tiny": {
        "width": 64,
        "layers": 8,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "experts": 4,
        "expert_dim": 32,
    },
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    model = {
        "d_model": s.width,
        "num_layers": s.layers,
        "pattern": "every(7, lightning, attn)",
        "mixers": {
            "lightning": {"preset": "minimax", "heads": s.heads, "key_dim": s.head_dim},
            "attn": {
                "heads": s.heads,
                "kv_heads": s.kv_heads,
                "key_dim": s.head_dim,
                "rope": {"theta": 1e7, "fraction": 0.5},
            },
        },
        "ffn": "moe",
        "moe": {"experts": s.experts, "top_k": 2, "width": s.expert_dim, "balance": 0.002, "z_loss": 0.0},
        "norm_place": "post",
        "post_alpha": (2 * s.layers) ** 0.25,
        "norm_eps": 1e-5,
        "tie": False,
    }
    return pretraining(s, model, seq_len=8192, rows=2048, tokens=1e12, lr=2e-4)
