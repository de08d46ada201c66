"""Which blocks of keys the Hopper kernels load for a block of queries, and which of them need a mask.

Query row r, of token t = r // per, sees the key that came at `at` if first_r <= at <= t <= end and its block is chosen.
Rows that are not tokens of the keys' row have `last` in place of t.
Keys may lie in any order: those that live about equally long lie together (`order`), so that old blocks do not stay
loaded for one key in them. Blocks are of 128 rows and 128 keys; facts of keys have shape [B,G,S], with G = 1 if all
heads share them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from hydrax.core.typing import Array, Bool, Int

BLOCK = 128
"""Query rows, and keys, of a block."""

FOREVER = 2**30
"""End of a key that stays visible; above every index."""

WORD = 32
"""Chosen blocks are the bits of words."""

SHORT = 4 * BLOCK - 1
"""Keys that live up to so long stay as they are: apart they would fill blocks that live longer."""

_INDEX_BITS = 26  # of a key while it is sorted; the class of its life is above them


@dataclasses.dataclass(frozen=True)
class Choice:
    """Keys are chosen by blocks of `size`, 64 or a multiple of 128, by tokens that `per` query rows in a row share."""

    size: int = BLOCK
    per: int = 1

    def bit(self, key: Array | int) -> Array:
        """Of the key's block in its word."""
        return jax.lax.rem(jax.lax.div(jnp.int32(key), jnp.int32(self.size)), jnp.int32(WORD))

    def word(self, key: Array | int) -> Array:
        """The number of the word with that bit."""
        return jax.lax.div(jnp.int32(key), jnp.int32(self.size * WORD))


EVERYTHING = Choice()
"""No choice: every block, and a query row per token."""


def order(end: Int[Array, "B G S"]) -> tuple[Int[Array, "B G S"], Int[Array, "B G S"]]:
    """Keys by the power of two above their life, if it is long, then by index; and where each key went."""
    index = jnp.broadcast_to(jnp.arange(end.shape[-1], dtype=jnp.int32), end.shape)
    power = jnp.maximum(WORD - jax.lax.clz(jnp.clip(end - index + 1, 0, FOREVER)), SHORT.bit_length())
    if end.shape[-1] > 2**_INDEX_BITS:
        raise ValueError(f"{end.shape[-1]} keys: expected at most {2**_INDEX_BITS}")
    places = jnp.sort(power * 2**_INDEX_BITS + index, axis=-1) & (2**_INDEX_BITS - 1)
    return places, jnp.put_along_axis(index, places, index, axis=-1, inplace=False)


def words(idx: Int[Array, "B T G N"], blocks: int) -> Int[Array, "B G W T"]:
    """The chosen blocks of each token as bits; -1 chooses nothing."""
    number = jnp.arange(-(-blocks // WORD), dtype=jnp.int32)
    bits = jnp.where(idx < 0, 0, jnp.left_shift(jnp.int32(1), idx % WORD))[..., None, :]
    placed = jnp.where((idx // WORD)[..., None, :] == number[:, None], bits, 0)
    return jnp.moveaxis(jax.lax.reduce(placed, jnp.int32(0), jax.lax.bitwise_or, (4,)), 1, 3)


def tables(
    choice: Choice,
    first: Int[Array, "B F Q"],
    last: Int[Array, "B F Q"] | None,
    keys: int,
    at: Int[Array, "B G S"] | None,
    end: Int[Array, "B G S"] | None,
    chosen: Int[Array, "B G W Q"] | None,
) -> tuple[Bool[Array, "B G N M"], Bool[Array, "B G N M"]]:
    """Of N blocks of query rows and M blocks of keys: whether some row may see some key, and whether all see all."""
    if last is None:
        start = jnp.arange(0, first.shape[2], BLOCK, dtype=jnp.int32)[:, None]
        t0, t1 = start // choice.per, (start + BLOCK - 1) // choice.per
    else:
        t0, t1 = _ends(last)
    low, high = _ends(first)
    a0, a1 = _range(jnp.arange(keys, dtype=jnp.int32)[None, None] if at is None else at)
    some, all_ = (a0 <= t1) & (a1 >= low), (a1 <= t0) & (a0 >= high)
    if end is not None:
        e0, e1 = _range(end)
        some, all_ = some & (e1 >= t0), all_ & (e0 >= t1)
    if chosen is not None:
        some, all_ = some & _chosen_tables(choice, chosen, keys // BLOCK), jnp.zeros_like(all_)
    some, all_ = jnp.broadcast_arrays(some, all_)
    return some, all_


def _ends(x: Array) -> tuple[Array, Array]:
    """Of each block of rows, [B,F,N,1], of what never decreases."""
    x = x.reshape(*x.shape[:2], -1, 1, BLOCK)
    return x[..., 0], x[..., -1]


def _range(x: Array) -> tuple[Array, Array]:
    """Least and greatest of each block of keys, [B,G,1,M]."""
    x = x.reshape(*x.shape[:2], 1, -1, BLOCK)
    return x.min(-1), x.max(-1)


def _chosen_tables(choice: Choice, chosen: Array, M: int) -> Array:
    """[B,G,N,M]: whether some row of a block chose some of the keys."""
    B, G, W, Q = chosen.shape
    union = jax.lax.reduce(chosen.reshape(B, G, W, -1, BLOCK), jnp.int32(0), jax.lax.bitwise_or, (4,))
    bits = (jnp.swapaxes(union, 2, 3)[..., None] >> jnp.arange(WORD, dtype=jnp.int32)) & 1
    bits = bits.reshape(B, G, Q // BLOCK, W * WORD) == 1
    if choice.size < BLOCK:
        bits = bits.reshape(*bits.shape[:3], -1, BLOCK // choice.size).any(-1)
    return jnp.repeat(bits, max(1, choice.size // BLOCK), axis=-1)[..., :M]


def listed(some: Array, all_: Array) -> tuple[Int[Array, "B G N M"], Int[Array, "B G N"]]:
    """The live blocks of the last axis, as their number times 2, plus 1 where a mask is needed; and how many."""
    code = 2 * jnp.arange(some.shape[-1], dtype=jnp.int32) + ~all_
    return jnp.sort(jnp.where(some, code, FOREVER), axis=-1), some.sum(-1, dtype=jnp.int32)
