"""The training loop: a flat script around the pure step."""

import contextlib
import dataclasses
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from hydrax.core import tree
from hydrax.core.build import ConfigError
from hydrax.data.pack import Batch
from hydrax.models import lm
from hydrax.models.divided import check_divided
from hydrax.models.spec import resolve
from hydrax.parallel.mesh import AXES, make_mesh
from hydrax.parallel.rules import batch_sharding, batch_shards, local_rows
from hydrax.train import folder, metrics, validation
from hydrax.train.checkpoint import Checkpoints
from hydrax.train.config import RunConfig, TrainConfig
from hydrax.train.figure import draw_loss
from hydrax.train.interrupt import EXIT_CODES, Interrupt
from hydrax.train.optim import frozen, make_optimizer, make_schedule
from hydrax.train.probes import open_probes
from hydrax.train.processes import failures, first, together
from hydrax.train.profile import Compilations
from hydrax.train.progress import say
from hydrax.train.recorder import Recorder
from hydrax.train.source import Source, open_source
from hydrax.train.state import State, abstract_state, new_state, shardings
from hydrax.train.step import make_eval_step, make_train_step
from hydrax.train.warm_start import check_start, warm_start

Batches = Iterable[Batch]
Baseline = Callable[[Source, Batches], float | None]
Finish = Callable[[lm.LM, Source, RunConfig, pathlib.Path], None]
Summary = dict[str, Any]


def train(
    cfg: RunConfig,
    workdir: str | pathlib.Path,
    *,
    baselines: Mapping[str, Baseline] | None = None,
    finish: Finish | None = None,
) -> Summary:
    """Trains, or continues training, in a run folder; returns what it writes to summary.json.

    Args:
      cfg: the run.
      workdir: its folder.
      baselines: name -> f(data, validation batches), bits per byte that summary and figure compare with, or None.
      finish: called with the trained model before the summary is written, e.g. to sample from it.

    Raises:
      ConfigError: the config does not fit the devices or the data, or the folder is not this run's.
      SystemExit: a signal asked to stop (the state is saved), or the loss stayed non-finite.
    """
    workdir = pathlib.Path(workdir)
    mesh = make_mesh(cfg.mesh)
    data = open_source(cfg)
    cfg = _resolved(cfg, data, mesh)
    # What an existing folder means:
    #   1. absent or empty                        a fresh run
    #   2. config.json equal, summary.json there  complete: nothing to do
    #   3. config.json equal                      continue after the newest intact checkpoint, or from the beginning
    #   4. config.json differs (mesh.* may)       ConfigError, naming the keys
    #   5. anything else in it                    ConfigError, nothing is overwritten
    #   6. another process trains in it           ConfigError, naming the process
    # Of several processes, the first one decides.
    with failures(workdir), contextlib.ExitStack() as stack:
        found = together(lambda: folder.enter(workdir, cfg))
        if found == "complete":
            say(f"{workdir} is already complete; expected another folder to train again")
            return json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
        # What else can be wrong with the config is said before a folder has it, which would then refuse the right one.
        together(lambda: _check_later(cfg.train, fresh=found == "fresh"))
        with jax.set_mesh(mesh):
            run, kept = Run(cfg, data, mesh, workdir), cfg.train
        together(lambda: stack.enter_context(folder.lock(workdir)))
        together(lambda: folder.describe(workdir, cfg))
        stack.enter_context(jax.set_mesh(mesh))
        interrupt = stack.enter_context(Interrupt())
        with Checkpoints(workdir, keep=kept.keep, keep_every=kept.keep_every, keep_best=kept.keep_best) as checkpoints:
            state, done = _start(run, checkpoints)
            with Recorder(cfg, workdir, done) as recorder, Compilations(("step", "evaluate"), recorder.progress.say):
                state = _steps(run, state, done, checkpoints, recorder, interrupt)
        # The last checkpoint is on disk: from here on, a run that dies is finished by the next one.
        return _finish(run, state, baselines or {}, finish)


def _check_later(cfg: TrainConfig, *, fresh: bool) -> None:
    """Raises what a part that comes later would refuse."""
    metrics.check_writers(tensorboard=cfg.tensorboard, wandb=cfg.wandb)
    if fresh and cfg.init_from is not None:
        check_start(cfg.init_from)


