"""Flux Attention (arXiv 2604.07394) on a Qwen3 8B: every layer reads a document with full or with windowed attention.

    python -m launch.train --config=recipes/flux --workdir=runs/flux --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 151936 tokens>
    python -m launch.train --config=recipes/flux:train=routers --workdir=runs/flux_routers \\
        --config.train.init_from=runs/dense ...
    python -m launch.train --config=recipes/flux:tiny --workdir=runs/flux_tiny

A router per layer reads the first 100 tokens of a document and chooses once; both choices share their weights. A loss
holds the share of full attention near 0.55, the complement of the published sparsity for question answering; there the
router reads the end of the input too, which here would tell the model its future. train=all learns everything together,
routers freezes all else, as published, and starts from a model of attention alone.
Hardware: 32 GPUs of 80 GB (`--config.mesh.fsdp=32`). Not run by us.
Expected: 8200M parameters. Published: 2.8 times the speed of full attention in prefill, 2.0 times in decoding.
"""

from ml_collections import ConfigDict

from configs.recipes.common import choose, pretraining, sized

SIZES = {
    "8b": {
        "width": 4096,
        "layers": 36,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "window": 2048,
        "sink_tokens": 128,
        "route": {"prefix": 100, "width": 64},
        "ffn_dim": 12_288,
        "vocab": 151_936,
    },
    "tiny": {
        "width": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "window": 8,
        "sink_tokens": 2,
        "route": {"prefix": 6, "width": 8},
        "ffn_dim": 64,
    },
}
RATES = {"all": {}, "routers": {"*/mixer/hidden/*": 1.0, "*/mixer/choice/*": 1.0, "*": 0.0}}
"""Factors on the rate of learning, by pattern."""


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size, train."""
    s, args = sized(arg, SIZES, train="all")
    attention = {"heads": s.heads, "kv_heads": s.kv_heads, "key_dim": s.head_dim, "qk_norm": "head"}
    attention["rope"] = {"theta": 1e6}
    model = {
        "d_model": s.width,
        "num_layers": s.layers,
        "pattern": "fill(routed)",
        "blocks": {"routed": {"mixer": "route(attn, swa)", "options": {**s.route, "target": 0.55, "weight": 0.1}}},
        "mixers": {"attn": attention, "swa": {**attention, "window": s.window, "sink_tokens": s.sink_tokens}},
        "ffn_dim": s.ffn_dim,
        "tie": False,
    }
    config = pretraining(s, model, seq_len=65_536, rows=48, tokens=1e9, lr=5e-4, warmup=30)
    config.optim.rates = choose("train", args.train, RATES)
    return config
