"""Runs that differ in rate and seed alone, trained side by side: one program over stacked parameters.

    state_i ← step(state_i, batch of seed_i, lr_i),      i = 1 .. N, vectorised by `jax.vmap`

A dispatch makes K steps in a scan, so that small models do not wait for Python. Runs of one seed get one copy of its
batches. Each run computes what `loop.train` computes for it, up to the rounding of sums in another order.
"""

import concurrent.futures
import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hydrax.core.build import ConfigError
from hydrax.data.pack import Batch
from hydrax.models import lm
from hydrax.ops.dispatch import choices
from hydrax.ops.table import OPS
from hydrax.train import validation
from hydrax.train.config import RunConfig
from hydrax.train.loop import compute_dtype, with_vocabulary
from hydrax.train.optim import frozen, make_optimizer, make_schedule
from hydrax.train.source import Source, open_source
from hydrax.train.state import State, init_state
from hydrax.train.step import make_eval_step, make_train_step

DISPATCH = 50
"""Steps of a dispatch at most."""

AHEAD = 2
"""Dispatches whose batches are made in advance."""

HAND_WRITTEN = ("pallas_gpu", "pallas_tpu", "cudnn")
"""Forms that `jax.vmap` does not vectorise."""

Record = Callable[[int, dict[str, np.ndarray]], None]


