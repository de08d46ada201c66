"""Griffin, as RecurrentGemma 2B (arXiv 2402.19427): two layers of RG-LRU to one of sliding-window attention.

    python -m launch.train --config=recipes/griffin --workdir=runs/griffin --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 256000 tokens>
    python -m launch.train --config=recipes/griffin:tiny --workdir=runs/griffin_tiny

One key head, half of its channels turned; embeddings times √width, logits capped at 30, norms with weights around 1.
Hardware: 8 GPUs of 80 GB (`--config.mesh.fsdp=8`). Not run by us.
Expected: 2683M parameters. No published loss; the training recipe could not be verified.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "2b": {"width": 2560, "layers": 26, "heads": 10, "window": 2048, "ffn_dim": 7680, "vocab": 256_000},
    "tiny": {"width": 32, "layers": 5, "heads": 2, "window": 16, "ffn_dim": 96},
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    model = {
        "d_model": s.width,
        "num_layers": s.layers,
        "pattern": "fill((2*rglru, swa))",
        "mixers": {
            "rglru": {"heads": s.heads},
            "swa": {
                "heads": s.heads,
                "kv_heads": 1,
                "window": s.window,
                "rope": {"fraction": 0.5},
                "out_bias": True,
            },
        },
        "ffn": "geglu",
        "ffn_dim": s.ffn_dim,
        "ffn_bias": True,
        "norm": "rmsnorm1p",
        "embed_scale": s.width**0.5,
        "logit_softcap": 30.0,
    }
    return pretraining(s, model, seq_len=8192, rows=256, tokens=300e9, lr=3e-4)
