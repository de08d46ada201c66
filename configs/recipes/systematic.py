"""Six linear mixers in five ratios to attention, at two sizes (arXiv 2507.06457).

    python -m launch.train --config=recipes/systematic:mixer=gdn,ratio=6 --workdir=runs/gdn_6 \\
        --config.data.path=<FineWeb-Edu> --config.data.tokenizer=<tokenizer.json of 32000 tokens>
    python -m launch.train --config=recipes/systematic:mixer=hgrn2,ratio=3,size=1b3 ...

Mixers: hgrn, retention, gla, hgrn2, deltanet, gdn, and attn for the Transformer. Ratio: linear layers per attention
layer, 24, 12, 6, 3 or 0 for none; 24 layers, attention at i with (i + 1) mod (ratio + 1) = 0, or last.
Hardware: 8 GPUs of 80 GB for 340m, 32 for 1b3 (`--config.mesh.fsdp=8`). Not run by us.
Expected, published, mean of ARC-c, ARC-e, HellaSwag, LAMBADA, OBQA and PIQA: 340m Transformer 0.444, hgrn2 6:1 0.456,
hgrn 6:1 0.448, gdn alone 0.442, deltanet and gla 6:1 0.441, retention 24:1 0.436; 1b3 Transformer 0.548, gdn 24:1 and
hgrn2 6:1 0.565, hgrn 6:1 0.559, deltanet 6:1 0.553, gla 3:1 0.551, retention 6:1 0.547. Recall (RULER) grows with
attention and is flat beyond 3:1. Learning rate and warmup were not published; gdn alone has 425M parameters.
"""

from ml_collections import ConfigDict

from configs import common
from configs.recipes.common import OPTIONS, language_model, steps
from hydrax.core.build import ConfigError

SIZES = {"340m": (1024, 256, 20e9), "1b3": (2048, 512, 100e9)}  # d_model, rows of 2048 tokens per step, tokens
RATIOS = (0, 3, 6, 12, 24)
MIXERS = ("attn", "deltanet", "gdn", "gla", "hgrn", "hgrn2", "retention")


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: mixer, ratio, size."""
    args = common.parse_arg(arg, mixer="gdn", ratio=0, size="340m")
    for key, allowed in (("mixer", MIXERS), ("ratio", RATIOS), ("size", SIZES)):
        if args[key] not in allowed:
            raise ConfigError(key, args[key], f"expected one of {', '.join(map(str, allowed))}")
    width, rows, tokens = SIZES[args.size]
    config = language_model(args.mixer, width=width)
    config.model.num_layers = 24
    config.model.mixers.attn = OPTIONS["attn"][width]
    if args.ratio and args.mixer != "attn":
        config.model.pattern = f"every({args.ratio}, {args.mixer}, attn)"
    config.data.seq_len = 2048
    config.train.batch_size = rows
    config.train.steps = steps(tokens, config)
    config.optim.lr = {"340m": 1e-3, "1b3": 4e-4}[args.size]
    return config
