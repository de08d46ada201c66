"""`rms_norm` on Hopper GPUs: forward and backward as Pallas kernels that read and write each row once.

With n = x r, r = (c Σ x² + eps)^-½, a = act(gate) and dn = weight ⊙ a ⊙ dy, all of it in fp32 registers,

    y = n ⊙ weight ⊙ a        dx = r (dn - c n (dn·n))        dgate = act'(gate) ⊙ weight ⊙ n ⊙ dy
    dweight = Σ a ⊙ n ⊙ dy

A warpgroup takes 64 rows at a time. Of dweight it keeps the sum over those that one register holds; XLA adds up these.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from hydrax.core.typing import Array, PyTree
from hydrax.ops.pallas import compat, tiles
from hydrax.ops.pallas.activations import ACTIVATIONS
from hydrax.ops.pallas.chunks import WIDTHS
from hydrax.ops.pallas.tiles import BLOCK, per_column, spread
from hydrax.ops.pallas.tuning import TUNING

TILES = 8
"""Tiles of 64 rows of a thread block of the backward pass, at most."""

How = tuple[str | None, bool, float]
"""activation, mean, eps."""


def refusal(x: Array, gate: Array | None, device: jax.Device | None = None) -> str | None:
    """Why these kernels cannot serve, or None."""
    kind = (device or jax.devices()[0]).device_kind
    dtypes = {a.dtype.name for a in (x, gate) if a is not None}
    if dtypes != {"bfloat16"}:
        return f"x and gate are {', '.join(sorted(dtypes))}: expected bfloat16"
    if x.shape[-1] not in WIDTHS:
        return f"rows of {x.shape[-1]}: expected {' or '.join(map(str, WIDTHS))}"
    if x.size // x.shape[-1] % BLOCK:
        return f"{x.size // x.shape[-1]} rows: expected a multiple of {BLOCK}"
    if kind not in TUNING:
        return f"the device is {kind!r}: expected one of {', '.join(TUNING)}"
    return None


def fused(
    x: Array, weight: Array | None, gate: Array | None, *, activation: str | None, mean: bool, eps: float
) -> Array:
    """y [...,D] of x and gate [...,D], weight [D]."""
    D = x.shape[-1]
    weight = None if weight is None else weight.astype(jnp.float32)
    gate = None if gate is None else gate.reshape(-1, D)
    return _norm((activation, mean, eps), x.reshape(-1, D), weight, gate).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(how: How, x: Array, weight: Array | None, gate: Array | None) -> Array:
    return _launch(
        functools.partial(_forward, how),
        {"x": x, "gate": gate},
        weight,
        {"y": jax.ShapeDtypeStruct(x.shape, x.dtype)},
        blocks=x.shape[0] // BLOCK,
    )["y"]


def _vjp_backward(how: How, inputs: tuple, dy: Array) -> tuple:
    x, weight, gate = inputs
    blocks = x.shape[0] // BLOCK // max(n for n in range(1, TILES + 1) if x.shape[0] // BLOCK % n == 0)
    row = jax.ShapeDtypeStruct(x.shape, x.dtype)
    sums = None if weight is None else jax.ShapeDtypeStruct((blocks, BLOCK, x.shape[1]), jnp.float32)
    outputs = {"x": row, "gate": gate if gate is None else row, "weight": sums}
    body, rows = functools.partial(_backward, how), {"x": x, "gate": gate, "dy": dy}
    found = _launch(body, rows, weight, {name: t for name, t in outputs.items() if t is not None}, blocks=blocks)
    dweight = None if weight is None else found["weight"].sum((0, 1))
    return found["x"], dweight, found.get("gate")


_norm.defvjp(lambda how, *inputs: (_norm(how, *inputs), inputs), _vjp_backward)


def _launch(
    body: Callable, given: Mapping[str, Array | None], weight: Array | None, outputs: dict, *, blocks: int
) -> dict[str, Array]:
    rows = {name: x for name, x in given.items() if x is not None}
    width = rows["x"].shape[1] // BLOCK
    return compat.launch(
        functools.partial(_body, body, blocks),
        (rows, weight),
        outputs,
        scratch={
            "row_s": {name: tiles.scratch(x.dtype, width, *tiles.SQUARE) for name, x in rows.items()},
            "full": plgpu.Barrier(num_arrivals=len(rows) * width, num_barriers=(1,)),
        },
        grid={"block": blocks},
        warpgroups=1,
    )


def _body(
    step: Callable,
    blocks: int,
    inputs: tuple,
    outputs: dict[str, PyTree],
    *,
    row_s: dict[str, PyTree],
    full: PyTree,
) -> None:
    """One thread block: some tiles of 64 rows, one after the other."""
    rows, weight = inputs
    per_block, width = rows["x"].shape[0] // BLOCK // blocks, row_s["x"].shape[0]
    block = jax.lax.axis_index("block")
    shared = {name: [x.at[j] for j in range(width)] for name, x in row_s.items()}
    weights = [None if weight is None else weight.at[tiles.block(j)] for j in range(width)]

    def tile(i: Array, sums: list[Array]) -> list[Array]:
        own = tiles.block(block * per_block + i)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # results leave through the slots of the rows
        for name, x in rows.items():
            for j, target in enumerate(shared[name]):
                plgpu.copy_gmem_to_smem(x.at[own, tiles.block(j)], target, full.at[0])
        plgpu.barrier_wait(full.at[0])
        places = {
            name: [y.at[own, tiles.block(j)] for j in range(width)] for name, y in outputs.items() if name != "weight"
        }
        return step(shared, weights, places, sums)

    sums = [tiles.zeros() for _ in range(width)] if "weight" in outputs else []
    sums = jax.lax.fori_loop(0, per_block, tile, sums)
    for j, total in enumerate(sums):
        outputs["weight"][block, tiles.block(0), tiles.block(j)] = total
    plgpu.wait_smem_to_gmem(0)


def _rate(xs: list[PyTree], share: float, eps: float) -> Array:
    """r of each row [64]."""
    return jax.lax.rsqrt(share * sum(jnp.square(tiles.load(x)).sum(1) for x in xs) + eps)


def _share(xs: list[PyTree], mean: bool) -> float:
    """c."""
    return 1 / (BLOCK * len(xs)) if mean else 1.0


def _forward(how: How, rows: dict, weights: list, places: dict, sums: list[Array]) -> list[Array]:
    activation, mean, eps = how
    act, _ = ACTIVATIONS[activation]
    r = spread(_rate(rows["x"], _share(rows["x"], mean), eps))
    for j, x in enumerate(rows["x"]):
        y = tiles.load(x) * r
        if weights[j] is not None:
            y *= per_column(weights[j])
        if "gate" in rows:
            y *= act(tiles.load(rows["gate"][j]))
        tiles.store(y, x, places["y"][j])
    return sums


def _backward(how: How, rows: dict, weights: list, places: dict, sums: list[Array]) -> list[Array]:
    activation, mean, eps = how
    act, derivative = ACTIVATIONS[activation]
    share = _share(rows["x"], mean)
    r = _rate(rows["x"], share, eps)

    def at(j: int) -> tuple[Array, Array, Array | None]:
        """x, dy weight and the gate of some columns."""
        dy = tiles.load(rows["dy"][j])
        scaled = dy if weights[j] is None else dy * per_column(weights[j])
        return tiles.load(rows["x"][j]), scaled, tiles.load(rows["gate"][j]) if "gate" in rows else None

    def projected(j: int) -> Array:
        x, dy, gate = at(j)
        return (x * (dy if gate is None else dy * act(gate))).sum(1)

    sums, columns = list(sums), range(len(rows["x"]))
    along, rate = spread(share * r * r * sum(map(projected, columns))), spread(r)
    for j in columns:
        x, dy, gate = at(j)
        dn = dy if gate is None else dy * act(gate)
        if sums:
            total = tiles.load(rows["dy"][j]) * x * rate
            sums[j] += total if gate is None else total * act(gate)
        if gate is not None:
            tiles.store(derivative(gate) * dy * x * rate, rows["gate"][j], places["gate"][j])
        tiles.store(rate * (dn - along * x), rows["x"][j], places["x"][j])
    return sums
