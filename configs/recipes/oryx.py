"""Oryx (arXiv 2605.28769): layers that read each token by attention or by a recurrence over the same keys and values.

    python -m launch.train --config=recipes/oryx --workdir=runs/oryx --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 32000 tokens>
    python -m launch.train --config=recipes/oryx:mixer=mamba2 --workdir=runs/oryx_mamba2 ...
    python -m launch.train --config=recipes/oryx:tiny --workdir=runs/oryx_tiny

Mixers: gdn, mamba2. In training, chunks of tokens are read by attention with a probability of their document: none, all
or between, so that both ways stay good alone. Widths were not published; these make 1.4B without embeddings.
Hardware: 8 GPUs of 80 GB (`--config.mesh.fsdp=8`). Not run by us.
Expected: 1502M parameters. Published at 1.4B: 0.7 points or more above the same model of one mixer in the mean of
tasks; retrieval of a Transformer with less than a tenth of the tokens read by attention. Rates and batches are ours.
"""

from ml_collections import ConfigDict

from configs.recipes.common import choose, pretraining, sized

SIZES = {
    "1b4": {"width": 2048, "layers": 24, "heads": 16, "head_dim": 128, "ffn_dim": 5632, "chunk": 256, "vocab": 32_000},
    "tiny": {"width": 32, "layers": 2, "heads": 4, "head_dim": 8, "ffn_dim": 64, "chunk": 8},
}
MIXERS = {"gdn": {}, "mamba2": {"conv_activation": "none"}}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size, mixer."""
    s, args = sized(arg, SIZES, mixer="gdn")
    options = choose("mixer", args.mixer, MIXERS)
    widths = {"heads": s.heads, "value_heads": s.heads, "key_dim": s.head_dim, "value_dim": s.head_dim}
    model = {
        "d_model": s.width,
        "pattern": f"{s.layers}*modes({args.mixer})",
        "mixers": {args.mixer: {**widths, **options}},
        "ffn_dim": s.ffn_dim,
    }
    config = pretraining(s, model, seq_len=4096, rows=256, tokens=100e9, lr=3e-4)
    config.data.modes.update(schedule="mixed", chunk=s.chunk)
    return config
