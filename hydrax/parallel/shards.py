"""Rows whose tokens are divided over the mesh axis `context`: facts of the shards, and what serves which state."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hydrax.core.build import ConfigError
from hydrax.core.typing import Array, Bool, PyTree
from hydrax.parallel import layout as layouts
from hydrax.parallel.layout import T_

AXIS = "context"

_STATE, _HEADS = ("allgather_state", "ring_state", "ulysses"), ("ulysses",)
STRATEGIES: dict[str, tuple[str, ...]] = {
    "none": _STATE,
    "scalar": _STATE,
    "diag": _STATE,
    "full": _STATE,
    "lse": ("allgather_kv", "ring", "ulysses"),
    "groups": ("allgather_kv", "ulysses"),
    "window": ("ring", "allgather_kv", "ulysses"),
    "chosen": ("allgather_kv",),
    "stabilised": _HEADS,
    "nonlinear": _HEADS,
    "taps": ("halo",),
}
"""How states of token ranges compose (`mixers.Row.transition`) -> what serves divided rows, the default first.

allgather_state (LASP-2, arXiv 2502.07563), ring_state (LASP, 2404.02882), allgather_kv (LASP-2H, 2502.07563), ring
(2310.01889; keys go only as far as a window reaches), ulysses (2309.14509); halo serves short convolutions, beside all
of these."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a strategy serves: layouts of rows, and whether only as many heads as shards, or a multiple."""

    layouts: tuple[str, ...] = ("contiguous", "zigzag")
    heads: bool = False


NEEDS: dict[str, Needs] = {
    "allgather_state": Needs(),
    "ring_state": Needs(),
    "allgather_kv": Needs(),
    "ring": Needs(),
    "ulysses": Needs(layouts=("contiguous",), heads=True),  # the exchange leaves tokens in the order of the shards
    "halo": Needs(),
}


def strategies(names: str | None) -> tuple[str, ...]:
    """The strategies of "name, name, ...", in order of preference."""
    return tuple(name.strip() for name in (names or "").split(",") if name.strip())


def strategy(who: str, transition: str, wanted: Sequence[str], layout: str = "contiguous") -> str:
    """The first wanted strategy that serves such states in that layout; if none is for such states, their default.

    Raises:
      ConfigError: those that serve such states do not serve the layout. `who` has them.
    """
    able = STRATEGIES[transition]
    for names in ([name for name in wanted if name in able], able[:1]):
        for name in names:
            if layout in NEEDS[name].layouts:
                return name
        if names:
            raise ConfigError("mesh.layout", layout, _other_layouts(who, names, able, layout))
    raise AssertionError("every transition has a strategy")


def _other_layouts(who: str, names: Sequence[str], able: Sequence[str], layout: str) -> str:
    others = [name for name in able if layout in NEEDS[name].layouts]
    allowed = " or ".join(dict.fromkeys(layout for name in names for layout in NEEDS[name].layouts))
    instead = f", or mesh.strategy {' or '.join(others)}" if others else ""
    return f"{who} is served by {' or '.join(names)}: expected {allowed}{instead}"


def shards_of(tokens: int, layout: str = "contiguous") -> int:
    """Among how many devices the mesh of `jax.set_mesh` divides rows of so many tokens; 1 where it does not."""
    mesh = jax.sharding.get_abstract_mesh()
    P = 1 if mesh.empty or mesh.manual_axes else mesh.shape.get(AXIS, 1)
    return 1 if tokens % (P * len(layouts.passes(layout))) else P


def place(x: T_, layout: str) -> T_:
    """x [B,T,...] in the order in which the devices of the mesh hold it; x itself where they do not divide it."""
    P = shards_of(x.shape[1], layout)
    return x if P == 1 else layouts.place(x, layout, P)


def restore(x: T_, layout: str) -> T_:
    """The inverse of `place`."""
    P = shards_of(x.shape[1], layout)
    return x if P == 1 else layouts.restore(x, layout, P)


def in_order(f: Callable, shards: "Shards | None", *x: PyTree) -> PyTree:
    """f(*x) of arrays [B,T,...] in the order of the row; its results in that of the devices. For what is small."""
    if shards is None:
        return f(*x)
    y = f(*jax.tree.map(lambda a: restore(a, shards.layout), x))
    return jax.tree.map(lambda a: place(a, shards.layout), y)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("joined", "ends"), meta_fields=("wanted", "layout"))
@dataclasses.dataclass(frozen=True)
class Shards:
    """Facts of rows whose tokens are divided over the P devices along `context`, each of which holds N slots of a row.

    Attributes:
      wanted: strategies in order of preference, see `strategy`.
      joined: bool [B,P·N], token 0 of the slot continues the document before it; slots as the devices hold them.
      ends: bool [B,P·N], the slot has the last real token of the row.
      layout: which slots a device holds, see `layout`.
    """

    wanted: tuple[str, ...]
    joined: Bool[Array, "B S"]
    ends: Bool[Array, "B S"]
    layout: str = "contiguous"

    @property
    def number(self) -> int:
        """P."""
        return self.joined.shape[1] // len(layouts.passes(self.layout))

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        segment_ids: Array | None,
        wanted: tuple[str, ...] = (),
        layout: str = "contiguous",
    ) -> "Shards | None":
        """The facts of rows [B,T] on the mesh of `jax.set_mesh`; None where it does not divide their tokens.

        `segment_ids` are in the order of the row; all that meets the result is in the order of `place`.
        """
        B, T = shape
        P = shards_of(T, layout)
        if P == 1:
            return None
        if segment_ids is None:
            segment_ids = jnp.ones((B, T), jnp.int32)
        slots = P * len(layouts.passes(layout))
        first, before = segment_ids[:, :: T // slots], segment_ids[:, T // slots - 1 :: T // slots]
        before = jnp.concatenate([first[:, :1], before[:, :-1]], axis=1)
        real = jnp.maximum((first != 0).sum(1, keepdims=True), 1)  # padding is on the right
        joined, ends = (first == before) | (first == 0), np.arange(1, slots + 1) == real
        return cls(wanted, layouts.place(joined, layout, P), layouts.place(ends, layout, P), layout)