class Run:
    """What stays the same throughout a run: its parts, and the compiled steps."""

    def __init__(self, cfg: RunConfig, data: Source, mesh: Mesh, workdir: pathlib.Path):
        self.cfg, self.data, self.mesh, self.workdir = cfg, data, mesh, workdir
        self.probes = open_probes(cfg)
        self.plan = lm.blueprint(
            cfg.model,
            remat=cfg.train.remat,
            unroll=cfg.train.unroll,
            strategy=cfg.mesh.strategy,
            layout=cfg.mesh.layout,
        )
        self.tx = make_optimizer(cfg.optim, cfg.train.steps, self.plan.meta)
        self.abstract = abstract_state(self.plan, self.tx, mesh)
        self.spec: dict[str, Any] = {"config": folder.as_dict(cfg), "layers": folder.layers(cfg)}
        self.compile_seconds = 0.0
        self.eval_size = cfg.train.batch_size // cfg.train.accumulate  # rows evaluated at a time
        dtype = compute_dtype(cfg.train.dtype)
        place, rows = shardings(self.abstract), batch_sharding(mesh)
        step = make_train_step(
            self.plan,
            self.tx,
            make_schedule(cfg.optim, cfg.train.steps),
            dtype=dtype,
            accumulate=cfg.train.accumulate,
            z_loss=cfg.optim.z_loss,
            frozen=frozen(cfg.optim, self.plan.meta),
            spike=cfg.optim.spike,
            steps=cfg.train.steps,
        )
        # Metrics are left to the compiler: scalars come out replicated.
        self._step = jax.jit(step, in_shardings=(place, rows), out_shardings=(place, None), donate_argnums=0)
        self.evaluate_batch = jax.jit(make_eval_step(self.plan, dtype=dtype), in_shardings=(place["params"], rows))

    def compile(self) -> jax.stages.Compiled:
        """The training step, compiled before the clock starts."""
        batch = next(self.train_batches())
        began = time.perf_counter()
        shapes = {k: jax.ShapeDtypeStruct((self.cfg.train.batch_size, *x.shape[1:]), x.dtype) for k, x in batch.items()}
        compiled = self._step.lower(self.abstract, shapes).compile()
        self.compile_seconds = time.perf_counter() - began
        return compiled

    def put(self, batch: Batch) -> dict[str, jax.Array]:
        """The global batch on the devices, from this process's rows of it."""
        rows = batch_sharding(self.mesh)
        return {k: jax.make_array_from_process_local_data(rows, x) for k, x in batch.items()}

    def train_batches(self, done: int = 0) -> Iterator[Batch]:
        """This process's rows of the training batches behind step `done`."""
        cfg = self.cfg.train
        return self.data.train_batches(cfg.batch_size, cfg.seed, done, local_rows(self.mesh, cfg.batch_size))

    def val_batches(self, part: slice = slice(None)) -> Batches:
        """The validation rows, in batches of one microbatch, or these rows of every batch."""
        return self.data.val_batches(self.eval_size, self.cfg.train.eval_rows, part)

    def evaluate(self, params: dict[str, jax.Array]) -> dict[str, float]:
        """What `validation.measures` makes of the validation rows, and the accuracy of every probe."""
        part = local_rows(self.mesh, self.eval_size)
        measured = self._measured(params, self.val_batches(part), self.data.slices)
        for name, probe in self.probes.items():
            batches = probe.val_batches(self.eval_size, self.cfg.train.eval_rows, part)
            measured |= validation.probed(name, self._measured(params, batches, probe.slices))
        return measured

    def _measured(self, params: dict[str, jax.Array], batches: Batches, slices: tuple[str, ...]) -> dict[str, float]:
        totals: dict[str, np.ndarray] = {}
        for batch in batches:
            for name, x in jax.device_get(self.evaluate_batch(params, self.put(batch))).items():
                totals[name] = totals.get(name, 0.0) + x.astype(np.float64)
        return validation.measures(totals, slices)


def _resolved(cfg: RunConfig, data: Source, mesh: Mesh) -> RunConfig:
    """The config with the vocabulary of the data, checked against data and devices."""
    parts = cfg.train.accumulate * batch_shards(mesh)
    if cfg.train.batch_size % parts:
        allowed = f"expected a multiple of {parts} (train.accumulate x devices that share the batch)"
        raise ConfigError("train.batch_size", cfg.train.batch_size, allowed)
    check_divided(cfg.model, cfg.mesh, mesh.shape, cfg.data.seq_len)
    for mixer, options in ((one.mixer, one.options) for layer in resolve(cfg.model) for one in layer.mix.singles()):
        if not options.restarts:
            allowed = f"{mixer} takes rows for one document each, those of validation hold more: expected filter ema"
            raise ConfigError("model.pattern", cfg.model.pattern, allowed)
    return with_vocabulary(cfg, data)


def with_vocabulary(cfg: RunConfig, data: Source) -> RunConfig:
    """The config with the vocabulary of the data where it has none.

    Raises:
      ConfigError: the one it has is too small.
    """
    needed, given = data.vocabulary, cfg.model.vocab_size
    if given is not None and given < needed:
        owner = "tokenizer" if cfg.data.task is None else "task"
        raise ConfigError("model.vocab_size", given, f"expected at least {needed}, the {owner}'s, or None")
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=given or needed))


