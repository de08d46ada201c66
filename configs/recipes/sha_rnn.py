"""SHA-RNN at the size for enwik8 (arXiv 1911.11423): LSTMs, one attention with a single head, Boom layers, on bytes.

    python -m launch.train --config=recipes/sha_rnn --workdir=runs/sha_rnn --config.data.path=<text>
    python -m launch.train --config=recipes/sha_rnn:layers=all --workdir=runs/sha_rnn_all --config.data.path=<text>
    python -m launch.train --config=recipes/sha_rnn:tiny --workdir=runs/sha_rnn_tiny

The last layer but one attends; with layers=all every layer does. Layers add to the stream here and have output
projections, a D² more each; there they replace it. Rows have 8192 tokens, so that attention over 5000 has
them; there segments of 1024 follow each other and hand their states on. AdamW takes the place of LAMB, there is no
dropout, and the number of steps is ours.
Hardware: one GPU of 80 GB. Not run by us.
Expected: 58M parameters. Published: 1.08 bits per byte on enwik8, 1.07 with layers=all.
"""

from ml_collections import ConfigDict

from configs.recipes.common import choose, pretraining, sized

SIZES = {
    "enwik8": {"width": 1024, "window": 5000, "eps": 1e-12, "vocab": 257},
    "tiny": {"width": 32, "window": 9, "eps": 1e-5},
}
LAYERS = {"one": "2*lstm,sha_rnn,lstm", "all": "4*sha_rnn"}
STEPS, ROWS, TOKENS = 100_000, 2, 8192


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size, layers."""
    s, args = sized(arg, SIZES, layers="one")
    model = {
        "d_model": s.width,
        "pattern": choose("layers", args.layers, LAYERS),
        "mixers": {"sha_rnn": {"window": s.window, "norm_eps": s.eps}},
        "ffn": "boom",
        "ffn_bias": True,
        "norm": "layernorm",
        "norm_eps": s.eps,
    }
    return pretraining(s, model, seq_len=TOKENS, rows=ROWS, tokens=STEPS * ROWS * TOKENS, lr=1e-3, warmup=800)
