"""`short_conv` on Hopper GPUs: forward and backward as Pallas kernels of one body, which read and write each row once.

    z_t = b + Σ_{j<W} w_{W-1-j} ⊙ x_{t-j},          y_t = act(z_t)
    dz_t = act'(z_t) ⊙ dy_t,                        dx_t = Σ_{j<W} w_{W-1-j} ⊙ dz_{t+j}
    dw_{W-1-j} = Σ_t dz_t ⊙ x_{t-j},                db = Σ_t dz_t

A thread holds one channel or two and goes through a range of tokens from the first to the last, in fp32. It carries
the last W - 1 inputs; backward, where z is computed again, also the sums of their dx, each complete W - 1 tokens late,
and those of dw and db, which XLA adds up over ranges. Of documents a token knows its `reach`: how many inputs, itself
included, it reads; most tiles are `whole`, of tokens that reach all W. What reaches before token 0 is differentiated by
XLA.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.typing import Array, PyTree
from hydrax.ops.conv import short_conv
from hydrax.ops.pallas import compat
from hydrax.ops.pallas.activations import ACTIVATIONS, Pair
from hydrax.ops.pallas.tuning import TUNING

LANES = (256, 128)
"""Channels of a thread block: as many of these as divide the channels."""
TILE = 32
"""Tokens in registers at once."""
TILES = 8
"""Of these a thread block takes as many as divide the row, at most."""
MOST_TAPS = 8
DTYPES = ("float32", "bfloat16")

Carry = dict[str, list[Array]]


def refusal(x: Array, w: Array, device: jax.Device | None = None) -> str | None:
    """Why these kernels cannot serve, or None."""
    kind = (device or jax.devices()[0]).device_kind
    if x.dtype.name not in DTYPES:
        return f"x is {x.dtype}: expected {' or '.join(DTYPES)}"
    channels = math.prod(x.shape[2:])
    if channels % LANES[-1]:
        return f"{channels} channels: expected a multiple of {LANES[-1]}"
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
    shape, D, pad = x.shape, math.prod(x.shape[2:]), ((0, 0), (0, -T % TILE), (0, 0))
    x, w, tail = jnp.pad(x.reshape(B, T, D), pad), w.reshape(W, D), tail.astype(x.dtype).reshape(B, W - 1, D)
    b = None if b is None else b.reshape(D)
    ids = None if segment_ids is None else jnp.pad(segment_ids, pad[:2])
    return _conv(activation, *tree.alike((x, w, b, tail, ids)))[:, :T].reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(activation: str | None, x: Array, w: Array, b: Array | None, tail: Array, ids: Array | None) -> Array:
    return _launch(activation, (x,), w, b, tail, ids)[0]


def _backward(activation: str | None, inputs: tuple, dy: Array) -> tuple:
    x, w, b, tail, ids = inputs
    few = slice(w.shape[0] - 1)

    def early(tail: Array) -> Array:
        seg = None if ids is None else ids[:, few]
        y, _ = short_conv(x[:, few], w, b, activation=activation, initial_state=tail, segment_ids=seg, impl="chunked")
        return y

    dx, dw, db = _launch(activation, (x, dy), w, b, tail, ids)
    (dtail,) = jax.vjp(early, tail)[1](dy[:, few])
    dw, db = dw.sum((0, 1)), db.sum((0, 1))
    return dx, dw.astype(w.dtype), None if b is None else db.astype(b.dtype), dtail, None


_conv.defvjp(lambda activation, *inputs: (_conv(activation, *inputs), inputs), _backward)


def _tokens(T: int) -> int:
    """Tokens of a thread block."""
    tiles = T // TILE
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
    activation: str | None, rows: tuple[Array, ...], w: Array, b: Array | None, tail: Array, ids: Array | None
) -> tuple[Array, ...]:
    """y of rows x; or of rows x and dy dx, and dw and db by rows and ranges of tokens."""
    B, T, D = rows[0].shape
    W, ranges, lanes = w.shape[0], T // _tokens(T), next(n for n in LANES if not D % n)
    reach = whole = None
    if ids is not None:
        reach = _reach(ids, W)
        whole = (reach.reshape(B, -1, TILE).min(-1) == W).astype(jnp.int32)
    sums = [jax.ShapeDtypeStruct((B, ranges, *n, D), jnp.float32) for n in ((W,), ())]
    return compat.launch(
        functools.partial(_body, ACTIVATIONS[activation], lanes),
        (rows, w, b, tail if W > 1 else None, reach, whole),
        (jax.ShapeDtypeStruct(rows[0].shape, rows[0].dtype), *(sums if len(rows) == 2 else ())),
        scratch={},
        grid={"channels": D // lanes, "range": ranges, "row": B},
        warpgroups=1,
    )


def _body(activation: Pair, lanes: int, inputs: tuple, outputs: tuple[PyTree, ...]) -> None:
    """One thread block: some channels of a range of tokens."""
    rows, w, b, tail, reach, whole = inputs
    out, *sums = outputs
    W, T = w.shape[0], rows[0].shape[1]
    tokens = _tokens(T)
    late = W - 1 if sums else 0  # tokens between what is read and what it completes
    row, part = jax.lax.axis_index("row"), jax.lax.axis_index("range")
    channels = pl.ds(jax.lax.axis_index("channels") * lanes, lanes)
    first = part * tokens
    act, derivative = activation
    taps = [_lanes(w.at[W - 1 - j, channels]) for j in range(W)]  # by how many tokens ago
    bias = None if b is None else _lanes(b.at[channels])

    def before(j: int) -> Array:
        earlier = _lanes(rows[0].at[row, jnp.maximum(first - j, 0), channels])
        return jnp.where(first == 0, _lanes(tail.at[row, W - 1 - j, channels]), earlier)

    def read(t: Array) -> list[Array]:
        return [_lanes(ref.at[row, t, channels]) for ref in rows]

    def token(t: Array, reads: list[Array], carry: Carry, target: Array, reaches: bool) -> Carry:
        """Reads token t and writes row `target`, which is `late` tokens before; if it `reaches`, all W inputs count."""
        reached = functools.partial(_reached, None if reaches else reach[row, t])
        window = [reads[0], *carry["x"]]
        taken = reached(window)
        terms = [tap * x for tap, x in zip(taps, taken, strict=True)]
        z = sum(terms[1:], terms[0] if bias is None else terms[0] + bias)
        now = {"x": window[:-1]}
        if sums:
            (dz,) = reached([derivative(z) * reads[1]])
            own, *others = reached([tap * dz for tap in taps])
            *now["dx"], value = [own, *(dx + more for dx, more in zip(carry["dx"], others, strict=True))]
            now["dw"] = [dw + dz * x for dw, x in zip(carry["dw"], taken, strict=True)]
            now["db"] = [carry["db"][0] + dz]
        else:
            (value,) = reached([act(z)])
        out[row, target, channels] = value.astype(out.dtype)
        return now

    def tile(start: Array, reaches: bool, carry: Carry) -> Carry:
        reads = [read(start + t) for t in range(TILE)]
        for t in range(TILE):
            target = start + t - late
            # The first rows that are late belong to the range before; what is complete overwrites them here.
            carry = token(start + t, reads[t], carry, jnp.maximum(target, first) if t < late else target, reaches)
        return carry

    def some(i: Array, carry: Carry) -> Carry:
        run = functools.partial(tile, first + i * TILE)
        if reach is None:
            return run(True, carry)
        ways = (functools.partial(run, reaches) for reaches in (True, False))
        return jax.lax.cond(whole[row, part * (tokens // TILE) + i] != 0, *ways, carry)

    carry = {"x": [before(j) for j in range(1, W)]}
    if sums:
        zero = plgpu.layout_cast(jnp.zeros((lanes,), jnp.float32), _layout(lanes))
        carry |= {"dx": [zero] * (W - 1), "dw": [zero] * W, "db": [zero]}
    carry = jax.lax.fori_loop(0, tokens // TILE, some, carry)
    if sums:
        for j, dw in enumerate(carry["dw"]):
            sums[0][row, part, W - 1 - j, channels] = dw
        sums[1][row, part, channels] = carry["db"][0]
    for t in range(late):  # the range after completes the last rows
        after = first + tokens + t
        here = jnp.minimum(after, T - 1)
        x, dy = read(here)
        carry = token(here, [x, jnp.where(after < T, dy, jnp.zeros_like(dy))], carry, after - late, reach is None)


def _reached(reach: Array | None, values: Sequence[Array]) -> list[Array]:
    """Of what belongs to a token and to those before it: zero instead of what it does not reach."""
    return [x if reach is None else jnp.where(reach > j, x, jnp.zeros_like(x)) for j, x in enumerate(values)]


def _layout(lanes: int) -> Any:
    return plgpu.Layout.WG_STRIDED((lanes,), vec_size=lanes // 128)


def _lanes(ref: PyTree) -> Array:
    """Some channels in fp32 registers."""
    return compat.load(ref, _layout(ref.shape[-1])).astype(jnp.float32)
