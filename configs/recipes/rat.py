"""RAT (arXiv 2507.04416): recurrences within chunks of 16 tokens, attention to the ends of chunks.

    python -m launch.train --config=recipes/rat --workdir=runs/rat --config.data.path=<FineWeb-Edu> \\
        --config.data.tokenizer=<tokenizer.json of 32000 tokens>
    python -m launch.train --config=recipes/rat:layers=rat_swa --workdir=runs/rat_swa ...
    python -m launch.train --config=recipes/rat:tiny --workdir=runs/rat_tiny

The size of the paper: 1p3b. layers=rat_swa has attention over 1024 tokens in every second layer; the released code
looks back 1024, which is 1025 with the query's own.
Hardware: 8 GPUs of 80 GB (`--config.mesh.fsdp=8`). Not run by us.
Expected: 1299M parameters. Published: 7 times the training speed of attention at 100k tokens; with rat_swa about a
point more on commonsense tasks.
"""

from ml_collections import ConfigDict

from configs.recipes.common import choose, pretraining, sized

SIZES = {
    "1p3b": {"width": 2048, "layers": 24, "heads": 16, "window": 1024, "chunk": 16, "vocab": 32_000},
    "tiny": {"width": 32, "layers": 4, "heads": 4, "window": 9, "chunk": 4},
}
LAYERS = {"rat": "fill(rat)", "rat_swa": "fill((rat, swa))"}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size, layers."""
    s, args = sized(arg, SIZES, layers="rat")
    model = {
        "d_model": s.width,
        "num_layers": s.layers,
        "pattern": choose("layers", args.layers, LAYERS),
        "mixers": {
            "rat": {"heads": s.heads, "groups": 2, "chunk": s.chunk},
            "swa": {"heads": s.heads, "window": s.window},
        },
        "ffn": "mlp",
        "ffn_dim": 4 * s.width,
    }
    config = pretraining(s, model, seq_len=4096, rows=512, tokens=100e9, lr=8e-4, warmup=2400)
    config.optim.final_fraction = 1e-6 / 8e-4
    return config
