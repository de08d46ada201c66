"""Checkpoints: one Orbax step directory holds the state, the data position and the resolved spec, or does not exist.

Orbax notices files that are missing or cut short, but not flipped bits, and its complaints fill pages. So every step
also carries `files.json`, the size and CRC of each of its files, written before the directory gets its final name.
"""

import contextlib
import functools
import json
import math
import pathlib
import sys
import zlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from hydrax.core.build import ConfigError
from hydrax.core.typing import PyTree
from hydrax.models import lm
from hydrax.train import folder
from hydrax.train.config import RunConfig
from hydrax.train.processes import first, leave, leave_if_lost, together
from hydrax.train.stderr import STOPPED

SEAL = "files.json"


class Saved(NamedTuple):
    """What a checkpoint holds."""

    step: int
    state: PyTree
    data: dict[str, Any]
    spec: dict[str, Any]


class Checkpoints:
    """The folder `checkpoints/` of a run; saves in the background.

    It keeps the newest `keep` steps, those at multiples of `keep_every`, and the `keep_best` of lowest validation loss.
    An older step is deleted after a newer one is complete. What goes wrong in the background ends the run in one line
    at the next `check`, `save` or the end of the block.
    """

    def __init__(self, workdir: pathlib.Path, *, keep: int, keep_every: int = 0, keep_best: int = 0):
        self.workdir, self.folder = workdir, workdir / "checkpoints"
        self._saving = -1
        self._options = ocp.CheckpointManagerOptions(
            best_fn=_val_loss if keep_best else None,  # without it, Orbax does not read what earlier processes saved
            preservation_policy=_preservation(keep, keep_every, keep_best),
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Made after `restore` has moved away what Orbax stumbles over: it reads the losses of all steps at once."""
        return ocp.CheckpointManager(self.folder.resolve(), options=self._options)

    def __enter__(self) -> Self:
        self._hook, sys.unraisablehook = sys.unraisablehook, _without_closed_loops
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()
        sys.unraisablehook = self._hook

    def check(self) -> None:
        """Ends the run if a save in the background has failed."""
        with self._writing():
            self._manager.check_for_errors()

    def save(
        self, step: int, state: PyTree, data: dict[str, Any], spec: dict[str, Any], val_loss: float = math.nan
    ) -> None:
        """Copies the state and writes it in the background; does nothing if the step is already saved."""
        with self._writing():
            self._manager.wait_until_finished()
        if step in self._manager.all_steps():
            return
        self._saving = step
        items = {
            "state": ocp.args.StandardSave(state),
            "data": ocp.args.JsonSave(data),
            "spec": ocp.args.JsonSave(spec),
        }
        measured = {"val_loss": val_loss if math.isfinite(val_loss) else math.inf}  # worse than all others
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=measured, force=True)

    def restore(self, abstract: PyTree) -> Saved | None:
        """The newest intact checkpoint in the shapes and shardings of `abstract`; None if nothing was ever saved.

        Damaged ones that are newer are named in one line each and moved to `damaged/`.

        Raises:
          ConfigError: there are checkpoints, but every one is damaged (nothing is moved).
        """
        step = together(self._newest)
        if step is None:
            return None
        self._manager.reload()
        items = {
            "state": ocp.args.StandardRestore(abstract),
            "data": ocp.args.JsonRestore(),
            "spec": ocp.args.JsonRestore(),
        }
        saved = self._manager.restore(step, args=ocp.args.Composite(**items))
        return Saved(step, saved["state"], saved["data"], saved["spec"])

    def _newest(self) -> int | None:
        step, damaged = newest(self.workdir)
        for bad in [*damaged, *_without_loss(self.workdir, damaged)] if step is not None else ():
            _move_aside(self.folder / str(bad), self.workdir / "damaged")
        return step

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise what they like
            leave_if_lost(error)
            leave(f"{STOPPED}checkpoint {self._saving} in {self.folder} cannot be written ({error}); others stand")

    def _seal(self) -> None:
        """Called by Orbax when all files of a step are written, before the directory gets its final name."""
        if first():
            unnamed = self.folder.glob(f"{self._saving}.*")
            for place in [*unnamed, *self.folder.glob(str(self._saving))]:
                (place / SEAL).write_text(json.dumps(_contents(place)), encoding="utf-8")


def _without_closed_loops(raised: Any) -> None:
    """After a write that failed, TensorStore's threads report that each further one finds Orbax's event loop closed."""
    if str(raised.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(raised)


def _val_loss(measured: dict[str, float]) -> float:
    return measured["val_loss"]


def _without_loss(workdir: pathlib.Path, known: Sequence[int]) -> list[int]:
    """The steps, beside the `known`, whose validation loss is damaged, each reported."""
    found = []
    for path in (workdir / "checkpoints").glob("*/metrics/metrics"):
        step = path.parents[1].name
        try:
            json.loads(path.read_text(encoding="utf-8"))["val_loss"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            if step.isdigit() and int(step) not in known:
                print(f"checkpoint {step} of {workdir} is damaged: its validation loss cannot be read ({error})")
                found.append(int(step))
    return found


def _preservation(keep: int, keep_every: int, keep_best: int) -> policies.PreservationPolicy:
    best = policies.BestN(get_metric_fn=_val_loss, reverse=True, n=keep_best)
    every = [policies.EveryNSteps(keep_every)] if keep_every else []
    return policies.AnyPreservationPolicy([policies.LatestN(keep), *every, *([best] if keep_best else [])])


def newest(workdir: pathlib.Path) -> tuple[int | None, list[int]]:
    """The newest intact step of a run (None without any checkpoint) and the damaged steps above it, each reported.

    Raises:
      ConfigError: every checkpoint is damaged.
    """
    places = [p for p in (workdir / "checkpoints").glob("*") if p.is_dir() and p.name.isdigit()]
    damaged: list[int] = []
    for place in sorted(places, key=lambda p: int(p.name), reverse=True):
        reason = damage(place)
        if reason is None:
            return int(place.name), damaged
        print(f"checkpoint {place.name} of {workdir} is damaged: {reason}", flush=True)
        damaged.append(int(place.name))
    if damaged:
        allowed = f"all its checkpoints are damaged ({', '.join(map(str, damaged))}); expected a new folder"
        raise ConfigError("workdir", str(workdir), allowed)
    return None, damaged


def damage(place: pathlib.Path) -> str | None:
    """What is wrong with a step directory; None if it is as it was written."""
    try:
        expected = json.loads((place / SEAL).read_text(encoding="utf-8"))
        actual = _contents(place)
    except (OSError, ValueError) as error:
        return f"{SEAL} cannot be read ({error})"
    for name, (size, crc) in expected.items():
        if name not in actual:
            return f"{name} is missing"
        if actual[name][0] != size:
            return f"{name} has {actual[name][0]} bytes instead of {size}"
        if actual[name][1] != crc:
            return f"{name} has other contents than were written"
    return None


def load_run(workdir: str | pathlib.Path, steps: Sequence[int] = ()) -> tuple[lm.LM, RunConfig]:
    """The model of a run folder with the parameters of its newest intact checkpoint, and its config; reads only.

    Args:
      steps: checkpoints whose parameters are averaged, in place of the newest.

    Raises:
      ConfigError: not the folder of a run, no checkpoint yet, or none that is intact.
    """
    params, cfg, _ = read_params(workdir, steps)
    return lm.blueprint(cfg.model).merge({name: jnp.asarray(value) for name, value in params.items()}), cfg


def read_params(
    workdir: str | pathlib.Path, steps: Sequence[int] = ()
) -> tuple[dict[str, np.ndarray], RunConfig, list[int]]:
    """The parameters of a run's newest intact checkpoint, or the mean of those of `steps`; its config; the steps.

    Raises:
      ConfigError: not the folder of a run, no such checkpoint, or a damaged one.
    """
    workdir = pathlib.Path(workdir)
    folder.read_config(workdir)
    if not steps:
        step, _ = newest(workdir)
        if step is None:
            raise ConfigError("workdir", str(workdir), "the run has not saved a checkpoint yet")
        steps = [step]
    places = [(workdir / "checkpoints" / str(step)).resolve() for step in steps]
    for place in places:
        if reason := damage(place) if place.is_dir() else "there is none":
            saved = sorted(int(p.name) for p in place.parent.glob("*") if p.name.isdigit())
            allowed = f"checkpoint {place.name}: {reason}; expected one of {', '.join(map(str, saved))}"
            raise ConfigError("workdir", str(workdir), allowed)
    spec = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(places[0] / "spec")
    cfg = folder.parse(spec["config"], workdir)
    names = lm.blueprint(cfg.model).shapes
    arguments = ocp.args.PyTreeRestore(
        item={"params": dict.fromkeys(names, 0)},
        restore_args={"params": dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))},
        partial_restore=True,
    )
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    found = [reader.restore(place / "state", args=arguments)["params"] for place in places]
    mean = {name: np.mean([params[name] for params in found], axis=0, dtype=np.float64) for name in names}
    return {name: mean[name].astype(names[name].dtype) for name in names}, cfg, list(steps)


def _contents(place: pathlib.Path) -> dict[str, list[int]]:
    """[size, CRC-32] of every file below the items of a step (Orbax still touches those beside them)."""
    files = (f for item in sorted(place.iterdir()) if item.is_dir() for f in sorted(item.rglob("*")) if f.is_file())
    return {f.relative_to(place).as_posix(): _fingerprint(f) for f in files}


def _fingerprint(path: pathlib.Path, block: int = 1 << 22) -> list[int]:
    crc = 0
    with path.open("rb") as file:
        while part := file.read(block):
            crc = zlib.crc32(part, crc)
    return [path.stat().st_size, crc]


def _move_aside(place: pathlib.Path, to: pathlib.Path) -> None:
    to.mkdir(exist_ok=True)
    taken = len(list(to.glob(f"{place.name}*")))
    place.rename(to / (f"{place.name}.{taken}" if taken else place.name))
