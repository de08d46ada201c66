"""Rows whose tokens are divided over the mesh axis `context`: facts of the shards, and what serves which state."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hydrax.core.typing import Array, Bool

AXIS = "context"

_STATE, _HEADS = ("allgather_state", "ulysses"), ("ulysses",)
STRATEGIES: dict[str, tuple[str, ...]] = {
    "none": _STATE,
    "scalar": _STATE,
    "diag": _STATE,
    "full": _STATE,
    "lse": ("allgather_kv", "ring", "ulysses"),
    "window": ("ring", "allgather_kv", "ulysses"),
    "stabilised": _HEADS,
    "nonlinear": _HEADS,
    "taps": ("halo",),
}
"""How states of token ranges compose (`mixers.Row.transition`) -> what serves divided rows, the default first.

allgather_state (LASP-2, arXiv 2502.07563), allgather_kv (LASP-2H), ring (2310.01889; keys go only as far as a window
reaches), ulysses (2309.14509); halo serves short convolutions, beside all of these."""


def strategies(names: str | None) -> tuple[str, ...]:
    """The strategies of "name, name, ...", in order of preference."""
    return tuple(name.strip() for name in (names or "").split(",") if name.strip())


def strategy(transition: str, wanted: Sequence[str]) -> str:
    """The first wanted strategy that serves such states, else their default."""
    able = STRATEGIES[transition]
    return next((name for name in wanted if name in able), able[0])


@dataclasses.dataclass(frozen=True)
class Shards:
    """Facts of rows whose tokens are divided, in order, over the P devices along `context`.

    Attributes:
      wanted: strategies in order of preference, see `strategy`.
      joined: bool [B,P], token 0 of the shard continues the document before it.
      ends: bool [B,P], the shard has the last real token of the row.
    """

    wanted: tuple[str, ...]
    joined: Bool[Array, "B P"]
    ends: Bool[Array, "B P"]

    @classmethod
    def of(cls, shape: tuple[int, ...], segment_ids: Array | None, wanted: tuple[str, ...] = ()) -> "Shards | None":
        """The facts of rows [B,T] on the mesh of `jax.set_mesh`; None where it does not divide their tokens."""
        mesh, (B, T) = jax.sharding.get_abstract_mesh(), shape
        P = 1 if mesh.empty or mesh.manual_axes else mesh.shape.get(AXIS, 1)
        if P == 1 or T % P:
            return None
        if segment_ids is None:
            segment_ids = jnp.ones((B, T), jnp.int32)
        first, before = segment_ids[:, :: T // P], segment_ids[:, T // P - 1 :: T // P]
        before = jnp.concatenate([first[:, :1], before[:, :-1]], axis=1)
        real = jnp.maximum((first != 0).sum(1, keepdims=True), 1)  # padding is on the right
        return cls(wanted, (first == before) | (first == 0), jnp.arange(1, P + 1) == real)
