"""A run from a config in this process: what `launch.train` does, for notebooks."""

import contextlib
import io
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from hydrax.core.build import build, plain
from hydrax.train.config import RunConfig
from hydrax.train.loop import Summary, train


def train_run(cfg: RunConfig | Mapping[str, Any], workdir: str | pathlib.Path, *, quiet: bool = False) -> Summary:
    """Trains, or continues training, in a run folder; returns its summary.

    Args:
      cfg: the run, as `load_config` gives it.
      workdir: its folder, which `load_run` reads.
      quiet: nothing is printed while it trains.

    Raises:
      ConfigError: a bad value in the config, one that does not fit the data, or the folder of another run.
    """
    run = cfg if isinstance(cfg, RunConfig) else build(RunConfig, plain(cfg))
    with contextlib.redirect_stdout(io.StringIO() if quiet else sys.stdout):
        return train(run, workdir)
