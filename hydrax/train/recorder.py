"""The records of a run: metrics, what was skipped, progress, and the clocks that measure and watch it."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from hydrax.models import cost
from hydrax.train import folder, metrics
from hydrax.train.config import RunConfig
from hydrax.train.processes import first
from hydrax.train.profile import Tracer
from hydrax.train.progress import Clock, Progress, mfu
from hydrax.train.watchdog import Watchdog

SKIPPED = "skipped.jsonl"
"""A record of every step that was skipped, in the run folder."""


class Recorder:
    """Records of the run. A step's metrics are fetched when the next step is under way, so no device waits."""

    def __init__(self, cfg: RunConfig, workdir: pathlib.Path, done: int):
        self._cfg, self._workdir, self._bad, self._last = cfg, workdir, 0, done
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        earlier, _ = [metrics.cut_back(workdir / n, done) if first() else [] for n in ("metrics.jsonl", SKIPPED)]
        self.watchdog = Watchdog(cfg.train.watchdog)
        self.clock = Clock(before=max((r["timing"]["seconds"] for r in earlier), default=0.0))
        self.progress = Progress(cfg.train.steps, done)
        self.tracer = Tracer(workdir, cfg.train.trace, self.progress.say)
        self._writers: list[metrics.Writer] = []
        if first():
            self._writers = metrics.open_writers(
                workdir, done, tensorboard=cfg.train.tensorboard, wandb=cfg.train.wandb, config=folder.as_dict(cfg)
            )
        self._flops = cost.cost(cfg.model, seq_len=cfg.data.seq_len).train_flops_per_token

    def __enter__(self) -> "Recorder":
        self.progress.__enter__()
        self.tracer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.watchdog.__exit__(*error)
        self.tracer.__exit__(*error)
        self.progress.__exit__(*error)
        for writer in self._writers:
            writer.close()

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Keeps the metrics of `step`, handles those of the step before."""
        before, self._pending = self._pending, (step, values)
        if before is not None:
            self._handle(*before)

    def flush(self) -> None:
        """Handles what is pending, so that a checkpoint never lies behind the records."""
        before, self._pending = self._pending, None
        if before is not None:
            self._handle(*before)

    def write(self, step: int, values: Mapping[str, float], **timing: float) -> None:
        """One record, with the seconds of the run so far."""
        for writer in self._writers:
            writer.write(step, values, {"seconds": round(self.clock.total, 3), **timing})

    def _handle(self, step: int, arrays: dict[str, jax.Array]) -> None:
        with self.clock.part("device"):
            values = {name: float(x) for name, x in jax.device_get(arrays).items()}
        self.watchdog.beat()
        cfg = self._cfg.train
        taken = values.pop("taken")
        self._bad = 0 if taken else self._bad + 1
        if not taken and first():
            metrics.append(self._workdir / SKIPPED, step, values)
        if step % cfg.log_every == 0 or step == cfg.steps or self._bad == cfg.max_skipped:
            self._log(step, values)
        if self._bad == cfg.max_skipped:
            below = " below optim.spike times the mean" if self._cfg.optim.spike else ""
            raise SystemExit(f"stopped at step {step}: no finite loss or gradient{below} in {self._bad} steps in a row")

    def _log(self, step: int, values: dict[str, float]) -> None:
        cfg, devices = self._cfg, jax.devices()
        speed = (step - self._last) / max(self.clock.lap, 1e-9)
        tokens_per_second = speed * cfg.train.batch_size * cfg.data.seq_len
        waits = {f"{name}_seconds": round(t / (step - self._last), 6) for name, t in self.clock.parts.items()}
        self.write(step, values, tokens_per_second=round(tokens_per_second, 1), **waits)
        utilisation = mfu(tokens_per_second, self._flops, devices[0].device_kind, len(devices))
        self.progress.update(step, {**values, "tokens_per_second": tokens_per_second}, speed, utilisation)
        self._last = step
        self.clock.restart()
