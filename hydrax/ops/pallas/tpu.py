"""What the TPU kernels of matrix states share: one kernel that carries a state from chunk to chunk, and its derivative.

    y_n, S_{n+1} = chunk(x_n, S_n)

The grid is (row, value head, chunk). The chunks of a row follow one another, and the block of the output that holds the
state is the same for all of them: it stays in VMEM, in fp32, and is written once. Where gradients are wanted, the state
before every chunk is kept, in the dtype of the values; a second kernel goes through the chunks from the last to the
first, carries dS in the same way, and takes the vector-Jacobian product of `chunk` in VMEM: JAX derives it from the
body of the first.

fp32 values are multiplied in full fp32, bfloat16 ones as they are; sums are fp32. These kernels are tested in the
interpreter and lowered for TPUs, but have not been timed on one: no op chooses them by itself.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, PyTree
from hydrax.ops import documents
from hydrax.ops.dispatch import KERNEL
from hydrax.ops.spans import join_chunks, split_chunks

CONTRACTED = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}
"""The axes of a and b that a b, a bᵀ and aᵀ b sum over."""
SMALLEST = 16
"""Tokens of the shortest chunk: the rows of a tile of bfloat16."""
LARGEST = 256 * 512
"""Numbers of the largest state: of it, its cotangent and their copies, VMEM holds several."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """`chunk`: tokens of a chunk, a power of two; fewer for short rows, or where vectors would exceed `block` bytes."""

    chunk: int
    block: int = 2**16

    def tokens(self, x: tuple) -> int:
        """Tokens of a chunk of arrays [B,T,H,...]."""
        widest = max(a.dtype.itemsize * math.prod(a.shape[3:]) for a in x)
        enough = 1 << (x[0].shape[1] - 1).bit_length()
        return max(SMALLEST, min(self.chunk, enough, 1 << (self.block // widest).bit_length() - 1))


class Documents(NamedTuple):
    """How the tokens of a chunk relate, see `documents.chunk_masks`; all but the first as 0 or 1."""

    same: Array  # [C,C]
    enters: Array  # [C,1]
    leaves: Array  # [C,1]
    keep: Array  # [1,1]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What a kernel computes, and how.

    `chunk`: (mm, x, documents, S, saved) -> (y [C,V], S [K,V], saved) of one chunk and value head. `mm` is `product` in
    `dtype`; x are fp32, matrices [C,D] and rows [1,C]; `saved` is a tuple of matrices that are dear to compute: () in
    the forward pass, what that one returned in the backward pass.
    Outputs are multiplied by `scale` and have `dtype`; `interpret` is that of `pl.pallas_call`.
    """

    chunk: Callable
    scale: float
    dtype: jnp.dtype
    interpret: Any = False

    def step(self, x: tuple, facts: Array, S: Array, saved: tuple) -> tuple[Array, Array, tuple]:
        """`chunk` of what is read from memory."""
        y, S, saved = self.chunk(functools.partial(product, self.dtype), x, _documents(facts), S, saved)
        return self.scale * y, S, saved


