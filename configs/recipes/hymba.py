"""Hymba 1.5B (arXiv 2411.13676): attention and Mamba in parallel, learned tokens in front, keys shared by neighbours.

    python -m launch.train --config=recipes/hymba --workdir=runs/hymba --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 32001 tokens>
    python -m launch.train --config=recipes/hymba:tiny --workdir=runs/hymba_tiny

Three layers see everything; the others a window and the learned tokens. In each pair of those, and one group of three,
the first layer makes the keys and values of all. Branches are normed and averaged.
Hardware: 8 GPUs of 80 GB (`--config.mesh.fsdp=8`). Not run by us.
Expected: 1523M parameters. Published against Llama 3.2 3B: 1.32% more in the mean of tasks, a cache 11.67 times
smaller, 3.49 times the speed; sharing keys gave 0.60 of commonsense and 15% of speed for 0.75 of recall (300M, 100B
tokens). Rates and batches are ours.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "1b5": {
        "width": 1600,
        "layers": 32,
        "full": [0, 15, 31],
        "share": [[i, i + 1] for i in range(1, 14, 2)] + [[16, 17, 18]] + [[i, i + 1] for i in range(19, 30, 2)],
        "heads": 25,
        "kv_heads": 5,
        "window": 1025,  # the query's own key and 1024 before it
        "meta_tokens": 128,
        "ffn_dim": 5504,
        "vocab": 32_001,
    },
    "tiny": {
        "width": 32,
        "layers": 6,
        "full": [0, 5],
        "share": [[1, 2], [3, 4]],
        "heads": 4,
        "kv_heads": 2,
        "window": 17,
        "meta_tokens": 4,
        "ffn_dim": 64,
    },
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    # values are twice as wide as queries and keys: as many channels as Mamba has
    heads = {"heads": s.heads, "kv_heads": s.kv_heads, "value_dim": 2 * s.width // s.heads}
    model = {
        "d_model": s.width,
        "num_layers": s.layers,
        "pattern": f"select({s.full}, parallel(attn, mamba), parallel(swa, mamba))",
        "mixers": {
            "attn": heads,
            "swa": {**heads, "window": s.window, "sink_tokens": s.meta_tokens},
            "mamba": {"bcdt_norm": True},
        },
        "share": {"kv": s.share},
        "prefix": {"meta_tokens": s.meta_tokens},
        "ffn_dim": s.ffn_dim,
    }
    return pretraining(s, model, seq_len=2048, rows=1024, tokens=1.5e12, lr=3e-4)
