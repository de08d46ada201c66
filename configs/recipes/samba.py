"""Samba (arXiv 2406.07522): Mamba and sliding-window attention in turn, no layer that sees everything.

    python -m launch.train --config=recipes/samba --workdir=runs/samba --config.data.path=<SlimPajama> \\
        --config.data.tokenizer=<tokenizer.json of 32000 tokens>
    python -m launch.train --config=recipes/samba:1b3 --workdir=runs/samba_1b3 ...
    python -m launch.train --config=recipes/samba:tiny --workdir=runs/samba_tiny

Hardware: 8 GPUs of 80 GB (`--config.mesh.fsdp=8`). Not run by us.
Expected: 422M parameters. Published as 421M; perplexities and rates could not be verified.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "421m": {
        "width": 1536,
        "layers": 12,
        "heads": 12,
        "window": 2048,
        "ffn_dim": 4096,
        "vocab": 32_000,
        "tokens": 20e9,
    },
    "1b3": {
        "width": 2304,
        "layers": 18,
        "heads": 18,
        "window": 2048,
        "ffn_dim": 6144,
        "vocab": 32_000,
        "tokens": 100e9,
    },
    "tiny": {"width": 32, "layers": 4, "heads": 4, "window": 16, "ffn_dim": 64, "tokens": 0.0},
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    model = {
        "d_model": s.width,
        "num_layers": s.layers,
        "pattern": "fill((mamba, swa))",
        "mixers": {"swa": {"heads": s.heads, "window": s.window}},
        "ffn_dim": s.ffn_dim,
        "norm_eps": 1e-5,
    }
    return pretraining(s, model, seq_len=4096, rows=512, tokens=s.tokens, lr=4e-4)