def compute_dtype(name: str) -> jnp.dtype:
    """That of `train.dtype`; auto: bfloat16 where there is an accelerator."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def _start(run: Run, checkpoints: Checkpoints) -> tuple[State, int]:
    """The state to continue from and the number of steps it has seen."""
    saved = checkpoints.restore(run.abstract)
    if saved is None:
        return _fresh(run), 0
    if saved.data != _position(run, saved.step):
        key, what = ("path", "files") if run.cfg.data.task is None else ("task", "task's rows")
        allowed = f"the {what} changed since the run began (step {saved.step}); expected the same data or a new folder"
        raise ConfigError(f"data.{key}", getattr(run.cfg.data, key), allowed)
    say(f"continuing {run.workdir} after step {saved.step}")
    return saved.state, saved.step


def _fresh(run: Run) -> State:
    """The initial state, with the weights of another run where the config names one."""
    state = new_state(run.plan, run.tx, run.cfg.train.seed, run.mesh)
    if run.cfg.train.init_from is not None:
        state["params"], report = warm_start(run.cfg.train.init_from, run.cfg.model, state["params"])
        say(report.line())
        if first():
            metrics.write_json(run.workdir / "init_from.json", dataclasses.asdict(report))
    return state


def _position(run: Run, step: int) -> dict[str, Any]:
    """Where in which data the run is after `step`."""
    return {"seed": run.cfg.train.seed, "step": step, "sha256": run.data.sha256}


def _steps(
    run: Run, state: State, done: int, checkpoints: Checkpoints, recorder: Recorder, interrupt: Interrupt
) -> State:
    """The loop. Records of a step are written before its checkpoint, so that no death between loses them."""
    cfg, last = run.cfg.train, run.cfg.train.steps
    if done == last:
        return state
    compiled = run.compile()
    if first():
        folder.describe_program(run.workdir, compiled)
    batches = run.train_batches(done)
    recorder.clock.restart()
    recorder.watchdog.start()
    for step in range(done + 1, last + 1):
        recorder.tracer.before(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            with recorder.clock.part("data"):
                batch = run.put(next(batches))
            state, values = compiled(state, batch)
        recorder.add(step, values)
        checkpoints.check()
        signal, measured = interrupt.received(step), {}
        if _due(step, cfg.eval_every, last):
            recorder.flush()
            with recorder.clock.pause(), recorder.watchdog.pause():
                measured = run.evaluate(state["params"])
                recorder.write(step, measured)
            recorder.progress.say(f"step {step}/{last}  validation {validation.line(measured)}")
        if signal or _due(step, cfg.save_every, last):
            recorder.flush()
            with recorder.clock.pause():
                val_loss = measured.get("val_loss", math.nan)
                checkpoints.save(step, state, _position(run, step), run.spec, val_loss)
        if signal and step < last:
            recorder.progress.say(f"{signal.name}: saved at step {step}; the same command continues")
            raise SystemExit(EXIT_CODES[signal])
    return state


def _peak_bytes() -> int | None:
    """Most memory in use on one of this process's devices so far; None where the backend does not count it (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _finish(run: Run, state: State, baselines: Mapping[str, Baseline], finish: Finish | None) -> Summary:
    """Baselines, figure, `finish`, summary.json: what is left when all steps are done, for process 0 alone."""
    if jax.process_count() > 1:
        kept = {name: state[name] for name in ("params", "step", "skipped")}
        state = multihost_utils.process_allgather(kept, tiled=True)
        here = jax.sharding.Mesh(np.array(jax.local_devices()[:1]).reshape(run.mesh.devices.ndim * (1,)), AXES)
        with jax.set_mesh(here):
            return together(lambda: _finish_alone(run, state, baselines, finish))
    return _finish_alone(run, state, baselines, finish)


def _finish_alone(run: Run, state: State, baselines: Mapping[str, Baseline], finish: Finish | None) -> Summary:
    records = metrics.read(run.workdir / "metrics.jsonl")
    measured = {name: f(run.data, run.val_batches()) for name, f in baselines.items()}
    compared = {name: float(bits) for name, bits in measured.items() if bits is not None}
    summary = summarise(run, int(state["step"]), int(state["skipped"]), records, compared)
    model = run.plan.merge(state["params"])
    if finish is not None:
        finish(model, run.data, run.cfg, run.workdir)
    draw_loss(records, compared, run.workdir / "figures" / "loss.png")
    metrics.write_json(run.workdir / "summary.json", summary)
    return summary


class Told(Protocol):
    """What a summary says of a run besides its records."""

    cfg: RunConfig
    data: Source
    plan: lm.Blueprint
    compile_seconds: float


def summarise(
    run: Told, steps: int, skipped: int, records: list[metrics.Record], baselines: Mapping[str, float]
) -> Summary:
    """The contents of summary.json."""
    last = next((r for r in reversed(records) if "val_loss" in r), {})
    speeds = [r["timing"]["tokens_per_second"] for r in records if "tokens_per_second" in r["timing"]]
    return {
        **validation.summary(last),
        "baselines": dict(baselines),
        "steps": steps,
        "skipped": skipped,
        "tokens": steps * run.cfg.train.batch_size * run.cfg.data.seq_len,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "parameters": tree.count(run.plan.shapes),
        "wall_seconds": max((r["timing"]["seconds"] for r in records), default=0.0),
        "compile_seconds": round(run.compile_seconds, 3),
        "peak_device_bytes": _peak_bytes(),
        "data_sha256": run.data.sha256,
    }
