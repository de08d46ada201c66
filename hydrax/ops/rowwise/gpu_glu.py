"""The gradients of `glu` on Hopper GPUs: gate, x and dy are read once.

    dgate = act'(gate) ⊙ x ⊙ dy,      dx = act(gate) ⊙ dy

XLA forms the product itself as fast; of its gradients it makes two passes, as two matrix products take them.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from hydrax.core.typing import Array, PyTree
from hydrax.ops.pallas import compat
from hydrax.ops.pallas.activations import ACTIVATIONS, Pair
from hydrax.ops.pallas.tuning import TUNING
from hydrax.ops.rowwise import glu

LANES = 1024
"""Entries that a thread block takes at a time."""
ROWS = 4
"""Of these in registers at once."""
TURNS = 4
"""Turns of a thread block, at most."""
DTYPES = ("float32", "bfloat16")


def refusal(gate: Array, x: Array, device: jax.Device | None = None) -> str | None:
    """Why this kernel cannot serve, or None."""
    kind = (device or jax.devices()[0]).device_kind
    if gate.dtype != x.dtype or x.dtype.name not in DTYPES:
        return f"gate is {gate.dtype}, x {x.dtype}: expected both {' or '.join(DTYPES)}"
    if x.size % (LANES * ROWS):
        return f"{x.size} entries: expected a multiple of {LANES * ROWS}"
    if kind not in TUNING:
        return f"the device is {kind!r}: expected one of {', '.join(TUNING)}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused(activation: str | None, gate: Array, x: Array) -> Array:
    """act(gate) ⊙ x."""
    return glu(gate, x, activation=activation, impl="chunked")


def _backward(activation: str | None, inputs: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    gate, x = inputs
    flat = [a.reshape(-1, LANES) for a in (gate, x, dy)]
    rows = flat[0].shape[0]
    found = compat.launch(
        functools.partial(_body, ACTIVATIONS[activation]),
        tuple(flat),
        [jax.ShapeDtypeStruct(flat[0].shape, x.dtype)] * 2,
        scratch={},
        grid={"part": rows // (ROWS * _turns(rows))},
        warpgroups=1,
    )
    return tuple(d.reshape(x.shape) for d in found)


fused.defvjp(lambda activation, *inputs: (fused(activation, *inputs), inputs), _backward)


def _turns(rows: int) -> int:
    return max(n for n in range(1, TURNS + 1) if rows // ROWS % n == 0)


def _body(activation: Pair, inputs: tuple[PyTree, ...], outputs: list[PyTree]) -> None:
    """One thread block: some rows."""
    act, derivative = activation
    turns = _turns(inputs[0].shape[0])
    first = jax.lax.axis_index("part") * (turns * ROWS)

    def turn(i: Array, _: Any) -> None:
        rows = [first + i * ROWS + r for r in range(ROWS)]
        for row, (gate, x, dy) in [(row, [_load(ref, row) for ref in inputs]) for row in rows]:
            for ref, value in zip(outputs, (derivative(gate) * x * dy, act(gate) * dy), strict=True):
                ref[row] = value.astype(ref.dtype)

    jax.lax.fori_loop(0, turns, turn, None)


def _load(ref: PyTree, row: Array) -> Array:
    layout = plgpu.Layout.WG_STRIDED((LANES,), vec_size=LANES // 128)
    return compat.load(ref.at[row, pl.ds(0, LANES)], layout).astype(jnp.float32)
