"""Bodies of the Hopper kernels run by numpy on a CPU: a Python thread per warpgroup, with barriers that must be met.

It checks the algebra and the protocol of the barriers, not layouts, swizzles or missing fences. (Interpret mode of
JAX 0.10.2 knows neither layouts of loads nor wgmma with an operand in registers.)
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core.tree import alike
from hydrax.core.typing import PyTree
from hydrax.ops.pallas import compat, tiles

WAIT_SECONDS = 30


class Ref:
    """A view of a numpy array with the indexing of a reference."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    @property
    def at(self) -> "Ref":
        return self

    def __getitem__(self, index: object) -> "Ref | jax.Array":
        view = self.array[_index(index)]
        return Ref(view) if isinstance(view, np.ndarray) else jnp.asarray(view)

    def __setitem__(self, index: object, value: jax.Array) -> None:
        self.array[_index(index)] = np.asarray(value)


def _index(index: object) -> tuple:
    index = index if isinstance(index, tuple) else (index,)
    return tuple(
        i if i is Ellipsis or isinstance(i, slice)
        else slice(int(i.start), int(i.start) + i.size) if isinstance(i, pl.Slice)
        else int(i)
        for i in index
    )  # fmt: skip


class Barriers:
    """Counts arrivals; every thread must see every completion."""

    def __init__(self, arrivals: int, number: int) -> None:
        self.arrivals, self.arrived, self.seen = arrivals, [0] * number, {}
        self.shape = (number,)
        self.changed = threading.Condition()

    @property
    def at(self) -> "Barriers":
        return self

    def __getitem__(self, slot: object) -> tuple["Barriers", int]:
        return self, int(slot)

    def arrive(self, slot: int) -> None:
        with self.changed:
            self.arrived[slot] += 1
            self.changed.notify_all()

    def wait(self, slot: int) -> None:
        me = threading.get_ident(), slot
        with self.changed:
            self.seen[me] = self.seen.get(me, 0) + 1
            assert self.changed.wait_for(
                lambda: self.arrived[slot] >= self.seen[me] * self.arrivals, timeout=WAIT_SECONDS
            ), "a barrier is never completed"
            assert self.arrived[slot] < (self.seen[me] + 1) * self.arrivals, "a phase of a barrier was missed"


def _allocate(kind: PyTree) -> PyTree:
    if isinstance(kind, Mapping):
        return {name: _allocate(x) for name, x in kind.items()}
    if isinstance(kind, plgpu.Barrier):
        return Barriers(kind.num_arrivals, int(np.prod(kind.num_barriers)))
    return Ref(np.full(kind.shape, np.nan if jnp.issubdtype(kind.dtype, jnp.inexact) else 2**30, kind.dtype))


@pytest.fixture
def emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`compat.launch` and everything that a body calls, on the CPU. No trace is shared with other tests."""
    place = threading.local()

    def launch(
        body: Callable, inputs: PyTree, outputs: PyTree, *, scratch: Mapping, grid: Mapping, warpgroups: int
    ) -> PyTree:
        def run(inputs: PyTree) -> PyTree:
            ins = jax.tree.map(lambda x: Ref(np.asarray(x)), inputs)
            found = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), outputs)
            outs = jax.tree.map(Ref, found)
            for indices in itertools.product(*map(range, grid.values())):
                memory = {name: _allocate(x) for name, x in scratch.items()}
                errors = []

                def warpgroup(wg: int, indices: tuple = indices, memory: dict = memory, errors: list = errors) -> None:
                    place.index = dict(zip(grid, indices, strict=True)) | {"wg": wg}
                    try:
                        body(ins, outs, **memory)
                    except BaseException as error:
                        errors.append(error)

                threads = [threading.Thread(target=warpgroup, args=(wg,)) for wg in range(warpgroups)]
                for x in threads:
                    x.start()
                for x in threads:
                    x.join()
                if errors:
                    raise errors[0]
            return found

        return alike(jax.pure_callback(run, outputs, inputs), inputs)

    def in_place(body: Callable, inputs: PyTree, output: PyTree, state: jax.Array, grid: Mapping) -> tuple:
        types = output, jax.ShapeDtypeStruct(state.shape, state.dtype)

        def apart(ins: tuple, outs: tuple) -> None:
            body(*ins, *reversed(outs))

        return launch(apart, (inputs, state), types, scratch={}, grid=grid, warpgroups=1)

    def value(x: object) -> np.ndarray:
        return np.asarray(x.array if isinstance(x, Ref) else x).astype(np.float32)

    def fori_loop(start: int, stop: int, step: Callable, carry: PyTree) -> PyTree:
        for n in range(start, stop):
            carry = step(jnp.int32(n), carry)
        return carry

    def copy_in(source: Ref, target: Ref, barrier: tuple) -> None:
        assert source.shape == target.shape and source.dtype == target.dtype
        target[...] = source.array
        barrier[0].arrive(barrier[1])

    def copy_out(source: Ref, target: Ref) -> None:
        assert source.shape == target.shape and source.dtype == target.dtype
        target[...] = source.array

    def mm(*pairs: tuple, width: int = tiles.BLOCK) -> jax.Array:
        with np.errstate(over="ignore", invalid="ignore"):  # as wgmma does; a body masks what may overflow
            return jnp.asarray(sum(value(a) @ value(b) for a, b in pairs))

    replacements = {
        compat: {
            "launch": launch,
            "in_place": in_place,
            "load": lambda ref, layout: jnp.asarray(ref.array.copy()),  # JAX may alias what it is given
            "transpose": lambda ref: Ref(ref.array.T),
        },
        tiles: {
            "zeros": lambda width=tiles.BLOCK: jnp.zeros((tiles.BLOCK, width)),
            "index": lambda axis, width=tiles.BLOCK: jax.lax.broadcasted_iota(jnp.int32, (tiles.BLOCK, width), axis),
            "mm": mm,
            "accumulate": lambda init, sums: [x + mm(*pairs) for x, pairs in zip(init, sums, strict=True)],
        },
        plgpu: {
            "layout_cast": lambda x, layout: x,
            "set_max_registers": lambda n, action: None,
            "commit_smem": lambda: None,
            "wait_smem_to_gmem": lambda n, wait_read_only=False: None,
            "barrier_wait": lambda barrier: barrier[0].wait(barrier[1]),
            "barrier_arrive": lambda barrier: barrier[0].arrive(barrier[1]),
            "copy_gmem_to_smem": copy_in,
            "copy_smem_to_gmem": copy_out,
        },
        jax.lax: {
            "axis_index": lambda name: jnp.int32(place.index[name]),
            "fori_loop": fori_loop,
            "cond": lambda condition, yes, no, *inputs: (yes if condition else no)(*inputs),
        },
        pl: {
            "when": lambda condition: lambda f: f() if condition else None,
            "loop": lambda start, stop: lambda f: [f(jnp.int32(n)) for n in range(start, stop)],
        },
    }
    for module, names in replacements.items():
        for name, replacement in names.items():
            monkeypatch.setattr(module, name, replacement)
    jax.clear_caches()
    yield
    jax.clear_caches()


def lowered_kernels(function: Callable, *args: PyTree) -> int:
    """How many Mosaic kernels a function has, lowered for CUDA on any machine."""
    check = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=[check])(*args)
    return exported.mlir_module().count("mosaic_gpu_v2")
