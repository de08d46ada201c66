"""Blocks of 64 x 64, the unit in which the Hopper kernels load, multiply and store (one warpgroup, one wgmma tile)."""

from collections.abc import Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from hydrax.core.typing import Array, PyTree
from hydrax.ops.pallas import compat

BLOCK = 64
SQUARE = (BLOCK, BLOCK)
TILED = plgpu.Layout.WGMMA
Pair = tuple[PyTree, PyTree]
"""Factors of a product: the left one in registers (bf16) or shared memory, the right one in shared memory."""


def scratch(dtype: jnp.dtype, *shape: int) -> PyTree:
    """Matrices [...,64,64·n] in shared memory, as wgmma wants them."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))


def block(i: int | Array) -> PyTree:
    """The i-th 64 rows or columns."""
    return pl.ds(i * BLOCK, BLOCK)


def blocks(rows: PyTree) -> list[PyTree]:
    """Rows [64,D] in shared memory by blocks of columns."""
    return [rows.at[:, block(j)] for j in range(rows.shape[1] // BLOCK)]


def store(x: Array, through: PyTree, target: PyTree) -> None:
    """A block in registers to global memory, through shared memory that is read until the next wait."""
    through[...] = x.astype(through.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(through, target)


def load(ref: PyTree) -> Array:
    """A block in fp32 registers."""
    return compat.load(ref, TILED).astype(jnp.float32)


def per_row(ref: PyTree, width: int = BLOCK) -> Array:
    """A vector [64] in memory as [64,width], one value per row."""
    return spread(compat.load(ref, TILED.reduce(1)), width)


def per_column(ref: PyTree) -> Array:
    """A vector [width] in memory as [64,width], one value per column."""
    return jax.lax.broadcast_in_dim(compat.load(ref, TILED.reduce(0)), (BLOCK, ref.shape[0]), [1])


def spread(x: Array, width: int = BLOCK) -> Array:
    """A vector [64] in registers as [64,width], one value per row."""
    return jax.lax.broadcast_in_dim(x, (BLOCK, width), [0])


def index(axis: int, width: int = BLOCK) -> Array:
    """Row (0) or column (1) of every entry of [64,width]."""
    return plgpu.broadcasted_iota(jnp.int32, (BLOCK, width), axis, layout=TILED)


def zeros(width: int = BLOCK) -> Array:
    return plgpu.layout_cast(jnp.zeros((BLOCK, width), jnp.float32), TILED)


def row_vector(value: float) -> Array:
    """A value for each of 64 rows."""
    return plgpu.layout_cast(jnp.full((BLOCK,), value, jnp.float32), TILED.reduce(1))


def mm(*pairs: Pair, width: int = BLOCK) -> Array:
    """Σ left @ right [64,width] over the pairs, in fp32."""

    def run(acc: PyTree) -> Array:
        for left, right in pairs:
            plgpu.wgmma(acc, left, right)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((BLOCK, width), jnp.float32))


def accumulate(init: Sequence[Array], sums: Sequence[Sequence[Pair]]) -> tuple[Array, ...]:
    """init + Σ left @ right for each of the sums, all in flight together."""

    def run(accs: Sequence[PyTree]) -> None:
        for acc, pairs in zip(accs, sums, strict=True):
            for left, right in pairs:
                plgpu.wgmma(acc, left, right)

    return pl.run_state(run)(tuple(plgpu.ACC.init(x) for x in init))


def inverse(L: Array, factor_s: PyTree) -> Array:
    """(I + L)^-1 in fp16, for L below the diagonal, by two blocks of shared memory in fp16.

    By doubling: the inverse of [[A, 0], [L, B]] is [[A^-1, 0], [-B^-1 L A^-1, B^-1]], for all blocks of a width.
    fp16 has room for the inverses of the delta rule if keys have norm <= 1 and β is in [0, 2].
    No powers of L: with correlated keys they exceed their sum by many orders of magnitude.
    """
    low_s, inverse_s = factor_s.at[0], factor_s.at[1]
    row, column = index(0), index(1)
    level = jax.lax.bitwise_xor(row, column)  # its highest bit: the width of the two blocks that this entry joins
    low_s[...] = L.astype(low_s.dtype)
    X = jnp.where(row == column, 1.0, jnp.where(level == 1, -L, 0)).astype(inverse_s.dtype)
    for p in range(1, BLOCK.bit_length() - 1):
        plgpu.commit_smem()  # all have read what is stored next
        inverse_s[...] = X
        plgpu.commit_smem()
        XL = mm((X, low_s)).astype(X.dtype)
        joined = jax.lax.shift_right_logical(level, jnp.int32(p)) == 1
        X = jnp.where(joined, -mm((XL, inverse_s)).astype(X.dtype), X)
    return X
