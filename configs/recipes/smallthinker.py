"""SmallThinker 4B-A0.6B (arXiv 2507.20984): one layer of attention without positions to three with a window.

    python -m launch.train --config=recipes/smallthinker --workdir=runs/smallthinker --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 151936 tokens>
    python -m launch.train --config=recipes/smallthinker:21b --workdir=runs/smallthinker_21b ...
    python -m launch.train --config=recipes/smallthinker:tiny --workdir=runs/smallthinker_tiny

Experts (ReGLU) are chosen from the stream before attention, so that their weights can be fetched meanwhile.
Hardware: 8 GPUs of 80 GB for 4b (`--config.mesh.fsdp=8`), 32 for 21b. Not run by us.
Expected: 4035M parameters, 0.6B of them active. No published loss.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "4b": {
        "width": 1536,
        "layers": 32,
        "heads": 12,
        "kv_heads": 2,
        "head_dim": 128,
        "window": 4096,
        "experts": 32,
        "top_k": 4,
        "expert_dim": 768,
        "tie": True,
        "vocab": 151_936,
    },
    "21b": {
        "width": 2560,
        "layers": 52,
        "heads": 28,
        "kv_heads": 4,
        "head_dim": 128,
        "window": 4096,
        "experts": 64,
        "top_k": 6,
        "expert_dim": 768,
        "tie": False,
        "vocab": 151_936,
    },
    "tiny": {
        "width": 32,
        "layers": 4,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "window": 16,
        "experts": 4,
        "top_k": 2,
        "expert_dim": 32,
        "tie": True,
    },
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    heads = {"heads": s.heads, "kv_heads": s.kv_heads, "key_dim": s.head_dim}
    model = {
        "d_model": s.width,
        "num_layers": s.layers,
        "pattern": "fill((attn, 3*swa))",
        "mixers": {
            "attn": {**heads, "rope": {"fraction": 0.0}},
            "swa": {**heads, "rope": {"theta": 1e5}, "window": s.window},
        },
        "ffn": "moe",
        "moe": {
            "experts": s.experts,
            "top_k": s.top_k,
            "width": s.expert_dim,
            "kind": "reglu",
            "router": "sigmoid",
            "router_at": "pre_attn",
        },
        "tie": s.tie,
    }
    return pretraining(s, model, seq_len=4096, rows=1536, tokens=2.5e12, lr=3e-4)
