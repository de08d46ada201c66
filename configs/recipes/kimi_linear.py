"""Kimi Linear 48B-A3B (arXiv 2510.26692): layers of Kimi Delta Attention, every fourth and the last latent attention.

    python -m launch.train --config=recipes/kimi_linear --workdir=runs/kimi_linear --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 163840 tokens>
    python -m launch.train --config=recipes/kimi_linear:tiny --workdir=runs/kimi_tiny

Latent attention knows no positions. The first layer has a dense network; all others have 256 experts, eight per token
and one for all, chosen by sigmoid scores plus a bias that balances the load.
Hardware: 16 GPUs of 80 GB for parameters and optimiser alone (`--config.mesh.fsdp=16`). Not run by us.
Expected: 49123M parameters, 3B of them active. Published for 16 layers of 16 heads, perplexity of training and
validation: 3:1 9.23 and 5.65, 1:1 9.29 and 5.66, 7:1 9.23 and 5.70, 15:1 9.34 and 5.82, latent attention alone 9.45 and
5.77; loss 2.2879 C^-0.0527 where latent attention has 2.3092 C^-0.0536. The optimiser was MuonClip: Muon here.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "48b": {
        "width": 2304,
        "layers": 27,
        "kda": {"heads": 32, "key_dim": 128, "conv_init": "normal"},
        "mla": {"preset": "kimi"},
        "ffn_dim": 9216,
        "experts": 256,
        "top_k": 8,
        "expert_dim": 1024,
        "vocab": 163_840,
    },
    "tiny": {
        "width": 64,
        "layers": 5,
        "kda": {"heads": 4, "key_dim": 16, "conv_init": "normal"},
        "mla": {"preset": "kimi", "heads": 4, "kv_rank": 32, "nope_dim": 16, "rope_dim": 8, "value_dim": 16},
        "ffn_dim": 128,
        "experts": 8,
        "top_k": 2,
        "expert_dim": 32,
    },
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    full = [*range(3, s.layers - 1, 4), s.layers - 1]
    model = {
        "d_model": s.width,
        "num_layers": s.layers,
        "pattern": f"select({full}, mla, kda)",
        "mixers": {"kda": s.kda, "mla": s.mla},
        "ffn_pattern": f"swiglu, {s.layers - 1}*moe",
        "ffn_dim": s.ffn_dim,
        "moe": {
            "experts": s.experts,
            "top_k": s.top_k,
            "width": s.expert_dim,
            "router": "sigmoid",
            "scale": 2.446,
            "bias": True,
            "shared": 1,
            "balance": 0.0,
            "z_loss": 0.0,
        },
        "norm_eps": 1e-5,
        "tie": False,
    }
    config = pretraining(s, model, seq_len=4096, rows=8192, tokens=1.4e12, lr=1.1e-3)
    config.optim.name = "muon"
    config.optim.schedule = "wsd"
    return config
