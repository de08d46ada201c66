"""A model, batches and text small enough for every test of training."""

import pathlib

import numpy as np

from hydrax.core.build import build
from hydrax.models import lm
from hydrax.models.spec import ModelConfig
from hydrax.train.config import RunConfig

VOCABULARY = 50
MODEL = {"d_model": 16, "pattern": "2*attn", "ffn": "none", "mixers": {"attn": {"heads": 2, "key_dim": 8}}}


def plan(**options: object) -> lm.Blueprint:
    return lm.blueprint(build(ModelConfig, {**MODEL, "vocab_size": VOCABULARY, **options}))


def batch(rows: int, tokens: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens in two documents and padding per row; the number of counted targets differs widely by row."""
    rng = np.random.default_rng(seed)
    index = np.arange(tokens)[None]
    first, length = rng.integers(1, tokens // 2, (rows, 1)), rng.integers(tokens // 2, tokens + 1, (rows, 1))
    segments = np.where(index < first, 1, np.where(index < length, 2, 0)).astype(np.int32)
    weights = np.where(rng.random((rows, 1)) < 0.5, rng.random((rows, tokens)) < 0.2, segments > 0)
    weights = (weights & (segments > 0)).astype(np.float32)
    return {
        "tokens": rng.integers(0, VOCABULARY, (rows, tokens)).astype(np.int32),
        "targets": rng.integers(0, VOCABULARY, (rows, tokens)).astype(np.int32),
        "segment_ids": segments,
        "positions": np.where(index < first, index, index - first).astype(np.int32),
        "weights": weights,
        "bytes": (2 * weights.sum(1)).astype(np.float32),
    }


def text(folder: pathlib.Path) -> pathlib.Path:
    """A folder of short documents."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    for i in range(8):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 60)), encoding="utf-8")
    return folder


def config(data: pathlib.Path, **train: object) -> RunConfig:
    """A run of seconds over the documents of `text`."""
    train = {"steps": 4, "batch_size": 8, "eval_rows": 8, "log_every": 1, "save_every": 2, "eval_every": 2} | train
    return build(
        RunConfig,
        {
            "model": MODEL,
            "data": {"path": str(data), "seq_len": 16, "val_fraction": 0.4, "threads": 1},
            "train": train,
            "optim": {"warmup": 2},
        },
    )
