"""`linear_scan` on Hopper GPUs: forward and backward as Pallas kernels of one body.

A thread block carries 128 channels through the tokens of a row, one channel per thread, in fp32:

    h_t = a_t h_{t-1} + b_t                                                   from the first token to the last
    db_t = dh_t + c_{t+1},      da_t = db_t h_{t-1},      c_t = a_t db_t      from the last to the first

No logarithm is taken: a may be 0 or negative. Documents are values of a and b: a is 0 where one begins; at padding a is
1 and b is 0. Where there are very few channels and rows, segments of these run at the same time: a first sweep gives of
each what it adds to the state, and the product of its a.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, PyTree
from hydrax.ops.dispatch import KERNEL
from hydrax.ops.pallas import compat, ring
from hydrax.ops.pallas.tuning import TUNING, Tuning
from hydrax.ops.scan import forms

LANES = 128
"""Channels of a thread block."""
TILE = 32
"""Tokens in registers at once."""
FEW = 16
"""Thread blocks that are faster in one sweep than all that the device holds in two."""
DTYPES = ("float32", "bfloat16")

Tokens = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """`carry, writes = token(reads, carry)` over the tokens; of `h`, a token reads that of the token before it."""

    token: Callable[[Tokens, Array], tuple[Array, Tokens]]
    reverse: bool = False


def _forward_token(x: Tokens, h: Array) -> tuple[Array, Tokens]:
    h = x["a"] * h + x["b"]
    return h, {"h": h}


def _backward_token(x: Tokens, c: Array) -> tuple[Array, Tokens]:
    db = x["dh"] + c
    return x["a"] * db, {"db": db} | ({"da": db * x["h"]} if "h" in x else {})


FORWARD, BACKWARD = Sweep(_forward_token), Sweep(_backward_token, reverse=True)


def refusal(a: Array, b: Array, device: jax.Device | None = None) -> str | None:
    """Why these kernels cannot serve, or None."""
    kind = (device or jax.devices()[0]).device_kind
    if a.dtype != b.dtype or a.dtype.name not in DTYPES:
        return f"a, b are {a.dtype}, {b.dtype}: expected {' or '.join(DTYPES)} twice"
    channels = a[0, 0].size
    if channels % LANES:
        return f"{channels} channels: expected a multiple of {LANES}"
    if kind not in TUNING:
        return f"the device is {kind!r}: expected one of {', '.join(TUNING)}"
    return None


def fused(a: Array, b: Array, seg: Array | None, h: Array, *, tuning: Tuning | None = None) -> tuple[Array, Array]:
    """All h [B,T,*C] and the last one of a, b [B,T,*C], h [B,*C]."""
    B, T = a.shape[:2]
    a, b = (x.reshape(B, T, -1) for x in (forms.restarting(a, seg), b))
    pad = [(0, 0), (0, -T % TILE), (0, 0)]
    a, b = jnp.pad(a, pad, constant_values=1), jnp.pad(b, pad)
    hs = _scan(tuning or TUNING[jax.devices()[0].device_kind], a, b, h.reshape(B, -1))
    hs = hs[:, :T].reshape(B, T, *h.shape[1:])
    return hs, hs[:, -1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(tuning: Tuning, a: Array, b: Array, h: Array) -> Array:
    return _forward(tuning, a, b, h)[0]


def _forward(tuning: Tuning, a: Array, b: Array, h: Array) -> tuple[Array, tuple]:
    wanted = {"h": jax.ShapeDtypeStruct(a.shape, jnp.float32)}
    hs = checkpoint_name(_over_segments(FORWARD, {"a": a, "b": b}, h, wanted, tuning)["h"], KERNEL)
    return hs, (a, h, hs)


def _backward(tuning: Tuning, saved: tuple, dh: Array) -> tuple[Array, Array, Array]:
    a, h, hs = saved
    wanted = dict.fromkeys(("da", "db"), jax.ShapeDtypeStruct(a.shape, a.dtype))
    d = _over_segments(BACKWARD, {"a": a, "dh": dh}, jnp.zeros_like(h), wanted, tuning, {"h": hs}, h)
    return d["da"], d["db"], fp32(a[:, 0]) * fp32(d["db"][:, 0])


_scan.defvjp(_forward, _backward)


def segments(x: Array, tuning: Tuning) -> int:
    """Into how many parts, of 4 tiles at least, each row is cut so that few rows fill the device."""
    B, T, D = x.shape
    blocks, n = B * D // LANES, 1
    while blocks < FEW and blocks * n * 2 <= tuning.blocks and T % (TILE * 4 * n * 2) == 0:
        n *= 2
    return n


def _over_segments(
    sweep: Sweep,
    rows: Tokens,
    carry: Array,
    wanted: dict[str, jax.ShapeDtypeStruct],
    tuning: Tuning,
    more: Tokens | None = None,
    initial: Array | None = None,
) -> Tokens:
    """What the sweep writes; `carry` [B,D] is what it begins with, `more` what only its writes depend on."""
    B, _, D = rows["a"].shape
    n = segments(rows["a"], tuning)
    carries = [carry]
    if n > 1:
        part = jax.ShapeDtypeStruct((B, n, D), jnp.float32)
        nothing = jnp.zeros_like(part), jnp.ones_like(part)
        own, product = _launch(sweep, rows, nothing, None, (part, part), n, tuning)
        for i in range(n - 1, 0, -1) if sweep.reverse else range(n - 1):
            carries.append(product[:, i] * carries[-1] + own[:, i])
    starts = jnp.stack(carries[::-1] if sweep.reverse else carries, axis=1)
    return _launch(sweep, rows | (more or {}), (starts,), initial, wanted, n, tuning)


def _launch(
    sweep: Sweep,
    rows: Tokens,
    carry: tuple[Array, ...],
    initial: Array | None,
    wanted: PyTree,
    n: int,
    tuning: Tuning,
) -> PyTree:
    """The sweep over n segments; `wanted` are its writes, or else the carry [B,n,D] after each of them.

    The carry is followed by the product of a where that is wanted.
    """
    B, T, D = rows["a"].shape
    size = sum(TILE * LANES * x.dtype.itemsize for x in rows.values())
    slots = min((tuning.memory - 1024) // size, T // TILE // n)
    return compat.launch(
        functools.partial(_body, sweep, n),
        (rows, carry, initial),
        wanted,
        scratch={
            "row_s": {name: plgpu.SMEM((slots, TILE, LANES), x.dtype) for name, x in rows.items()},
            **ring.barriers(slots, len(rows), 1),
        },
        grid={"channels": D // LANES, "segment": n, "row": B},
        warpgroups=2,
    )


def _body(
    sweep: Sweep, n: int, inputs: tuple, outputs: PyTree, *, row_s: dict[str, PyTree], **barriers: PyTree
) -> None:
    """One thread block: 128 channels of a segment of a row; the last warpgroup loads tiles, the other works on them."""
    rows, carries, initial = inputs
    row, segment, wg = (jax.lax.axis_index(name) for name in ("row", "segment", "wg"))
    channels = pl.ds(jax.lax.axis_index("channels") * LANES, LANES)
    tiles = rows["a"].shape[1] // TILE // n
    slots = row_s["a"].shape[0]

    def first(i: Array) -> Array:
        return (segment * tiles + (tiles - 1 - i if sweep.reverse else i)) * TILE

    def fetch(i: Array, slot: Array | int, full: PyTree) -> None:
        for name, x in rows.items():
            plgpu.copy_gmem_to_smem(x.at[row, pl.ds(first(i), TILE), channels], row_s[name].at[slot], full)

    def before(t: Array) -> Array:
        earlier = _lanes(rows["h"].at[row, jnp.maximum(t - 1, 0), channels])
        return jnp.where(t == 0, _lanes(initial.at[row, channels]), earlier)

    def step(i: Array, slot: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        start = first(i)
        x = {name: [_lanes(ref.at[slot, t]) for t in range(TILE)] for name, ref in row_s.items()}
        if "h" in x:
            x["h"] = [before(start), *x["h"][:-1]]
        for t in reversed(range(TILE)) if sweep.reverse else range(TILE):
            now, writes = sweep.token({name: values[t] for name, values in x.items()}, carry[0])
            if isinstance(outputs, dict):
                for name, ref in outputs.items():
                    ref[row, start + t, channels] = writes[name].astype(ref.dtype)
            carry = (now, *(product * x["a"][t] for product in carry[1:]))
        return carry

    @pl.when(wg == 0)
    def _() -> None:
        carry = tuple(_lanes(ref.at[row, segment, channels]) for ref in carries)
        carry = ring.work(step, carry, tiles, slots, **barriers)
        if isinstance(outputs, tuple):
            for ref, value in zip(outputs, carry, strict=True):
                ref[row, segment, channels] = value

    @pl.when(wg == 1)
    def _() -> None:
        ring.load(fetch, tiles, slots, **barriers)


def _lanes(ref: PyTree) -> Array:
    """A token in fp32 registers, a channel per thread."""
    return compat.load(ref, plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)).astype(jnp.float32)
