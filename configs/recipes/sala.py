"""MiniCPM-SALA 9B (arXiv 2602.11761): a quarter sparse attention, three quarters Lightning attention.

    python -m launch.train --config=recipes/sala --workdir=runs/sala --config.data.path=<text> \\
        --config.data.tokenizer=<tokenizer.json of 73448 tokens>
    python -m launch.train --config=recipes/sala:tiny --workdir=runs/sala_tiny

Eight of 32 layers read blocks of keys that means of short spans choose (InfLLM-V2), and know no positions; they stand
where the released model has them. Lightning layers turn queries and keys, and forget alike in all layers. All norm
queries and keys by head and have an output gate. Its first 8192 tokens see all before them: what is sparse begins in
longer rows (`--config.data.seq_len=32768`). The published model was not trained from scratch but converted, and scales
its embeddings, residuals and logits; that is left out.
Hardware: 8 GPUs of 80 GB (`--config.mesh.fsdp=8`). Not run by us.
Expected: 9477M parameters. Published, RULER: 92.65 at 64K, 89.37 at 128K, 86.3 at 1M; 3.5 times the speed of
Qwen3-8B at 256K. Rates and batches are ours.
"""

from ml_collections import ConfigDict

from configs.recipes.common import pretraining, sized

SIZES = {
    "9b": {
        "width": 4096,
        "sparse": [0, 9, 16, 17, 22, 29, 30, 31],
        "layers": 32,
        "heads": 32,
        "kv_heads": 2,
        "head_dim": 128,
        "blocks": {},  # the defaults
        "ffn_dim": 16384,
        "vocab": 73_448,
    },
    "tiny": {
        "width": 64,
        "sparse": [0, 3],
        "layers": 4,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "blocks": {"block": 4, "kernel": 4, "stride": 2, "topk": 3, "local": 1, "dense_len": 9},
        "ffn_dim": 128,
    },
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size."""
    s, _ = sized(arg, SIZES)
    model = {
        "d_model": s.width,
        "num_layers": s.layers,
        "pattern": f"select({s.sparse}, infllm2, lightning)",
        "mixers": {
            "infllm2": {
                "heads": s.heads,
                "kv_heads": s.kv_heads,
                "key_dim": s.head_dim,
                "rope": {"fraction": 0.0},
                "qk_norm": "head",
                "out_gate": "elementwise",
                **s.blocks,
            },
            "lightning": {"preset": "sala", "heads": s.heads, "key_dim": s.head_dim},
        },
        "ffn_dim": s.ffn_dim,
        "tie": False,
    }
    config = pretraining(s, model, seq_len=4096, rows=1024, tokens=300e9, lr=3e-4)
    config.optim.schedule = "wsd"
    return config
