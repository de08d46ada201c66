"""Every call of Pallas Mosaic GPU that differs between the supported versions of JAX, and the choices made for all."""

from collections.abc import Callable, Mapping

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.typing import Array, PyTree

_NEW = jax.__version_info__ >= (0, 11)

PARAMETERS = plgpu.CompilerParams(
    approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
)


def launch(
    body: Callable,
    inputs: PyTree,
    outputs: PyTree,
    *,
    scratch: Mapping[str, PyTree],
    grid: Mapping[str, int],
    warpgroups: int,
) -> PyTree:
    """`body(inputs, outputs, **scratch)`, of references, on a named grid, "wg" being the warpgroups of a block.

    Lane semantics are set explicitly: under the default of JAX 0.11 layout inference may search for minutes and fail.
    No barriers are inserted around stores: between reading shared memory, also by wgmma, and storing there again the
    body needs a `commit_smem` or a wait for a copy to global memory, which both join the threads of a warpgroup.
    """
    arrays, inputs_tree = jax.tree.flatten(inputs)
    types, outputs_tree = jax.tree.flatten(outputs)
    n = len(arrays)

    def flat(*refs: PyTree, **scratch: PyTree) -> None:
        ins, outs = refs[:n], refs[n:]
        body(jax.tree.unflatten(inputs_tree, ins), jax.tree.unflatten(outputs_tree, outs), **scratch)

    run = plgpu.kernel(
        flat,
        out_type=tuple(types),
        scratch_types=dict(scratch),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=PARAMETERS,
    )
    return jax.tree.unflatten(outputs_tree, unsharded(run, *arrays))


def in_place(
    body: Callable, inputs: Mapping[str, Array], output: jax.ShapeDtypeStruct, state: Array, grid: Mapping[str, int]
) -> tuple[Array, Array]:
    """The output and the new state of `body(inputs, old, new, output)`, of references; old and new are the same."""
    mesh = plgpu.Mesh(grid=tuple(grid.values()), grid_names=tuple(grid))

    def flat(*refs: PyTree) -> None:
        *ins, state, output = refs
        body(dict(zip(inputs, ins, strict=True)), state, state, output)

    local = output.update(manual_axis_type=jax.sharding.ManualAxisType())  # as `unsharded` types all

    @jax.custom_batching.sequential_vmap
    def run(state: Array, *inputs: Array) -> tuple[Array, Array]:
        def update(refs: tuple[PyTree, PyTree]) -> None:
            state, found = refs
            (found[...],) = pl.kernel(flat, out_type=(local,), mesh=mesh, compiler_params=PARAMETERS)(*inputs, state)

        state, found = pl.run_state(update)((state, jnp.zeros(output.shape, output.dtype)))
        return found, state

    return unsharded(run, state, *inputs.values())


def unsharded(run: Callable, *arrays: Array) -> PyTree:
    """`run(*arrays)` of a kernel that takes no notice of a `jax.shard_map` around it.

    It is traced for arrays of no mesh: in a body nothing says how types that vary over one meet.
    """
    run, _ = jax.closure_convert(run, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays))
    return tree.alike(run(*arrays), arrays)


def load(ref: PyTree, layout: PyTree) -> Array:
    """All of `ref`, in shared or global memory, as an array of that layout."""
    return plgpu.load(ref, *(() if _NEW else ((),)), layout=layout, optimized=False)


def transpose(ref: PyTree) -> PyTree:
    """A matrix in shared memory, read as its transpose."""
    return ref.transpose((1, 0)) if _NEW else plgpu.transpose_ref(ref, (1, 0))
