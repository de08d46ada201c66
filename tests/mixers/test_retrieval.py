"""Sparse mixers learn to recall what stands far behind their window; the window alone cannot."""

import pytest

import hydrax
from hydrax import mixers

WINDOW = 8
ROUTED = {"clusters": 8, "window": WINDOW, "warmup": 0.5, "rate": 0.01, "commitment": 1.0}
LEARN = {
    "attn": ({"heads": 2}, 400),
    "dma": ({"heads": 2, "keep": 16, "keep_last": 2}, 400),
    "dsa": ({"heads": 2, "keep": 8, "index_heads": 4, "index_dim": 16}, 1200),
    "evict_linear": ({"heads": 2, "window": WINDOW}, 2400),
    "hcam": ({"heads": 2, "chunk": 4, "top": 4}, 2400),
    "infllm2": ({"heads": 2, "block": 2, "kernel": 2, "stride": 1, "topk": 7, "local": 1, "dense_len": 0}, 1200),
    "moba": ({"heads": 2, "block": 2, "top": 8}, 1200),
    "nats": ({"heads": 2, "sliding": WINDOW}, 1200),
    "nsa": ({"heads": 2, "block": 2, "kernel": 2, "stride": 2, "top": 7, "window": WINDOW}, 1200),
    "routing": ({"heads": 4, **ROUTED}, 2000),
}
"""The options of every mixer that has to learn it, and the steps that it may take: a line for each."""


def accuracy(mixer: str, options: dict, steps: int, folder: object, task: str, **task_options: object) -> float:
    """The share of right answers of a short training of a convolution and the mixer (`configs/tasks.py`)."""
    cfg = hydrax.load_config(f"tasks:{task},mixer={mixer},d_model=32")
    cfg.model.mixers[mixer] = options
    cfg.data.task_options.update(task_options)
    cfg.data.seq_len = 48
    cfg.train.steps = cfg.train.eval_every = cfg.train.save_every = steps
    cfg.train.batch_size, cfg.train.eval_rows = 64, 256
    cfg.optim.lr = 1e-2
    return hydrax.train_run(cfg, folder, quiet=True)["val_accuracy"]


def mqar(mixer: str, options: dict, steps: int, folder: object) -> float:
    """Four pairs in the first 8 tokens, asked for anywhere in the 40 behind them; chance is 1/16."""
    return accuracy(mixer, options, steps, folder, "mqar", vocabulary=32, pairs=(4,), power=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [name for name in LEARN if name in mixers.names()])
def test_pairs_are_recalled_from_beyond_the_window(mixer, tmp_path):
    assert mqar(mixer, *LEARN[mixer], tmp_path / "run") > 0.9


@pytest.mark.slow
def test_a_window_alone_does_not_recall_them(tmp_path):
    """What makes the test above one of retrieval."""
    assert mqar("swa", {"heads": 2, "window": WINDOW}, 1200, tmp_path / "run") < 0.3
