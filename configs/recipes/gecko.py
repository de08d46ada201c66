"""Gecko (arXiv 2601.06463): Megalodon with a norm that forgets, attention to two chunks, and a working memory.

    python -m launch.train --config=recipes/gecko --workdir=runs/gecko --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 32000 tokens>
    python -m launch.train --config=recipes/gecko:tiny --workdir=runs/gecko_tiny

The 7B of the released code. The norm before each FFN is an RMSNorm with weights around 1 here, and a LayerNorm there.
Hardware: 8 GPUs of 80 GB at least (`--config.mesh.fsdp=8`). Not run by us.
Expected: 7386M parameters. Published: a training loss of 1.68 after 2T tokens.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "7b": {"width": 4096, "layers": 32, "heads": 4, "ffn_dim": 8192, "groups": 64, "vocab": 32_000},
    "tiny": {"width": 32, "layers": 2, "heads": 2, "ffn_dim": 80, "groups": 8, "chunk": 3, "modes": 4},
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    options = {"heads": s.heads, "groups": s.groups, "chunk": s.get("chunk", 2048), "modes": s.get("modes", 16)}
    model = {
        "d_model": s.width,
        "pattern": f"{s.layers}*gecko",
        "mixers": {"gecko": options},
        "ffn": "swiglu",
        "ffn_dim": s.ffn_dim,
        "norm": "rmsnorm1p",
        "norm_eps": 1e-5,
        "final_norm": "timestep_decay_norm",
        "final_groups": s.groups,
        "tie": False,
    }
    return pretraining(s, model, seq_len=32_768, rows=128, tokens=2e12, lr=1e-3)
