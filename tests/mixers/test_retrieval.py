"""Sparse mixers learn to recall what stands far behind their window; the window alone cannot."""

from typing import Any, NamedTuple

import pytest

import hydrax

WINDOW = 8


class Line(NamedTuple):
    """What a mixer needs to learn it; fewer pairs and more layers where no single query sees all of the past."""

    options: dict[str, Any]
    steps: int
    batch: int = 64
    pairs: int = 4
    layers: int = 1


ROUTED = {"clusters": 8, "window": WINDOW, "warmup": 0.5, "rate": 0.01, "commitment": 1.0}
S2 = {"block": 2, "local": WINDOW // 2, "vert_stride": 2}
LEARN = {
    "attn": Line({}, 400),
    "dma": Line({"keep": 16, "keep_last": 2}, 400),
    "dsa": Line({"keep": 8, "index_heads": 4, "index_dim": 16}, 1200),
    "evict_linear": Line({"window": WINDOW}, 2400),
    "hcam": Line({"chunk": 4, "top": 4}, 2400),
    "infllm2": Line({"block": 2, "kernel": 2, "stride": 1, "topk": 7, "local": 1, "dense_len": 0}, 900, batch=32),
    "landmark": Line({"section": 3}, 1200, batch=32),
    "moba": Line({"block": 2, "top": 8}, 1200),
    # What is asked trains the router only where it is chosen, not what should be read. So all are chosen at first.
    "mosa": Line(
        {"heads": 4, "sparsity": 2, "slack": 2.0, "start": 0.01, "rate": 0.002, "key_dim": 16}, 1500, batch=32
    ),
    "nats": Line({"sliding": WINDOW}, 1200),
    "nsa": Line({"block": 2, "kernel": 2, "stride": 2, "top": 7, "window": WINDOW}, 600, batch=32),
    "routing": Line({"heads": 4, **ROUTED}, 2000),
    "stochastic": Line({"window": WINDOW, "resample": False, "table": 48}, 600, batch=32, pairs=1, layers=2),
    "swa:log_bands": Line({"window": WINDOW, "pattern": "log_bands"}, 600, batch=32, pairs=1, layers=2),
    "swa:s2": Line({"window": WINDOW, "pattern": "s2", "s2": S2}, 600, batch=32),
    "swa:sink_tokens": Line({"window": WINDOW, "sink_tokens": 9}, 400),
}
"""Every mixer that has to learn it, and every pattern of `swa` that reaches so far."""


def mqar(name: str, line: Line, folder: object) -> float:
    """The share of right answers of a short training of a convolution and the mixer (`configs/tasks.py`).

    Four pairs in the first 8 tokens, or one in the first 2, asked for anywhere behind them; chance is 1/16.
    """
    mixer = name.partition(":")[0]
    cfg = hydrax.load_config(f"tasks:mqar,mixer={mixer},d_model=32")
    cfg.model.pattern = ",".join(["gated_conv", *[mixer] * line.layers])
    cfg.model.mixers[mixer] = {"heads": 2} | line.options
    cfg.data.task_options.update(vocabulary=32, pairs=(line.pairs,), power=1.0)
    every = cfg.data.landmark_every = line.options.get("section", 0)
    cfg.data.seq_len = 48 + (every and 47 // every)
    cfg.train.steps = cfg.train.eval_every = cfg.train.save_every = line.steps
    cfg.train.batch_size, cfg.train.eval_rows = line.batch, 256
    cfg.optim.lr = 1e-2
    return hydrax.train_run(cfg, folder, quiet=True)["val_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARN)
def test_pairs_are_recalled_from_beyond_the_window(name, tmp_path):
    assert mqar(name, LEARN[name], tmp_path / "run") > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("pairs", "most"), [(4, 0.3), (1, 0.4)])
def test_a_window_alone_does_not_recall_them(pairs, most, tmp_path):
    """What makes the test above one of retrieval. One pair is asked for within the window more often."""
    assert mqar("swa", Line({"window": WINDOW}, 600, pairs=pairs), tmp_path / "run") < most
