"""hydrax: train hybrid language models from scratch in JAX.

What notebooks use, and what may be relied on: `load_config`, `build`, `cost`, `train_run`, `load_run`,
`generate`, `mixers.names`.
Importing this package loads none of it yet, and touches no device.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydrax import mixers as mixers
    from hydrax.core.config import load_config as load_config
    from hydrax.infer.sample import generate as generate
    from hydrax.models.cost import cost as cost
    from hydrax.models.lm import build as build
    from hydrax.train.checkpoint import load_run as load_run
    from hydrax.train.run import train_run as train_run

__version__ = "0.1.0"

_HOMES = {
    "load_config": "hydrax.core.config",
    "build": "hydrax.models.lm",
    "cost": "hydrax.models.cost",
    "generate": "hydrax.infer.sample",
    "load_run": "hydrax.train.checkpoint",
    "train_run": "hydrax.train.run",
}

__all__ = ["mixers", *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "mixers":
        return importlib.import_module("hydrax.mixers")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hydrax' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
