"""HybriDNA (arXiv 2502.10807): a language model of nucleotides, one layer of attention to seven of Mamba-2.

    python -m launch.train --config=recipes/hybridna --workdir=runs/hybridna --config.data.path=<genomes as text>
    python -m launch.train --config=recipes/hybridna:7b --workdir=runs/hybridna_7b ...
    python -m launch.train --config=recipes/hybridna:tiny --workdir=runs/hybridna_tiny

One byte is one nucleotide, rows are as long as the published contexts. Ratio, feed-forward widths and key heads could
not be verified; attention knows no positions here.
Hardware: 8 GPUs of 80 GB for 300m (`--config.mesh.fsdp=8`), 32 for 3b and 7b. Not run by us.
Expected: 355M parameters; nothing published but the names of the sizes, and no perplexity that was verified. Rates and
batches are ours.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "300m": {"width": 1024, "layers": 24, "heads": 16, "kv_heads": 4, "mamba2": {}, "vocab": None},
    "3b": {"width": 4096, "layers": 16, "heads": 32, "kv_heads": 8, "mamba2": {}, "vocab": None},
    "7b": {"width": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "mamba2": {}, "vocab": None},
    "tiny": {"width": 32, "layers": 8, "heads": 4, "kv_heads": 2, "mamba2": {"key_dim": 8, "value_dim": 16}},
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    model = {
        "d_model": s.width,
        "num_layers": s.layers,
        "pattern": "every(7, mamba2, attn)",
        "mixers": {
            "mamba2": s.mamba2,
            "attn": {"heads": s.heads, "kv_heads": s.kv_heads, "rope": {"fraction": 0.0}},
        },
    }
    return pretraining(s, model, seq_len=131_072, rows=8, tokens=100e9, lr=3e-4)
