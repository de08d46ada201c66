"""LT2 1.3B (arXiv 2605.20670): 20 layers run four times over, linear, sparse, or with a fifth of attention.

    python -m launch.train --config=recipes/lt2 --workdir=runs/lt2 --config.data.path=<FineWeb-Edu> \\
        --config.data.tokenizer=<tokenizer.json of 128256 tokens>
    python -m launch.train --config=recipes/lt2:layers=linear --workdir=runs/lt2_linear ...
    python -m launch.train --config=recipes/lt2:tiny --workdir=runs/lt2_tiny

Layers: hybrid (every fifth is attention), bookend (the first and last two), linear, full; sparse (all attend to the
tokens that an indexer chooses), sparse_hybrid (every fifth does), window (the last 2048 tokens). Every run starts its
recurrences anew and adds what came in, by a gate per channel that is 0 at first; so does every repetition of the
pattern, by one number. The published indexer learns nothing; here it learns from the attention.
Hardware: 8 GPUs of 80 GB (`--config.mesh.fsdp=8`). Not run by us.
Expected: 1705M parameters. Published, mean of tasks and perplexity at 100B tokens: hybrid 61.39 and 9.31, bookend
61.52, full 59.27 and 9.87, sparse_hybrid 59.3 in tasks; other tables of the paper differ from these. 5 times the
decoding speed of full at 8K.
"""

from ml_collections import ConfigDict

from configs.recipes.common import choose, pretraining, sized

SIZES = {
    "1b3": {
        "width": 2048,
        "layers": 20,
        "heads": 16,
        "gdn": {"heads": 6, "key_dim": 256},
        "dsa": {"keep": 2048, "index_dim": 64},
        "window": 2048,
        "ffn_dim": 5632,
        "vocab": 128_256,
    },
    "tiny": {
        "width": 32,
        "layers": 5,
        "heads": 4,
        "gdn": {"heads": 2, "key_dim": 8},
        "dsa": {"keep": 5, "index_heads": 2, "index_dim": 8},
        "window": 5,
        "ffn_dim": 64,
    },
}
LAYERS = {
    "hybrid": "every(4, gdn, attn)",
    "bookend": "bookend(2, attn, gdn)",
    "linear": "fill(gdn)",
    "full": "fill(attn)",
    "sparse": "fill(dsa)",
    "sparse_hybrid": "every(4, gdn, dsa)",
    "window": "fill(swa)",
}
ALIKE = 5
"""Layers of a gated block: those of a period of the hybrid, also where all layers are alike; of bookend all."""


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size, layers."""
    s, args = sized(arg, SIZES, layers="hybrid")
    softmax = {"heads": s.heads, "out_gate": "elementwise"}
    model = {
        "d_model": s.width,
        "num_layers": s.layers,
        "pattern": choose("layers", args.layers, LAYERS),
        "mixers": {
            "gdn": s.gdn,
            "attn": softmax,
            "dsa": {**softmax, **s.dsa},
            "swa": {**softmax, "window": s.window},
        },
        "loop": {"n": 4, "gate": "channel", "block_gate": s.layers if args.layers == "bookend" else ALIKE},
        "ffn_dim": s.ffn_dim,
        "tie": False,
    }
    return pretraining(s, model, seq_len=4096, rows=96, tokens=100e9, lr=3e-4, warmup=5000)