class Stack:
    """The compiled programs of N runs and their data. Compiles when made; trains once."""

    def __init__(self, cfgs: Sequence[RunConfig]):
        """Raises:
        ConfigError: a setting of the runs that needs a run of its own.
        """
        seeds = list(dict.fromkeys(cfg.train.seed for cfg in cfgs))
        # The text of a corpus is the same for all seeds; a task's rows are not.
        sources: dict[int | None, Source] = {}
        for cfg in cfgs:
            sources.setdefault(_owner(cfg), open_source(cfg))
        self.data = [sources[_owner(cfg)] for cfg in cfgs]
        self._streams = [(sources[_owner(cfgs[_index(cfgs, seed)])], seed) for seed in seeds]
        self.cfgs = [with_vocabulary(_checked(cfg), data) for cfg, data in zip(cfgs, self.data, strict=True)]
        cfg = self.cfgs[0]
        self.impl = vectorised(cfg.model.impl, jax.default_backend())
        self.plan = lm.blueprint(
            dataclasses.replace(cfg.model, impl=self.impl), remat=cfg.train.remat, unroll=cfg.train.unroll
        )
        self.steps = dispatched(cfg.train.steps, cfg.train.eval_every)
        self._rates = np.array([c.optim.lr for c in cfgs], np.float32)
        self._seeds = np.array([c.train.seed for c in cfgs], np.uint32)
        self._which = np.array([seeds.index(c.train.seed) for c in cfgs], np.int32)
        rows = self.data[0].val_batches(cfg.train.batch_size // cfg.train.accumulate, cfg.train.eval_rows)
        self._validation = _joined(list(rows))
        self._compile()

    def _compile(self) -> None:
        cfg, began = self.cfgs[0], time.perf_counter()
        dtype = compute_dtype(cfg.train.dtype)
        evaluate = make_eval_step(self.plan, dtype=dtype)

        def begin(rate: jax.Array, seed: jax.Array) -> State:
            return init_state(self.plan, self._optimizer(rate), jax.random.key(seed))

        def step(rate: Any, state: State, batch: Any) -> tuple[State, dict[str, jax.Array]]:
            optim = dataclasses.replace(cfg.optim, lr=rate)
            one = make_train_step(
                self.plan,
                self._optimizer(rate),
                make_schedule(optim, cfg.train.steps),
                dtype=dtype,
                accumulate=cfg.train.accumulate,
                z_loss=cfg.optim.z_loss,
                frozen=frozen(cfg.optim, self.plan.meta),
                spike=cfg.optim.spike,
                steps=cfg.train.steps,
            )
            return one(state, batch)

        def advance(states: State, batches: Batch, rates: jax.Array, which: jax.Array) -> Any:
            def one(states: State, batch: Batch) -> Any:
                return jax.vmap(step)(rates, states, {name: x[which] for name, x in batch.items()})

            return jax.lax.scan(one, states, batches)

        def examine(params: dict[str, jax.Array], batches: Batch) -> Any:
            return jax.lax.map(lambda batch: jax.vmap(evaluate, (0, None))(params, batch), batches)

        initial = jax.jit(jax.vmap(begin))
        states = jax.eval_shape(initial, self._rates, self._seeds)
        batches = {
            name: jax.ShapeDtypeStruct((self.steps, *x.shape[1:]), x.dtype)
            for name, x in next(self._dispatches(1)).items()
        }
        lowered = (
            initial.lower(self._rates, self._seeds),
            jax.jit(advance, donate_argnums=0).lower(states, batches, self._rates, self._which),
            jax.jit(examine).lower(states["params"], self._validation),
        )
        with concurrent.futures.ThreadPoolExecutor(len(lowered)) as pool:  # XLA compiles outside of Python's lock
            self._begin, self._advance, self._examine = pool.map(lambda program: program.compile(), lowered)
        self.compile_seconds = time.perf_counter() - began

    def _optimizer(self, rate: Any) -> Any:
        cfg = self.cfgs[0]
        return make_optimizer(dataclasses.replace(cfg.optim, lr=rate), cfg.train.steps, self.plan.meta)

    def train(self, record: Record, validate: Record, stopped: Callable[[], bool]) -> None:
        """All steps, unless `stopped`.

        `record` gets the metrics of every step, fp32 [N] by name, while the next dispatch is under way; `validate`
        those of validation.
        """
        cfg = self.cfgs[0].train
        rates, which = jnp.asarray(self._rates), jnp.asarray(self._which)
        held_out = jax.device_put(self._validation)
        states: State = self._begin(self._rates, self._seeds)
        pending: tuple[int, dict[str, jax.Array]] | None = None
        done = 0
        for batches in _prefetched(self._dispatches(self.steps), cfg.steps // self.steps):
            if stopped():
                return
            states, values = self._advance(states, jax.device_put(batches), rates, which)
            self._hand_over(record, pending)
            pending, done = (done, values), done + self.steps
            if done == cfg.steps or (cfg.eval_every and done % cfg.eval_every == 0):
                self._hand_over(record, pending)
                pending = None
                validate(done, self._validated(states["params"], held_out))

    def _hand_over(self, record: Record, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
        if pending is not None:
            done, values = pending
            fetched = jax.device_get(values)
            for i in range(self.steps):
                record(done + i + 1, {name: x[i] for name, x in fetched.items()})

    def _validated(self, params: dict[str, jax.Array], batches: Batch) -> dict[str, np.ndarray]:
        sums = {k: x.astype(np.float64).sum(0) for k, x in jax.device_get(self._examine(params, batches)).items()}
        slices = self.data[0].slices
        runs = [validation.measures({k: x[i] for k, x in sums.items()}, slices) for i in range(len(self.cfgs))]
        return {name: np.array([run[name] for run in runs]) for name in runs[0]}

    def _dispatches(self, steps: int) -> Iterator[Batch]:
        """Batches [K,S,B,...] of all S seeds."""
        size = self.cfgs[0].train.batch_size
        streams = [source.train_batches(size, seed) for source, seed in self._streams]
        while True:
            yield _joined([_joined([next(stream) for stream in streams]) for _ in range(steps)])


def dispatched(steps: int, eval_every: int) -> int:
    """K: the most steps, at most `DISPATCH`, after which every validation and the end of the run can come."""
    common = math.gcd(steps, eval_every) if eval_every else steps
    return max(n for n in range(1, DISPATCH + 1) if common % n == 0)


def vectorised(impl: str | None, backend: str) -> str | None:
    """Forms of ops that `jax.vmap` can vectorise: on GPUs "chunked" where the config leaves the choice.

    Raises:
      ConfigError: the config asks for hand-written kernels, which it cannot.
    """
    chosen = choices(impl) if impl and "=" in impl else dict.fromkeys(OPS, impl) if impl else {}
    for op, form in chosen.items():
        if form in HAND_WRITTEN:
            allowed = f"runs side by side cannot use kernels ({op}); expected chunked, or --executor=local"
            raise ConfigError("model.impl", impl, allowed)
    if backend != "gpu":
        return impl
    return ", ".join(f"{op}={chosen.get(op) or 'chunked'}" for op in OPS)


ALONE: dict[str, Callable[[RunConfig], Any]] = {
    "train.init_from": lambda cfg: cfg.train.init_from,
    "train.wandb": lambda cfg: cfg.train.wandb,
    "train.trace.start": lambda cfg: cfg.train.trace.start,
}
"""Settings that only a run on its own has."""


def _checked(cfg: RunConfig) -> RunConfig:
    for key, value in ALONE.items():
        if value(cfg) is not None:
            raise ConfigError(key, value(cfg), "expected None with runs side by side, or --executor=local")
    return cfg


def _owner(cfg: RunConfig) -> int | None:
    return None if cfg.data.task is None else cfg.train.seed


def _index(cfgs: Sequence[RunConfig], seed: int) -> int:
    return next(i for i, cfg in enumerate(cfgs) if cfg.train.seed == seed)


def _joined(batches: Sequence[Batch]) -> Batch:
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def _prefetched(items: Iterator[Batch], count: int) -> Iterator[Batch]:
    """The first `count` items, made by a thread."""
    ready: queue.Queue[Any] = queue.Queue(AHEAD)
    over = threading.Event()

    def put(item: Any) -> None:
        while not over.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def make() -> None:
        try:
            for _ in range(count):
                if over.is_set():
                    return
                put(next(items))
        except BaseException as error:  # is the reader's
            put(error)

    threading.Thread(target=make, daemon=True).start()
    try:
        for _ in range(count):
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        over.set()
