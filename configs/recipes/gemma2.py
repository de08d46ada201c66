"""Gemma 2 2B (arXiv 2408.00118): sliding-window and full attention in turn, norms before and after every sublayer.

    python -m launch.train --config=recipes/gemma2 --workdir=runs/gemma2 --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 256000 tokens>
    python -m launch.train --config=recipes/gemma2:tiny --workdir=runs/gemma2_tiny

Scores capped at 50, logits at 30, embeddings times √width, norms with weights around 1.
Hardware: 8 GPUs of 80 GB (`--config.mesh.fsdp=8`). Not run by us.
Expected: 2614M parameters. No published loss; the 2B was distilled from a larger model, which this recipe does not do;
rates and batches are ours.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "2b": {
        "width": 2304,
        "layers": 26,
        "heads": 8,
        "kv_heads": 4,
        "head_dim": 256,
        "window": 4096,
        "ffn_dim": 9216,
        "vocab": 256_000,
    },
    "tiny": {"width": 32, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 16, "window": 16, "ffn_dim": 128},
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    attention = {"heads": s.heads, "kv_heads": s.kv_heads, "key_dim": s.head_dim, "softcap": 50.0}
    model = {
        "d_model": s.width,
        "num_layers": s.layers,
        "pattern": "fill((swa, attn))",
        "mixers": {"attn": attention, "swa": {**attention, "window": s.window}},
        "ffn": "geglu",
        "ffn_dim": s.ffn_dim,
        "norm": "rmsnorm1p",
        "norm_place": "sandwich",
        "embed_scale": s.width**0.5,
        "logit_softcap": 30.0,
    }
    return pretraining(s, model, seq_len=8192, rows=512, tokens=2e12, lr=3e-4)
