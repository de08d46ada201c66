"""Qwen3-Next 80B-A3B (arXiv 2412.06464 and 2505.06708): three layers of Gated DeltaNet to one of gated attention.

    python -m launch.train --config=recipes/qwen3_next --workdir=runs/qwen3_next --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 151936 tokens>
    python -m launch.train --config=recipes/qwen3_next:tiny --workdir=runs/qwen3_next_tiny

512 experts of width 512, ten per token and a gated one for all; norms with weights around 1; attention turns a quarter
of its 256 channels per head. The published model also predicts a second token, with parameters of its own: left out.
Hardware: 32 GPUs of 80 GB for parameters and optimiser alone (`--config.mesh.fsdp=32`). Not run by us.
Expected: 79674M parameters, 3B of them active. No published loss; rates and batches were not published.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "80b": {
        "width": 2048,
        "layers": 48,
        "heads": 16,
        "kv_heads": 2,
        "head_dim": 256,
        "gdn": {"preset": "qwen3next"},
        "experts": 512,
        "top_k": 10,
        "expert_dim": 512,
        "vocab": 151_936,
    },
    "tiny": {
        "width": 64,
        "layers": 4,
        "heads": 4,
        "kv_heads": 1,
        "head_dim": 16,
        "gdn": {"preset": "qwen3next", "heads": 2, "value_heads": 4, "key_dim": 16, "value_dim": 16},
        "experts": 8,
        "top_k": 3,
        "expert_dim": 16,
    },
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    model = {
        "d_model": s.width,
        "num_layers": s.layers,
        "pattern": "every(3, gdn, attn)",
        "mixers": {
            "gdn": s.gdn,
            "attn": {
                "heads": s.heads,
                "kv_heads": s.kv_heads,
                "key_dim": s.head_dim,
                "rope": {"theta": 1e7, "fraction": 0.25},
                "qk_norm": "head",
                "out_gate": "elementwise",
            },
        },
        "ffn": "moe",
        "moe": {
            "experts": s.experts,
            "top_k": s.top_k,
            "width": s.expert_dim,
            "shared": 1,
            "shared_gate": True,
            "balance": 0.01,
            "z_loss": 0.0,
        },
        "norm": "rmsnorm1p",
        "tie": False,
    }
    return pretraining(s, model, seq_len=4096, rows=1024, tokens=1e12, lr=3e-4)
