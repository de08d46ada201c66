"""Aaren (arXiv 2405.13956): a small Transformer whose queries are parameters, and so a recurrence.

    python -m launch.train --config=recipes/aaren --workdir=runs/aaren --config.data.path=<text>
    python -m launch.train --config=recipes/aaren:tiny --workdir=runs/aaren_tiny

The size small is hydrax's own: the paper has time series and reinforcement learning, no language. It has no positions,
and what it reads does not depend on the order of the past, so that a gated convolution comes before each layer here.
Hardware: one GPU of 24 GB. Not run by us.
Expected: 57M parameters. Published: on 38 data sets comparable to Transformers, with constant memory.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "small": {"width": 512, "layers": 16, "heads": 8, "vocab": 257},
    "tiny": {"width": 32, "layers": 4, "heads": 2},
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    model = {
        "d_model": s.width,
        "num_layers": s.layers,
        "pattern": "fill((gated_conv, aaren))",
        "mixers": {"aaren": {"heads": s.heads}, "gated_conv": {"preset": "based"}},
    }
    return pretraining(s, model, seq_len=1024, rows=64, tokens=1e9, lr=1e-3, warmup=500)
