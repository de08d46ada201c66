"""`short_conv` on Hopper GPUs: forward and backward as Pallas kernels of one body, which read and write each row once.

    z_t = b + Σ_{j<W} w_{W-1-j} ⊙ x_{t-j},      y_t = act(z_t)
    dz_t = act'(z_t) ⊙ dy_t,      dx_t = Σ_{j<W} w_{W-1-j} ⊙ dz_{t+j},      dw_{W-1-j} = Σ_t dz_t ⊙ x_{t-j},      db = Σ_t dz_t

A thread holds one channel and goes through a range of tokens from the first to the last, in fp32. It carries the last
W - 1 inputs; backward also the sums of their dx, each complete W - 1 tokens late, and those of dw and db, which XLA adds
up over ranges. z is computed again. Of documents a token knows its `reach`: the inputs, itself included, that it reads.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from hydrax.core.typing import Array, PyTree
from hydrax.ops.conv import ACTIVATIONS, short_conv
from hydrax.ops.layout import alike
from hydrax.ops.pallas import compat
from hydrax.ops.pallas.tuning import TUNING

LANES = 128
"""Channels of a thread block."""
TILE = 32
"""Tokens in registers at once."""
TILES = 8
"""Of these a thread block takes as many as divide the row, at most."""
MOST_TAPS = 8
DTYPES = ("float32", "bfloat16")

Carry = dict[str, list[Array]]


@dataclasses.dataclass(frozen=True)
class Filter:
    """`w[j]` multiplies the input j tokens ago."""

    w: Sequence[Array]
    b: Array | None
    activation: Callable[[Array], Array]

    def before_activation(self, window: Sequence[Array]) -> Array:
        terms = [w * x for w, x in zip(self.w, window, strict=True)]
        return sum(terms[1:], terms[0] if self.b is None else terms[0] + self.b)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """`carry, row = token(filter, reads, reach, carry)` over the tokens; the row belongs to the token `late` before."""

    token: Callable[[Filter, dict[str, Array], Array | None, Carry], tuple[Carry, Array]]
    row: str
    late: bool = False


def _forward_token(f: Filter, reads: dict[str, Array], reach: Array | None, carry: Carry) -> tuple[Carry, Array]:
    window = [reads["x"], *carry["x"]]
    y = f.activation(f.before_activation(_reached(window, reach)))
    return {"x": window[:-1]}, _reached([y], reach)[0]


def _backward_token(f: Filter, reads: dict[str, Array], reach: Array | None, carry: Carry) -> tuple[Carry, Array]:
    window = [reads["x"], *carry["x"]]
    taken = _reached(window, reach)
    _, pullback = jax.vjp(f.activation, f.before_activation(taken))
    dz = _reached(pullback(reads["dy"]), reach)[0]
    own, *others = _reached([w * dz for w in f.w], reach)
    sums = [own, *(dx + more for dx, more in zip(carry["dx"], others, strict=True))]
    now = {
        "x": window[:-1],
        "dx": sums[:-1],
        "dw": [dw + dz * x for dw, x in zip(carry["dw"], taken, strict=True)],
        "db": [carry["db"][0] + dz],
    }
    return now, sums[-1]


def _reached(values: Sequence[Array], reach: Array | None) -> list[Array]:
    """Of what belongs to this token and those before it: zero instead of what it does not reach."""
    return [x if reach is None else jnp.where(reach > j, x, jnp.zeros_like(x)) for j, x in enumerate(values)]


FORWARD, BACKWARD = Sweep(_forward_token, "y"), Sweep(_backward_token, "dx", late=True)


def refusal(x: Array, w: Array, device: jax.Device | None = None) -> str | None:
    """Why these kernels cannot serve, or None."""
    kind = (device or jax.devices()[0]).device_kind
    if x.dtype.name not in DTYPES:
        return f"x is {x.dtype}: expected {' or '.join(DTYPES)}"
    channels = x[0, 0].size
    if channels % LANES:
        return f"{channels} channels: expected a multiple of {LANES}"
    if w.shape[0] > MOST_TAPS:
        return f"{w.shape[0]} taps: expected {MOST_TAPS} at most"
    if kind not in TUNING:
        return f"the device is {kind!r}: expected one of {', '.join(TUNING)}"
    return None


def fused(
    x: Array, w: Array, b: Array | None, tail: Array, segment_ids: Array | None, *, activation: str | None
) -> Array:
    """y of x [B,T,*C], w [W,*C], b [*C] and tail [B,W-1,*C], the inputs before token 0."""
    (B, T), W = x.shape[:2], w.shape[0]
    shape, pad = x.shape, ((0, 0), (0, -T % TILE), (0, 0))
    x, w, tail = jnp.pad(x.reshape(B, T, -1), pad), w.reshape(W, -1), tail.astype(x.dtype).reshape(B, W - 1, -1)
    b = None if b is None else b.reshape(-1)
    ids = None if segment_ids is None else jnp.pad(segment_ids, pad[:2])
    return _conv(activation, *alike((x, w, b, tail, ids)))[:, :T].reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(activation: str | None, x: Array, w: Array, b: Array | None, tail: Array, ids: Array | None) -> Array:
    return _launch(FORWARD, activation, {"x": x}, (w, b, tail), ids, {"y": x})["y"]


def _forward(activation: str | None, *inputs: Any) -> tuple[Array, tuple]:
    return _conv(activation, *inputs), inputs


def _backward(activation: str | None, inputs: tuple, dy: Array) -> tuple:
    x, w, b, tail, ids = inputs
    B, W, n = x.shape[0], w.shape[0], x.shape[1] // _tokens(x)
    sums = {name: jax.ShapeDtypeStruct((B, n, *p.shape), jnp.float32) for name, p in {"dw": w, "db": w[:1]}.items()}
    d = _launch(BACKWARD, activation, {"x": x, "dy": dy}, (w, b, tail), ids, {"dx": x, **sums})
    dw, db = (d[name].sum((0, 1)) for name in sums)

    def early(tail: Array) -> Array:
        few = None if ids is None else ids[:, : W - 1]
        how = {"activation": activation, "segment_ids": few, "initial_state": tail, "impl": "chunked"}
        return short_conv(x[:, : W - 1], w, b, **how)[0]

    (dtail,) = jax.vjp(early, tail)[1](dy[:, : W - 1])
    return d["dx"], dw.astype(w.dtype), None if b is None else db[0].astype(b.dtype), dtail, None


_conv.defvjp(_forward, _backward)


def _tokens(x: Array) -> int:
    """Tokens of a thread block."""
    tiles = x.shape[1] // TILE
    return TILE * max(n for n in range(1, TILES + 1) if tiles % n == 0)


def _reach(ids: Array, W: int) -> Array:
    """How many inputs each token reads, of W; 0 at padding. What comes before the row is of the document of token 0."""
    same = ids != 0
    reach = same.astype(jnp.int32)
    for j in range(1, W):
        before = jnp.concatenate([jnp.broadcast_to(ids[:, :1], (ids.shape[0], j)), ids[:, :-j]], axis=1)
        same &= before == ids
        reach += same
    return reach


def _launch(
    sweep: Sweep, activation: str | None, rows: dict[str, Array], own: tuple, ids: Array | None, wanted: PyTree
) -> PyTree:
    B, T, D = rows["x"].shape
    w, b, tail = own
    return compat.launch(
        functools.partial(_body, sweep, ACTIVATIONS[activation]),
        (rows, w, b, tail if tail.size else None, None if ids is None else _reach(ids, w.shape[0])),
        {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in wanted.items()},
        scratch={},
        grid={"channels": D // LANES, "range": T // _tokens(rows["x"]), "row": B},
        warpgroups=1,
    )


def _body(sweep: Sweep, activation: Callable[[Array], Array], inputs: tuple, outputs: dict[str, PyTree]) -> None:
    """One thread block: 128 channels of a range of tokens."""
    rows, w, b, tail, reach = inputs
    W, T, tokens = w.shape[0], rows["x"].shape[1], _tokens(rows["x"])
    late = W - 1 if sweep.late else 0
    row, part = jax.lax.axis_index("row"), jax.lax.axis_index("range")
    channels = pl.ds(jax.lax.axis_index("channels") * LANES, LANES)
    first = part * tokens
    f = Filter(
        [_lanes(w.at[W - 1 - j, channels]) for j in range(W)], None if b is None else _lanes(b.at[channels]), activation
    )

    def before(j: int) -> Array:
        earlier = _lanes(rows["x"].at[row, jnp.maximum(first - j, 0), channels])
        return jnp.where(first == 0, _lanes(tail.at[row, W - 1 - j, channels]), earlier)

    def read(t: Array) -> dict[str, Array]:
        return {name: _lanes(ref.at[row, t, channels]) for name, ref in rows.items()}

    def advance(t: Array, reads: dict[str, Array], carry: Carry, target: Array) -> Carry:
        carry, value = sweep.token(f, reads, None if reach is None else reach[row, t], carry)
        ref = outputs[sweep.row]
        ref[row, target, channels] = value.astype(ref.dtype)
        return carry

    def step(i: Array, carry: Carry) -> Carry:
        start = first + i * TILE
        reads = [read(start + t) for t in range(TILE)]
        for t in range(TILE):
            target = start + t - late
            # The first rows that are late belong to the range before; what is complete overwrites them here.
            carry = advance(start + t, reads[t], carry, jnp.maximum(target, first) if t < late else target)
        return carry

    carry = {"x": [before(j) for j in range(1, W)]}
    if sweep.late:
        carry |= {name: [_zeros() for _ in range(n)] for name, n in {"dx": W - 1, "dw": W, "db": 1}.items()}
    carry = jax.lax.fori_loop(0, tokens // TILE, step, carry)
    if not sweep.late:
        return
    for j, dw in enumerate(carry["dw"]):
        outputs["dw"][row, part, W - 1 - j, channels] = dw
    outputs["db"][row, part, 0, channels] = carry["db"][0]
    for t in range(W - 1):  # of the range after, for the last dx
        after = first + tokens + t
        here = jnp.minimum(after, T - 1)
        reads = read(here)
        reads["dy"] = jnp.where(after < T, reads["dy"], jnp.zeros_like(reads["dy"]))
        carry = advance(here, reads, carry, after - late)


def _zeros() -> Array:
    return plgpu.layout_cast(jnp.zeros((LANES,), jnp.float32), _layout())


def _layout() -> Any:
    return plgpu.Layout.WG_STRIDED((LANES,), vec_size=LANES // 128)


def _lanes(ref: PyTree) -> Array:
    """Some channels in fp32 registers."""
    return compat.load(ref, _layout()).astype(jnp.float32)
