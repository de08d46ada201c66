"""Hydra 1.6B (arXiv 2508.15099), made causal: Mamba, attention in every fourth layer, routed chunks, two memories.

    python -m launch.train --config=recipes/hydra_1p6b --workdir=runs/hydra --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 50304 tokens>
    python -m launch.train --config=recipes/hydra_1p6b:toy --workdir=runs/hydra_toy
    python -m launch.train --config=recipes/hydra_1p6b:tiny --workdir=runs/hydra_tiny

The published prototype, `toy`, sees the future: chunks choose experts by their own mean, and the workspace mixes rows.
Here a chunk is routed by the one before it and reads what chunks before it wrote, within its document; blocks are
ordinary ones, without the prototype's second norm. The widths of 1p6b are ours, within the paper's envelope.
Hardware: 8 GPUs of 80 GB (`--config.mesh.fsdp=8`). Not run by us.
Expected: 1682M parameters, 1.1B of them active. No published count, and no published result at scale.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "1p6b": {
        "width": 2048,
        "layers": 24,
        "heads": 16,
        "window": 1024,
        "experts": 8,
        "expert_dim": 1408,
        "chunk": 32,
        "workspace": {"slots": 64, "rank": 128},
        "pkm": {"rows": 64, "key_dim": 64, "value_dim": 128},
        "vocab": 50_304,
    },
    "toy": {
        "width": 256,
        "layers": 8,
        "heads": 4,
        "window": 256,
        "experts": 4,
        "expert_dim": 256,
        "chunk": 32,
        "workspace": {"slots": 64, "rank": 128},
        "pkm": {"rows": 64, "key_dim": 64, "value_dim": 128},
        "vocab": None,
    },
    "tiny": {
        "width": 32,
        "layers": 4,
        "heads": 4,
        "window": 16,
        "experts": 4,
        "expert_dim": 32,
        "chunk": 8,
        "workspace": {"slots": 4, "rank": 8},
        "pkm": {"rows": 8, "key_dim": 8, "value_dim": 16},
    },
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    both = {"mixer": "parallel(mamba, swa)", "options": {"fusion": "weighted", "weights": (1.0, 0.15), "learned": True}}
    model = {
        "d_model": s.width,
        "num_layers": s.layers,
        "pattern": "every(3, mamba, both)",
        "blocks": {"both": both},
        # values are twice as wide as queries and keys: as many channels as Mamba has
        "mixers": {"swa": {"heads": s.heads, "value_dim": 2 * s.width // s.heads, "window": s.window}},
        "ffn_pattern": "fill((moe, none))",
        "moe": {"experts": s.experts, "top_k": 2, "width": s.expert_dim, "granularity": "chunk", "chunk": s.chunk},
        "memory": {"workspace": {**s.workspace, "chunk": s.chunk}, "pkm": s.pkm, "every": 4},
    }
    return pretraining(s, model, seq_len=4096, rows=256, tokens=30e9, lr=3e-4)
