"""The recurrence of matrix states over the chunks of a row, on Hopper: what a chunk does to the state is a `step`.

A thread block takes a (segment of a) row and a value head, or 64 columns of its values where the device has room for
that many; a warpgroup takes 64 columns with their part of the state in registers; the last one loads what the chunks
need.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from hydrax.core.typing import Array, PyTree
from hydrax.ops.pallas import compat, ring, tiles
from hydrax.ops.pallas.tiles import BLOCK
from hydrax.ops.pallas.tuning import Tuning


def sweep(
    step: Callable,
    rows: Mapping[str, Array],
    facts: Array,
    systems: Array,
    n: int,
    tuning: Tuning,
    *,
    Z: Array | None = None,
    wanted: Sequence[str] = ("Z",),
    reverse: bool = False,
) -> dict[str, Array]:
    """The recurrence of `step` over all chunks of every row, cut in n segments, from the states `Z` [B·n,Hv,K,V].

    Args:
      step: (rows, facts, system, state, own_s, outputs, Z) -> Z after the chunk, in blocks of K as lists: the rows as
        in `rows`, but of "v" only the own columns; the state in shared memory, too; a block of shared memory that no
        one else uses; and by name where in global memory outputs of the chunk go.
      rows: [B,T,H,D], with k and, by head of values, "v" (v or do). Without "v" that is zero, with K columns.
      facts: vectors of every chunk [B,N,H,F,C].
      systems: matrices of every chunk [B,N,H,C·x,C].
      wanted: any of "y", "u" [B,T,Hv,V], "Z", the state after the segment, "states" [B·n,N,Hv,K,V] before every chunk.
    """
    B, T, _, K = rows["k"].shape
    values = rows.get("v", rows["k"])
    V, Hv, N = values.shape[-1], max(x.shape[2] for x in (values, facts)), T // BLOCK // n
    dtype = rows["k"].dtype
    inputs = {name: x.reshape(B * n, T // n, *x.shape[2:]) for name, x in rows.items()}
    facts, systems = (x.reshape(B * n, N, *x.shape[2:]) for x in (facts, systems))
    depth, parts = K // BLOCK, V // BLOCK
    if B * n * Hv * parts > tuning.blocks:
        parts = 1
    workers = V // BLOCK // parts
    width = {name: x.shape[-1] // (parts if name == "v" else 1) for name, x in rows.items()}
    moving = (sum(width.values()) + systems.shape[3]) // BLOCK
    stages = tuning.stages_of(moving, workers * (depth + 1), facts.shape[3])
    types = {
        "y": jax.ShapeDtypeStruct((B * n, T // n, Hv, V), dtype),
        "u": jax.ShapeDtypeStruct((B * n, T // n, Hv, V), dtype),
        "Z": jax.ShapeDtypeStruct((B * n, Hv, K, V), jnp.float32),
        "states": jax.ShapeDtypeStruct((B * n, N, Hv, K, V), dtype),
    }
    found = compat.launch(
        functools.partial(_body, step, reverse, workers),
        (inputs, facts, systems, Z),
        {name: types[name] for name in wanted},
        scratch={
            "row_s": {name: tiles.scratch(dtype, stages, BLOCK, w) for name, w in width.items()},
            "fact_s": plgpu.SMEM((stages, *facts.shape[3:]), jnp.float32),
            "system_s": tiles.scratch(dtype, stages, *systems.shape[3:]),
            "state_s": tiles.scratch(dtype, workers, depth, *tiles.SQUARE),
            "own_s": tiles.scratch(dtype, workers, *tiles.SQUARE),
            **ring.barriers(stages, len(rows) + 2, workers),
        },
        grid={"part": parts, "h": Hv, "b": B * n},
        warpgroups=workers + 1,
    )
    return {name: x.reshape(B, T, Hv, V) if name in ("y", "u") else x for name, x in found.items()}


def _body(
    step: Callable,
    reverse: bool,
    workers: int,
    inputs: tuple,
    outputs: dict[str, PyTree],
    *,
    row_s: dict[str, PyTree],
    fact_s: PyTree,
    system_s: PyTree,
    state_s: PyTree,
    own_s: PyTree,
    full: PyTree,
    free: PyTree,
) -> None:
    rows, facts, systems, Z = inputs
    b, h, part, wg = (jax.lax.axis_index(name) for name in ("b", "h", "part", "wg"))
    heads = max(x.shape[2] for x in (rows.get("v", facts), facts))
    stages, N, depth = fact_s.shape[0], facts.shape[1], state_s.shape[1]
    columns = pl.ds((part * workers + wg) * BLOCK, BLOCK)

    def chunk(n: Array) -> Array:
        return N - 1 - n if reverse else n

    def fetch(n: Array, slot: Array | int, full: PyTree) -> None:
        ring.fetch_rows(rows, row_s, (b, chunk(n), h), heads, slot, full, {"v": part})
        for source, target in ((facts, fact_s), (systems, system_s)):
            plgpu.copy_gmem_to_smem(source.at[b, chunk(n), ring.head(h, heads, source)], target.at[slot], full)

    @pl.when(wg < workers)
    def _() -> None:
        if workers > 1:
            plgpu.set_max_registers(232, action="increase")
        state = [state_s.at[wg, j] for j in range(depth)]

        def run(n: Array, slot: Array, Z: list) -> list:
            for block, z in zip(state, Z, strict=True):
                block[...] = z.astype(block.dtype)
            plgpu.commit_smem()
            if "states" in outputs:
                for j, block in enumerate(state):
                    plgpu.copy_smem_to_gmem(block, outputs["states"].at[b, chunk(n), h, tiles.block(j), columns])
            places = {x: outputs[x].at[b, tiles.block(chunk(n)), h, columns] for x in ("y", "u") if x in outputs}
            blocks = {x: tiles.blocks(y.at[slot]) for x, y in row_s.items() if x != "v"}
            if "v" in row_s:
                blocks["v"] = row_s["v"].at[slot, :, tiles.block(wg)]
            return step(blocks, fact_s.at[slot], system_s.at[slot], state, own_s.at[wg], places, Z)

        places = [(b, h, tiles.block(j), columns) for j in range(depth)]
        first = [tiles.zeros() if Z is None else tiles.load(Z.at[at]) for at in places]
        last = ring.work(run, first, N, stages, full, free)
        if "Z" in outputs:
            for at, z in zip(places, last, strict=True):
                outputs["Z"][at] = z
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == workers)
    def _() -> None:
        if workers > 1:
            plgpu.set_max_registers(40, action="decrease")
        ring.load(fetch, N, stages, full, free)
