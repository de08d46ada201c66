"""Olmo Hybrid 7B (arXiv 2604.03444): three layers of Gated DeltaNet to one of attention.

    python -m launch.train --config=recipes/olmo_hybrid --workdir=runs/olmo_hybrid --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 100352 tokens>
    python -m launch.train --config=recipes/olmo_hybrid:tiny --workdir=runs/olmo_tiny

Attention layers norm what they add, x + norm(f(x)), layers of Gated DeltaNet what they read, as the published weights
do; β reaches 2, so that states can be tracked. Rotary positions were removed for rows of 65536 at the end.
Hardware: 8 GPUs of 80 GB (`--config.mesh.fsdp=8`), thousands for the published 6T tokens. Not run by us.
Expected: 7431M parameters. Published against Olmo 3 7B: its MMLU with 49% fewer tokens, its loss on Common Crawl with
35% fewer, RULER at 64K 85.0 to 70.9, at the same speed of training.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "7b": {
        "width": 3840,
        "layers": 32,
        "heads": 30,
        "gdn": {"preset": "olmo"},
        "ffn_dim": 11_008,
        "vocab": 100_352,
    },
    "tiny": {
        "width": 64,
        "layers": 4,
        "heads": 4,
        "gdn": {"preset": "olmo", "heads": 4, "key_dim": 8, "value_dim": 16},
        "ffn_dim": 128,
    },
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    model = {
        "d_model": s.width,
        "num_layers": s.layers,
        "pattern": "every(3, gdn, full)",
        "blocks": {"full": {"mixer": "attn", "norm_place": "reordered"}},
        "mixers": {"gdn": s.gdn, "attn": {"heads": s.heads, "qk_norm": "full", "rope": {"theta": 5e5}}},
        "ffn_dim": s.ffn_dim,
        "tie": False,
    }
    config = pretraining(s, model, seq_len=8192, rows=512, tokens=6e12, lr=3e-4)
    config.optim.z_loss = 1e-5
    return config
