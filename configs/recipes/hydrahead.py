"""HydraHead from scratch (arXiv 2606.20097): softmax and Gated DeltaNet heads in every layer, under one projection.

    python -m launch.train --config=recipes/hydrahead --workdir=runs/hydrahead --config.data.path=<FineWeb-Edu> \\
        --config.data.tokenizer=<tokenizer.json of 151936 tokens>
    python -m launch.train --config=recipes/hydrahead:full=2 --workdir=runs/hydrahead_7to1 ...
    python -m launch.train --config=recipes/hydrahead:tiny --workdir=runs/hydrahead_tiny

The shape of Qwen3 1.7B. Softmax heads know no positions, have an output gate that starts open, and queries that grow
with the logarithm of the position; those of Gated DeltaNet are turned. Each head is normed and scaled before they are
joined. The paper converts a trained model and keeps the heads that its retrieval needs; from scratch, every layer has
as many.
Hardware: 8 GPUs of 80 GB (`--config.mesh.fsdp=8`). Not run by us.
Expected: 1928M parameters. Published for conversions: one head in eight equals one layer in four on RULER from 16K to
256K within 3%, and has 9.66% more in hard reasoning; without norms a tenth of retrieval is lost. Rates and batches are
ours.
"""

import math

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "1b7": {"width": 2048, "layers": 28, "heads": 16, "head_dim": 128, "ffn_dim": 6144, "vocab": 151_936},
    "tiny": {"width": 64, "layers": 2, "heads": 8, "head_dim": 8, "ffn_dim": 128},
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size, full (softmax heads per layer; a quarter of all if 0)."""
    s, args = sized(arg, SIZES, full=0)
    full = args.full or s.heads // 4
    model = {
        "d_model": s.width,
        "pattern": f"{s.layers}*heads({full}*attn, {s.heads - full}*gdn)",
        "mixers": {
            "attn": {
                "kv_heads": full // math.gcd(full, 2),
                "key_dim": s.head_dim,
                "rope": {"fraction": 0.0},
                "qk_norm": "head",
                "out_gate": "elementwise",
                "out_gate_bias": 1.0,
                "q_logscale": 500.0,
            },
            "gdn": {"key_dim": s.head_dim, "value_dim": s.head_dim, "rope": {"theta": 1e6, "fraction": 1.0}},
        },
        "ffn_dim": s.ffn_dim,
    }
    return pretraining(s, model, seq_len=4096, rows=256, tokens=30e9, lr=3e-4)
