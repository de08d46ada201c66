"""Deconstructing Attention (arXiv 2510.11602): attention without one of its principles, everywhere or in some layers.

    python -m launch.train --config=recipes/deconstructing:mixer=nonapprox --workdir=runs/nonapprox \\
        --config.data.path=<SlimPajama> --config.data.tokenizer=<tokenizer.json of 50304 tokens>
    python -m launch.train --config=recipes/deconstructing:mixer=taylor,layout=uniform --workdir=runs/taylor ...
    python -m launch.train --config=recipes/deconstructing:tiny --workdir=runs/deconstructing_tiny

Mixers: mlp (tokens apart), taylor (no exponential), nonapprox (keys meet only their own query), fixedqk (weights from
random numbers), staticqk (weights from the embeddings), and attn itself; taylor has keys of 16 per head, and so fewer
parameters than the others. Layouts, by where attention stays: even (the default), odd, top (below the upper half),
middle (outside of the middle half), bottom (above the lowest quarter), quarter (every fourth), first, last, bilateral
(first and last), uniform (nowhere).
Hardware: 8 GPUs of 80 GB (`--config.mesh.fsdp=8`). Not run by us.
Expected: 511M parameters, published as 500M; widths are ours. Published perplexity on WikiText at 15B tokens, attention
38.1; uniform and even: mlp 993.5 and 45.8, taylor 47.9 and 39.4, nonapprox above 9000 and 39.4, fixedqk 84.8 and 39.3,
staticqk 79.9 and 38.7. Of the layouts only first and last fail. Rates and batches are ours.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs.recipes.common import choose, pretraining, sized

SIZES = {
    "500m": {"width": 1024, "layers": 24, "heads": 16, "ffn_dim": 4864, "vocab": 50_304},
    "tiny": {"width": 32, "layers": 8, "heads": 4, "ffn_dim": 64},
}
# Whether layer i of 1 ... L keeps attention.
LAYOUTS: dict[str, Callable[[int, int], bool]] = {
    "even": lambda i, L: i % 2 == 0,
    "odd": lambda i, L: i % 2 == 1,
    "top": lambda i, L: i <= L // 2,
    "middle": lambda i, L: not L // 4 < i <= L - L // 4,
    "bottom": lambda i, L: i > L // 4,
    "quarter": lambda i, L: i % 4 == 0,
    "first": lambda i, L: i == 1,
    "last": lambda i, L: i == L,
    "bilateral": lambda i, L: i in (1, L),
    "uniform": lambda i, L: False,
}
MIXERS = {name: name for name in ("attn", "mlp", "taylor", "nonapprox", "fixedqk", "staticqk")}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size, mixer, layout."""
    s, args = sized(arg, SIZES, mixer="staticqk", layout="even")
    mixer, keeps = choose("mixer", args.mixer, MIXERS), choose("layout", args.layout, LAYOUTS)
    kept = [i - 1 for i in range(1, s.layers + 1) if keeps(i, s.layers)]
    headed = {name: {"heads": s.heads} for name in MIXERS if name != "mlp"}
    model = {
        "d_model": s.width,
        "num_layers": s.layers,
        "pattern": f"select({kept}, attn, {mixer})",
        "mixers": {**headed, "attn": {"heads": s.heads, "bias": True}},
        "ffn_dim": s.ffn_dim,
    }
    return pretraining(s, model, seq_len=2048, rows=256, tokens=15e9, lr=3e-4)
