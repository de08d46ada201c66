"""One mixer as a layer of a model, compiled: what `bench` measures."""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.core.typing import Array, PyTree

Inputs = dict[str, Any]
"""Arguments of a layer beside its parameters: x, the cotangent dy of y, and what a model tells its layers (facts)."""


class Callee(Protocol):
    """What can be measured."""

    def inputs(self, batch: int, seq_len: int) -> Inputs: ...

    def __call__(self, params: PyTree, x: PyTree, facts: dict[str, Array]) -> Array: ...


class Layer:
    """A mixer with the options a layer of width `d_model` has if nothing is said, with its parameters as an argument.

    The documents and the index of the layer are arguments too, as they are in training. A compiler that knew them
    would do part of the work of a short row in advance, and make it look cheaper per token than a long one.

    Raises:
      ConfigError: the mixer has no default options for that width.
    """

    def __init__(self, name: str, d_model: int, dtype: str, impl: str | None):
        self.name, self.d_model, self.dtype, self.impl = name, d_model, jnp.dtype(dtype), impl
        self.row, self.cfg = mixers.row(name), default_config(name, d_model)
        self._make = lambda: nnx.split(mixers.get(name)(d_model, self.cfg, rngs=nnx.Rngs(0)))
        self._graph, self.shapes = nnx.eval_shape(self._make)

    def init(self) -> PyTree:
        """Parameters as a training step has them: those of matrix products in the compute dtype."""

        def cast(p: nnx.Variable) -> nnx.Variable:
            return p.replace(p[...].astype(self.dtype)) if p.get_metadata("cast") else p

        return jax.jit(lambda: jax.tree.map(cast, self._make()[1], is_leaf=lambda p: isinstance(p, nnx.Variable)))()

    def inputs(self, batch: int, seq_len: int) -> Inputs:
        """Rows of one document. x and dy are normal: a device draws less power, and runs faster, on zeros."""
        x, dy = (
            jax.random.normal(key, (batch, seq_len, self.d_model), self.dtype)
            for key in jax.random.split(jax.random.key(seq_len))
        )
        facts = {"segment_ids": jnp.ones((batch, seq_len), jnp.int32), "layer_index": jnp.zeros((), jnp.int32)}
        return {"x": x, "dy": dy, "facts": facts}

    def flops(self, seq_len: int) -> float:
        """FLOPs of the forward pass per token, counted as in `models.cost`."""
        weights = sum(p.size for _, p in nnx.to_flat_state(self.shapes) if p.get_metadata("matrix") is not None)
        return 2 * weights + self.row.flops(self.cfg, seq_len)

    def __call__(self, params: PyTree, x: Array, facts: dict[str, Array]) -> Array:
        context = mixers.Context.of(x, impl=self.impl, **facts)
        return nnx.merge(self._graph, params)(x, context)[0]


def default_config(name: str, d_model: int) -> mixers.MixerConfig:
    """The filled config of a mixer of which no option is given."""
    try:
        return build(mixers.get(name).Config, {}).fill(d_model)
    except ConfigError as error:
        raise error.under(f"mixers.{name}") from None


def forward(layer: Callee, params: PyTree, x: PyTree, dy: Array, facts: dict[str, Array]) -> Array:
    """y."""
    return layer(params, x, facts)


def forward_backward(layer: Callee, params: PyTree, x: PyTree, dy: Array, facts: dict[str, Array]) -> PyTree:
    """y, which the next layer needs, and the gradients of all parameters and x."""
    y, pullback = jax.vjp(lambda params, x: layer(params, x, facts), params, x)
    return y, pullback(dy)


@dataclasses.dataclass(frozen=True)
class Pass:
    """A use of a layer: (layer, params, **inputs) -> results, and what it costs in forward passes."""

    call: Callable[..., PyTree]
    forwards: int


PASSES = {"forward": Pass(forward, 1), "forward_backward": Pass(forward_backward, 3)}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes the compiled program asks for; `measured` is the device's own peak, None where that is not known: on
    CPUs, and after another program of the process that needed more (a device only knows its highest peak)."""

    arguments: int
    outputs: int
    temporaries: int
    total: int
    measured: int | None = None


class Program:
    """A pass of a layer, compiled. Calling it runs it on what `start` was given.

    Raises:
      MemoryError: it needs more than the machine has.
    """

    def __init__(self, layer: Callee, name: str, params: PyTree, batch: int, seq_len: int):
        began = time.perf_counter()
        inputs = jax.eval_shape(functools.partial(layer.inputs, batch, seq_len))
        self._compiled = jax.jit(functools.partial(PASSES[name].call, layer)).lower(params, **inputs).compile()
        self.compile_seconds = time.perf_counter() - began
        found: Any = self._compiled.memory_analysis()
        sizes = (found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes)
        self.memory = Memory(*sizes, total=sum(sizes))
        if self.memory.total > _capacity():  # on a CPU the system would end this process, or another one
            raise MemoryError(f"needs {self.memory.total / 2**30:.1f} GiB of {_capacity() / 2**30:.1f}")

    def start(self, params: PyTree, inputs: Inputs) -> None:
        """The first run, during which the peak is noted."""
        self._params, self._inputs = params, inputs
        before = _statistics()
        jax.block_until_ready(self())
        after = _statistics()
        if after.get("peak_bytes_in_use", 0) > before.get("peak_bytes_in_use", 0):
            others = before["bytes_in_use"] - self.memory.arguments  # what does not belong to this program
            self.memory = dataclasses.replace(self.memory, measured=after["peak_bytes_in_use"] - others)

    def __call__(self) -> PyTree:
        return self._compiled(self._params, **self._inputs)


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Programs are compiled, and not read from JAX's cache on disk."""
    before = jax.config.values["jax_enable_compilation_cache"]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # it asks for the option only once
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _statistics() -> dict[str, int]:
    """Of the device's memory; a CPU has none."""
    return jax.local_devices()[0].memory_stats() or {}


def _capacity() -> int:
    """Bytes of the device, or of the machine."""
    return _statistics().get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
