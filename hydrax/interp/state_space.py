"""A layer as a linear system that varies with time (arXiv 2405.15731): what its tokens do to a state.

    S_t = A_t S_{t-1} + B_t

Tokens, and what else there is in the state, fix A_t and B_t; `mixers.Row.linear` names what of a mixer's state evolves
so, and `Row.transition` what A_t looks like: the identity, a number per head, a diagonal, or a matrix. A serial mixer
(lstm) has no such part. What is read of the values through the states is in `interp.effective_attention`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hydrax.core.typing import Array, Bool, Float, PyTree
from hydrax.mixers import Context, Mixer
from hydrax.ops import documents

LARGEST = 2**26
"""Numbers in all A_t at most."""


@dataclasses.dataclass(frozen=True)
class System:
    """The n numbers of a part of the state, the leaves of each row of the batch one after the other.

    Attributes:
      A: [B,T,n,n], 0 where a document starts, the identity at padding.
      B: [B,T,n].
      S: [B,T,n], the state after each token.
    """

    A: Float[Array, "B T n n"]
    B: Float[Array, "B T n"]
    S: Float[Array, "B T n"]


def as_ltv(mixer: Mixer, part: str, x: Float[Array, "B T D"], ctx: Context, state: PyTree | None = None) -> System:
    """The system of that part of the state, for rows that start from `state` (nothing, if None).

    The layer itself takes one step per token. Where the update is linear its derivative is A_t, whatever the state; of
    another part it is the derivative along the row.

    Raises:
      ValueError: no such part, or too many numbers for matrices.
    """
    B, T = x.shape[:2]
    state = mixer.init_state(B, T, x.dtype) if state is None else state
    n = flat(state, part).shape[1]
    if B * T * n * n > LARGEST:
        raise ValueError(f"as_ltv: {B} rows, {T} tokens, {n} numbers: expected at most {LARGEST} in all matrices")

    def token(state: PyTree, facts: dict[str, Array]) -> tuple[PyTree, tuple[Array, ...]]:
        f = update(mixer, part, ctx, state, facts)
        S, push = jax.linearize(f, flat(state, part))
        columns = jax.vmap(push)(jnp.broadcast_to(jnp.eye(n, dtype=S.dtype)[:, None], (n, B, n)))
        return _step(mixer, ctx, state, facts), (jnp.moveaxis(columns, 0, -1), f(jnp.zeros_like(S)), S)

    found = jax.lax.scan(token, state, by_token(x, ctx))[1]
    return System(*(jnp.moveaxis(a, 0, 1) for a in found))


def update(mixer: Mixer, part: str, ctx: Context, state: PyTree, facts: dict[str, Array]) -> Callable[[Array], Array]:
    """S_{t-1} [B,n] -> S_t, for one of `by_token` and the rest of the state as it is there."""

    def f(S: Array) -> Array:
        return flat(_step(mixer, ctx, replaced(state, part, S), facts), part)

    return f


def by_token(x: Array, ctx: Context) -> dict[str, Array]:
    """What a call knows of each token, tokens first: x, and the facts of the context."""
    facts = {"x": x, "positions": ctx.positions, "starts": _starts(ctx)}
    more = {name: getattr(ctx, name) for name in ("segment_ids", "embeddings", "residual", "modes")}
    facts |= {name: a for name, a in more.items() if a is not None}
    return {name: jnp.moveaxis(a, 1, 0) for name, a in facts.items()}


def flat(state: PyTree, part: str) -> Float[Array, "B n"]:
    """The leaves of that part side by side.

    Raises:
      ValueError: no such part.
    """
    leaves = jax.tree.leaves(_part(state, part))
    return jnp.concatenate([a.reshape(a.shape[0], -1) for a in leaves], axis=1)


def _step(mixer: Mixer, ctx: Context, state: PyTree, facts: dict[str, Array]) -> PyTree:
    """The state after one token."""
    now: dict[str, Any] = {name: a if name == "starts" else a[:, None] for name, a in facts.items()}
    new = mixer(now.pop("x"), dataclasses.replace(ctx, **now), state)[1]
    return jax.tree.map(lambda a, old: a.astype(old.dtype), new, state)


def _starts(ctx: Context) -> Bool[Array, "B T"]:
    """Tokens that begin a document of their own; token 0 as the context says."""
    first = jnp.zeros_like(ctx.positions[:, 0], bool) if ctx.starts is None else ctx.starts
    if ctx.segment_ids is None:
        return jnp.zeros_like(ctx.positions, bool).at[:, 0].set(first)
    changed = documents.changes(ctx.segment_ids) & (ctx.segment_ids != 0)
    return changed.at[:, 0].set(first)


def _part(state: PyTree, part: str) -> PyTree:
    for name in part.split("/"):
        if not isinstance(state, dict) or name not in state:
            raise ValueError(f"as_ltv: no part {part!r} in a state of {', '.join(state) or 'nothing'}")
        state = state[name]
    return state


def replaced(state: Any, part: str, S: Float[Array, "B n"]) -> Any:
    """The state with S in the place of that part."""
    name, _, rest = part.partition("/")
    if rest:
        return {**state, name: replaced(state[name], rest, S)}
    leaves, structure = jax.tree.flatten(state[name])
    ends = [sum(a[0].size for a in leaves[: i + 1]) for i in range(len(leaves))]
    pieces = jnp.split(S, ends[:-1], axis=1)
    new = [piece.reshape(a.shape).astype(a.dtype) for piece, a in zip(pieces, leaves, strict=True)]
    return {**state, name: jax.tree.unflatten(structure, new)}
