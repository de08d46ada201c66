"""Phi-3-small 7B (arXiv 2404.14219): S2-Attention (2407.17678) in one layer, full attention in the next.

    python -m launch.train --config=recipes/phi3_small --workdir=runs/phi3_small --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 100352 tokens>
    python -m launch.train --config=recipes/phi3_small:layers=sparse --workdir=runs/phi3_small_sparse ...
    python -m launch.train --config=recipes/phi3_small:tiny --workdir=runs/phi3_small_tiny

A head of a sparse layer sees the last 16 blocks of 64 tokens, and of all blocks every eighth, another one per head.
Layers: hybrid (every other one is full), first (the first two are full), sparse. The released model has LayerNorms with
biases and a clipped GEGLU; here are RMSNorm and GEGLU.
Hardware: 32 GPUs of 80 GB (`--config.mesh.fsdp=32`). Not run by us.
Expected: 7391M parameters. No published loss of this setup; rates and batches are ours.
"""

from ml_collections import ConfigDict

from configs.recipes.common import choose, pretraining, sized

SIZES = {
    "7b": {
        "width": 4096,
        "layers": 32,
        "heads": 32,
        "kv_heads": 8,
        "s2": {"block": 64, "local": 16, "vert_stride": 8},
        "ffn_dim": 14_336,
        "vocab": 100_352,
    },
    "tiny": {
        "width": 32,
        "layers": 4,
        "heads": 4,
        "kv_heads": 2,
        "s2": {"block": 4, "local": 2, "vert_stride": 2},
        "ffn_dim": 64,
    },
}
LAYERS = {"hybrid": "fill((swa, attn))", "first": "select([0, 1], attn, swa)", "sparse": "fill(swa)"}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size, layers."""
    s, args = sized(arg, SIZES, layers="hybrid")
    attention = {"heads": s.heads, "kv_heads": s.kv_heads, "rope": {"theta": 1e6}}
    model = {
        "d_model": s.width,
        "num_layers": s.layers,
        "pattern": choose("layers", args.layers, LAYERS),
        "mixers": {"attn": attention, "swa": {**attention, "pattern": "s2", "s2": s.s2}},
        "ffn": "geglu",
        "ffn_dim": s.ffn_dim,
        "tie": True,
    }
    return pretraining(s, model, seq_len=8192, rows=512, tokens=4.8e12, lr=3e-4)