def require(op: str, q: Array, k: Array, v: Array) -> None:
    """Refuses what these kernels cannot serve.

    Raises:
      ValueError: no TPU, other dtypes, or a state that is too large.
    """
    K, V = q.shape[-1], v.shape[-1]
    reason = None
    if jax.default_backend() != "tpu":
        reason = f"the device is {jax.devices()[0].device_kind!r}: expected a TPU"
    elif {q.dtype, k.dtype, v.dtype} - {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        reason = f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: expected bfloat16 or float32"
    elif K * V > LARGEST:
        reason = f"K, V = {K}, {V}: expected a state of at most {LARGEST} numbers"
    if reason:
        raise ValueError(f"{op}: impl = 'pallas_tpu' cannot serve: {reason}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(dtype: jnp.dtype, a: Array, b: Array, sides: str = "nn") -> Array:
    """a b, a bᵀ ("nt") or aᵀ b ("tn") of fp32 matrices, rounded to `dtype`, summed in fp32; so are its cotangents."""
    left, right = CONTRACTED[sides]
    return jax.lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((left,), (right,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _product_forward(dtype: jnp.dtype, a: Array, b: Array, sides: str) -> tuple[Array, tuple]:
    return product(dtype, a, b, sides), (a, b)


def _product_backward(dtype: jnp.dtype, sides: str, factors: tuple, d: Array) -> tuple[Array, Array]:
    a, b = factors
    da, db = {
        "nn": ((d, b, "nt"), (a, d, "tn")),
        "nt": ((d, b, "nn"), (d, a, "tn")),
        "tn": ((b, d, "nt"), (a, d, "nn")),
    }[sides]
    return product(dtype, *da), product(dtype, *db)


product.defvjp(_product_forward, _product_backward)


def index(n: int) -> tuple[Array, Array]:
    """Row and column of every entry of a matrix [n,n]."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (n, n), axis) for axis in (0, 1))
    return i, j


def halves(n: int) -> list[Array]:
    """For blocks of 2, 4, ..., n tokens: the pairs i > j [n,n] in the second and the first half of one block.

    Together all pairs i > j: each at the highest bit in which i and j differ.
    """
    i, j = index(n)
    return [(i > j) & ((i ^ j) >> bit == 1) for bit in range(n.bit_length() - 1)]


def column(row: Array) -> Array:
    """[1,n] -> [n,1]."""
    i, j = index(row.shape[1])
    return jnp.where(i == j, row, 0).sum(1, keepdims=True)


def by_chunks(kernel: Kernel, x: tuple, seg: Array | None, S: Array, tuning: Tuning) -> tuple[Array, Array]:
    """Outputs [B,T,Hv,V], and the final state [B,Hv,K,V].

    Args:
      x: matrices [B,T,H,D] and scalars [B,T,H], of Hv heads or of a divisor of Hv.
      seg: documents [B,T] without padding, or None.
      S: the state before token 0 [B,Hv,K,V].
    """
    B, T = x[0].shape[:2]
    C = tuning.tokens(x)
    x = tuple(_heads_first(split_chunks(a, C)) for a in x)
    y, S = _over_chunks(kernel, x, _facts(seg, B, T, C), S[:, :, None])
    return join_chunks(jnp.moveaxis(y, 1, 3), T), S[:, :, 0]


def _heads_first(x: Array) -> Array:
    """[B,N,C,H,D] -> [B,H,N,C,D], and [B,N,C,H] -> [B,H,N,1,C]."""
    x = jnp.moveaxis(x, 3, 1)
    return x if x.ndim == 5 else x[:, :, :, None]


def _facts(seg: Array | None, B: int, T: int, C: int) -> Array:
    """[B,1,N,4,C]: the number of each token's document, and the other facts of `Documents`."""
    number = jnp.zeros((B, T), jnp.int32) if seg is None else jnp.cumsum(documents.changes(seg), 1, dtype=jnp.int32)
    number = split_chunks(number, C)
    _, enters, leaves, keep = documents.chunk_masks(number, documents.ids_before(number))
    rows = (number, enters, leaves, jnp.broadcast_to(keep[..., None], number.shape))
    return jnp.stack(rows, 2).astype(jnp.float32)[:, None]


def _documents(facts: Array) -> Documents:
    number, enters, leaves, keep = (facts[i : i + 1] for i in range(4))
    return Documents(column(number) == number, column(enters), column(leaves), keep[:, :1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_chunks(kernel: Kernel, x: tuple, facts: Array, S: Array) -> tuple[Array, Array]:
    """`by_chunks` of arrays [B,H,N,·,·], the states with N = 1."""
    return _run(kernel, x, facts, S, keep=False)[0]


def _run(kernel: Kernel, x: tuple, facts: Array, S: Array, *, keep: bool) -> tuple[tuple, tuple]:
    """(y, final state), and if asked for, the state before every chunk and what the chunk saved."""

    def body(ins: tuple, outs: tuple) -> None:
        (x, facts, initial), (y, S, kept) = ins, outs
        _at_first(S, initial)
        before = S[...]
        value, S[...], saved = kernel.step(_read(x), facts[...], before, ())
        y[...] = value.astype(y.dtype)
        _write(kept, (before, *saved) if keep else ())

    blocks = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[3:], jnp.float32), (x, facts, S))
    y, state, saved = jax.eval_shape(kernel.step, *blocks, ())
    heads = (*S.shape[:2], facts.shape[2])
    y, *kept = (jax.ShapeDtypeStruct((*heads, *a.shape), kernel.dtype) for a in (y, state, *saved))
    y, S, kept = _launch(kernel, body, (x, facts, S), (y, _like(S), tuple(kept) if keep else ()), heads)
    return (y, S), kept


def _forward(kernel: Kernel, x: tuple, facts: Array, S: Array) -> tuple[tuple, tuple]:
    outputs, kept = checkpoint_name(_run(kernel, x, facts, S, keep=True), KERNEL)
    return outputs, (x, facts, kept)


def _backward(kernel: Kernel, residuals: tuple, cotangents: tuple) -> tuple:
    x, facts, kept = residuals
    dy, dS = cotangents

    def body(ins: tuple, outs: tuple) -> None:
        (x, facts, kept, dy, final), (dx, dS) = ins, outs
        _at_first(dS, final)
        known = facts[...]
        before, *saved = _read(kept)
        _, pullback = jax.vjp(lambda x, S: kernel.step(x, known, S, tuple(saved))[:2], _read(x), before)
        values, dS[...] = pullback((fp32(dy[...]), dS[...]))
        _write(dx, values)

    heads = dy.shape[:3]
    outputs = tuple(jax.ShapeDtypeStruct((*heads, *a.shape[3:]), a.dtype) for a in x), _like(dS)
    dx, dS = _launch(kernel, body, (x, facts, kept, dy, dS), outputs, heads, reverse=True)
    return jax.tree.map(_over_groups, dx, x), None, dS


_over_chunks.defvjp(_forward, _backward)


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _at_first(carried: PyTree, initial: PyTree) -> None:
    """Starts what is carried from chunk to chunk."""

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        carried[...] = initial[...]


def _read(refs: tuple) -> tuple[Array, ...]:
    return tuple(fp32(ref[...]) for ref in refs)


def _write(refs: tuple, values: tuple) -> None:
    for ref, value in zip(refs, values, strict=True):
        ref[...] = value.astype(ref.dtype)


def _over_groups(dx: Array, x: Array) -> Array:
    """Gradients by value head, summed over the heads that share x."""
    if dx.shape == x.shape:
        return dx
    return fp32(dx).reshape(*x.shape[:2], -1, *x.shape[2:]).sum(2).astype(x.dtype)


def _launch(
    kernel: Kernel, body: Callable, inputs: PyTree, outputs: PyTree, grid: tuple[int, ...], *, reverse: bool = False
) -> PyTree:
    """`body(inputs, outputs)`, of references to matrices, for every row, value head and chunk, or the last chunk first.

    Arrays are [B,H,N,·,·]: H may be a divisor of the value heads, and N = 1 stands for what all chunks share.
    """
    arrays, inputs_tree = jax.tree.flatten(inputs)
    types, outputs_tree = jax.tree.flatten(outputs)
    _, heads, N = grid

    def flat(*refs: PyTree) -> None:
        ins, outs = refs[: len(arrays)], refs[len(arrays) :]
        body(jax.tree.unflatten(inputs_tree, ins), jax.tree.unflatten(outputs_tree, outs))

    def block(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        group, shared = heads // x.shape[1], x.shape[2] == 1

        def place(b: Array, h: Array, n: Array) -> tuple:
            return b, jax.lax.div(h, jnp.int32(group)), 0 if shared else N - 1 - n if reverse else n, 0, 0

        return pl.BlockSpec((None, None, None, *x.shape[3:]), place)

    run = pl.pallas_call(
        flat,
        grid=grid,
        in_specs=[block(x) for x in arrays],
        out_specs=[block(x) for x in types],
        out_shape=types,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=kernel.interpret,
    )
    return jax.tree.unflatten(outputs_tree, run(*arrays))
