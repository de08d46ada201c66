"""Based (arXiv 2402.18668): Taylor linear attention, small windows and gated convolutions, in layers of their own.

    python -m launch.train --config=recipes/based --workdir=runs/based --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 50257 tokens>
    python -m launch.train --config=recipes/based:1p3b --workdir=runs/based_1p3b ...
    python -m launch.train --config=recipes/based:tiny --workdir=runs/based_tiny

The sizes of the released code: 360m, size=1p3b. Its window of 128 looks back 64 tokens, hence 65 with the query's own.
Hardware: one GPU of 80 GB for 360m, 8 for 1p3b (`--config.mesh.fsdp=8`). Not run by us.
Expected: 363M parameters. Published: perplexities of Mamba at up to 1.3B, and 6.2 points more on recall.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

TAYLOR, WINDOW = (1, 6, 11, 16, 21), (2, 7, 12, 17, 22)
SIZES = {
    "360m": {"width": 1024, "layers": 27, "heads": 16, "taylor": TAYLOR, "window": WINDOW, "vocab": 50_257},
    "1p3b": {
        "width": 1792,
        "layers": 36,
        "heads": 16,
        "taylor": (*TAYLOR, 27, 33),
        "window": (*WINDOW, 28, 34),
        "vocab": 50_257,
    },
    "tiny": {"width": 32, "layers": 4, "heads": 2, "taylor": (1,), "window": (2,)},
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    special = dict.fromkeys(s.taylor, "based") | dict.fromkeys(s.window, "swa")
    tiny = s.name == "tiny"
    model = {
        "d_model": s.width,
        "pattern": ",".join(special.get(i, "gated_conv") for i in range(s.layers)),
        "mixers": {
            "based": {"heads": s.heads, "key_dim": 4 if tiny else 16},
            "swa": {"heads": s.heads, "window": 9 if tiny else 65},
            "gated_conv": {"preset": "based"},
        },
        "ffn_dim": 2 * s.width,
        "norm_eps": 1e-5,
    }
    return pretraining(s, model, seq_len=2048, rows=256, tokens=20_000 * 256 * 2048, lr=8e-4, warmup=200)
