"""Megalodon (arXiv 2404.08801): chunked attention over complex moving averages, norms by the past, two-hop residuals.

    python -m launch.train --config=recipes/megalodon --workdir=runs/megalodon --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 32000 tokens>
    python -m launch.train --config=recipes/megalodon:tiny --workdir=runs/megalodon_tiny

The sizes of the released code: 200m, size=1p3b, size=7b. The norm before each FFN is an RMSNorm with weights around 1
here, and a LayerNorm there; ungated FFNs have a GELU here, and a SiLU there.
Hardware: one GPU of 80 GB for 200m, 8 for 1p3b (`--config.mesh.fsdp=8`). Not run by us.
Expected: 221M parameters, 1343M and 7386M in the larger sizes (2 · 32000 · width of them embeddings). Published: a
training loss of 1.70 of the 7B after 2T tokens.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "200m": {"width": 1024, "layers": 12, "heads": 1, "ffn": "mlp", "ffn_dim": 2560, "groups": 32, "vocab": 32_000},
    "1p3b": {"width": 2048, "layers": 24, "heads": 2, "ffn": "mlp", "ffn_dim": 4864, "groups": 64, "vocab": 32_000},
    "7b": {"width": 4096, "layers": 32, "heads": 4, "ffn": "swiglu", "ffn_dim": 8192, "groups": 64, "vocab": 32_000},
    "tiny": {"width": 32, "layers": 2, "heads": 2, "ffn": "mlp", "ffn_dim": 80, "groups": 8, "chunk": 6, "modes": 4},
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    options = {"heads": s.heads, "groups": s.groups, "chunk": s.get("chunk", 2048), "modes": s.get("modes", 16)}
    model = {
        "d_model": s.width,
        "pattern": f"{s.layers}*megalodon",
        "mixers": {"megalodon": options},
        "ffn": s.ffn,
        "ffn_dim": s.ffn_dim,
        "norm": "rmsnorm1p",
        "norm_eps": 1e-5,
        "two_hop": True,
        "final_norm": "timestep_norm",
        "final_groups": s.groups,
        "tie": False,
    }
    return pretraining(s, model, seq_len=32_768, rows=128, tokens=2e12, lr=1e-3)
