"""Chunks pass through slots of shared memory: the last warpgroup loads them, the others work on them.

In Pallas Mosaic a barrier must be waited for between two of its completions, by every thread that uses it at all.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from hydrax.core.typing import Array, PyTree
from hydrax.ops.pallas import tiles


def barriers(slots: int, copies: int, workers: int) -> dict[str, PyTree]:
    """Scratch "full", "free": a slot is full after all copies of a chunk, and free when every worker has left it."""
    return {
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=(slots,)),
        "free": plgpu.Barrier(num_arrivals=workers, num_barriers=(slots,)),
    }


def fetch_rows(
    rows: Mapping[str, PyTree],
    row_s: Mapping[str, PyTree],
    at: tuple,
    heads: int,
    slot: Array | int,
    full: PyTree,
    parts: Mapping[str, Array] = MappingProxyType({}),
) -> None:
    """Starts the copies of the chunk `at` (row, chunk, value head) of `rows` [B,T,H,D], for `heads` value heads.

    Of rows wider than their slots it takes the columns of which `parts` tells the number.
    """
    b, chunk, h = at
    for name, x in rows.items():
        target = row_s[name].at[slot]
        width = target.shape[-1]
        columns = pl.ds(parts.get(name, 0) * width, width)
        plgpu.copy_gmem_to_smem(x.at[b, tiles.block(chunk), head(h, heads, x), columns], target, full)


def head(h: Array, heads: int, x: PyTree) -> Array:
    """The head of x, with heads on axis 2, that serves value head h of `heads`."""
    return jax.lax.div(h, jnp.int32(heads // x.shape[2]))


def load(fetch: Callable, chunks: int, slots: int, full: PyTree, free: PyTree) -> None:
    """`fetch(n, slot, barrier)`, which starts the copies of chunk n, for every chunk; for the loading warpgroup."""
    for n in range(min(slots, chunks)):
        fetch(jnp.int32(n), jnp.int32(n), full.at[n])

    @pl.loop(slots, max(chunks, slots))
    def _(n: Array) -> None:
        slot = jax.lax.rem(n, jnp.int32(slots))
        plgpu.barrier_wait(free.at[slot])
        _refill(fetch, n, slot, full)


def load_all(rings: Sequence[tuple[Callable, PyTree, PyTree]], chunks: Array | int) -> None:
    """As `load`, from several rings (fetch, full, free), which are refilled in this order."""

    @pl.loop(0, chunks)
    def _(n: Array) -> None:
        for fetch, full, free in rings:
            slots = full.shape[0]
            slot = jax.lax.rem(n, jnp.int32(slots))

            pl.when(n >= slots)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            _refill(fetch, n, slot, full)


def _refill(fetch: Callable, n: Array, slot: Array, full: PyTree) -> None:
    plgpu.commit_smem()  # joins the warps: none may miss a phase of the barrier
    fetch(n, slot, full.at[slot])


def work(step: Callable, carry: PyTree, chunks: Array | int, slots: int, full: PyTree, free: PyTree) -> PyTree:
    """`carry = step(n, slot, carry)` over the chunks as they come; for each of the other warpgroups."""

    def chunk(n: Array, carry: PyTree) -> PyTree:
        slot = jax.lax.rem(n, jnp.int32(slots))
        plgpu.barrier_wait(full.at[slot])
        carry = step(n, slot, carry)
        plgpu.barrier_arrive(free.at[slot])
        return carry

    return jax.lax.fori_loop(0, chunks, chunk, carry)
