"""What sweeps of small models share: a size of seconds, the keys of MQAR that a size says, its rates and seeds."""

from collections.abc import Mapping
from typing import Any

from hydrax.sweep import grid

TINY = {"steps": 60, "rows": 16, "rates": (3e-3, 1e-2), "seeds": 1, "length": 32, "pairs": (2, 4), "tokens": 64}


def mqar(size: Mapping[str, Any], **options: Any) -> grid.Entry:
    """MQAR with so many pairs and tokens, and other options of the task, trained as `trained` says."""
    task = {"pairs": size["pairs"], "vocabulary": size["tokens"], **options}
    return {"config": "tasks:mqar", "data.task_options": task, **trained(size)}


def trained(size: Mapping[str, Any]) -> grid.Entry:
    """A model of width 64, unless the size has another, for so many steps of rows of one length."""
    return {
        "model.d_model": size.get("d_model", 64),
        "data.seq_len": size["length"],
        "train.steps": size["steps"],
        "train.batch_size": size["rows"],
        "train.eval_every": size["steps"] // size.get("evaluations", 4),
        "train.eval_rows": size.get("eval_rows", 512),
        "train.log_every": 20,
        "optim.warmup": size["steps"] // 20,
    }


def repeats(size: Mapping[str, Any]) -> grid.Grid:
    """Every learning rate with every seed."""
    return grid.product(grid.sweep("optim.lr", size["rates"]), grid.sweep("train.seed", range(size["seeds"])))
