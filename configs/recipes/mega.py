"""Mega at the size for enwik8 (arXiv 2209.10655): gated attention in chunks over moving averages, on bytes.

    python -m launch.train --config=recipes/mega --workdir=runs/mega --config.data.path=<text>
    python -m launch.train --config=recipes/mega:tiny --workdir=runs/mega_tiny
    python -m launch.train --config=recipes/mega:bias=rotary,weights=laplace --workdir=runs/mega_laplace \\
        --config.data.path=<text>

Norms are RMSNorms and the FFN has a GELU here, LayerNorms and a SiLU there; rows have 4 chunks, there 2 to 6 at random;
rows per step are ours.
Hardware: one GPU of 80 GB. Not run by us.
Expected: 39M parameters. Published: 1.02 bits per byte on enwik8.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "enwik8": {
        "width": 512,
        "layers": 12,
        "key_dim": 128,
        "inner_dim": 1024,
        "ffn_dim": 1024,
        "chunk": 2048,
        "vocab": 257,
    },
    "tiny": {"width": 32, "layers": 2, "key_dim": 8, "inner_dim": 64, "ffn_dim": 64, "chunk": 6},
}
STEPS, ROWS, TOKENS = 400_000, 8, 4 * 2048


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size, bias, weights."""
    s, args = sized(arg, SIZES, bias="simple", weights="softmax")
    options = {
        "key_dim": s.key_dim,
        "inner_dim": s.inner_dim,
        "chunk": s.chunk,
        "modes": 16,
        "bias": args.bias,
        "weights": args.weights,
    }
    model = {
        "d_model": s.width,
        "pattern": f"{s.layers}*mega",
        "mixers": {"mega": options},
        "ffn": "mlp",
        "ffn_dim": s.ffn_dim,
        "ffn_bias": True,
    }
    config = pretraining(s, model, seq_len=TOKENS, rows=ROWS, tokens=STEPS * ROWS * TOKENS, lr=5e-3, warmup=24_000)
    config.optim.update(schedule="wsd", decay_fraction=1.0, final_fraction=0.0, b2=0.98, clip=0.25)
    return config
