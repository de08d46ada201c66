"""The ops that look along a row, for rows whose tokens may be divided over the mesh axis `context`.

Mixers call these with the facts of `Shards`. Without them an op is that of `hydrax.ops`; with them it runs inside a
`jax.shard_map` over the whole mesh, each device doing its rows, tokens and heads. Arguments, results and errors are
those of the op: mixers see whole rows, and all that they do token by token is left to the compiler.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from hydrax.core.build import ConfigError
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Bool, PyTree
from hydrax.ops import conv, delta, linear, scan, slots, softmax
from hydrax.parallel import halo, ring, rules, state_scan
from hydrax.parallel.exchange import exchange

AXIS = "context"

_STATE, _HEADS = ("allgather_state", "ulysses"), ("ulysses",)
STRATEGIES: dict[str, tuple[str, ...]] = {
    "none": _STATE,
    "scalar": _STATE,
    "diag": _STATE,
    "full": _STATE,
    "lse": ("allgather_kv", "ring", "ulysses"),
    "stabilised": _HEADS,
    "nonlinear": _HEADS,
    "taps": ("halo",),
}
"""How states of token ranges compose (`mixers.Row.transition`) -> what serves divided rows, the default first.

allgather_state (LASP-2, arXiv 2502.07563), allgather_kv (LASP-2H), ring (2310.01889), ulysses (2309.14509); halo serves
short convolutions, beside all of these."""


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


@dataclasses.dataclass(frozen=True)
class Op:
    """An op of rows: (*x, initial_state, segment_ids) -> (y, final state).

    Attributes:
      run: the op.
      transition: how its states compose, a key of `STRATEGIES`.
      x, state: what the dimensions of inputs and state are: b rows, t tokens, h heads, others are not divided. An
        input of one dimension is "h".
      summarize: (*x, segment_ids) -> (M, U), see `state_scan`.
    """

    run: Callable
    transition: str
    x: tuple[str, ...]
    state: str = "bh"
    summarize: Callable | None = None


def _summarize_sums(logits: Array, *, segment_ids: Array | None) -> tuple[Array, Array]:
    new = jnp.exp(fp32(logits))
    return scan.summarize_linear(jnp.ones_like(new), new, segment_ids=segment_ids)


def _writes(summarize: Callable) -> Callable:
    """`summarize` of all inputs but the queries, which come first."""
    return lambda _, *x, **facts: summarize(*x, **facts)


def _attention(
    q: Array, k: Array, v: Array, sinks: Array | None, positions: Array | None, *, initial_state: None, **options: Any
) -> tuple[Array, None]:
    return softmax.attention(q, k, v, sinks=sinks, positions=positions, **options), None


OPS = {
    "linear_attention": Op(linear.linear_attention, "diag", ("bth",) * 4, summarize=_writes(linear.summarize)),
    "delta_rule": Op(delta.delta_rule, "full", ("bth",) * 5, summarize=_writes(delta.summarize)),
    "linear_scan": Op(scan.linear_scan, "diag", ("bth",) * 2, summarize=scan.summarize_linear),
    "selective_scan": Op(
        scan.selective_scan,
        "diag",
        ("bth", "bth", "h", "bt", "bt"),
        summarize=lambda x, dt, A, b, c, **facts: scan.summarize_selective(x, dt, A, b, **facts),
    ),
    "slot_attention": Op(slots.slot_attention, "diag", ("bth",) * 5, summarize=_writes(slots.summarize)),
    "softmax_decay": Op(slots.softmax_decay, "diag", ("bth",), summarize=_summarize_sums),
    "slot_softmax": Op(slots.slot_softmax, "stabilised", ("bth",) * 3),
    "short_conv": Op(conv.short_conv, "taps", ("bth", "_h", "h"), state="b_h"),
    "attention": Op(_attention, "lse", ("bth", "bth", "bth", "h", "bt"), state=""),
}

# What a strategy does on one device: (op, x, state, segment_ids, joined, ends, options) -> (y, final state).


def _allgather_state(
    op: Op, x: tuple, state: PyTree, ids: Array | None, joined: Array, ends: Array, how: Mapping[str, Any]
) -> tuple[Array, PyTree]:
    def run(x: tuple, state: PyTree, ids: Array | None) -> tuple[Array, PyTree]:
        return op.run(*x, initial_state=state, segment_ids=ids, **how)

    def summarize(x: tuple, ids: Array | None) -> tuple[Array, PyTree]:
        assert op.summarize is not None
        return op.summarize(*x, segment_ids=ids)

    y, end = state_scan.allgather_state(run, summarize, x, state, ids, joined, transition=op.transition, axis=AXIS)
    return y, state_scan.last(end, ends, AXIS)


def _ulysses(
    op: Op, x: tuple, state: PyTree, ids: Array | None, joined: Array, ends: Array, how: Mapping[str, Any]
) -> tuple[Array, PyTree]:
    kinds = {"bth": "heads", "bt": "rows", "h": "weights"}

    def run(ids: Array | None, state: PyTree, *x: Array) -> tuple[Array, PyTree]:
        return op.run(*x, initial_state=state, segment_ids=ids, **how)

    inputs = ("rows", "state", *(kinds[_letters(op, i, a)] for i, a in enumerate(x)))
    y, end = exchange(run, axis=AXIS, inputs=inputs, outputs=("heads", "state"))(ids, state, *x)
    return y, end


def _halo(
    op: Op, x: tuple, state: PyTree, ids: Array | None, joined: Array, ends: Array, how: Mapping[str, Any]
) -> tuple[Array, PyTree]:
    inputs, taps, *others = x
    tail = halo.halo_left(inputs, taps.shape[0] - 1, ids, axis=AXIS, first=state)
    y, end = op.run(inputs, taps, *others, initial_state=tail, segment_ids=ids, **how)
    return y, state_scan.last(end, ends, AXIS)


def _over_keys(
    f: Callable,
    op: Op,
    x: tuple,
    state: PyTree,
    ids: Array | None,
    joined: Array,
    ends: Array,
    how: Mapping[str, Any],
) -> tuple[Array, PyTree]:
    q, k, v, sinks, positions = x
    return f(q, k, v, axis=AXIS, sinks=sinks, positions=positions, segment_ids=ids, **how), None


def _ring(*args: Any, **how: Any) -> Array:
    return ring.ring_attention(*args, **{name: value for name, value in how.items() if name != "impl"})


LOCAL: dict[str, Callable] = {
    "allgather_state": _allgather_state,
    "ulysses": _ulysses,
    "halo": _halo,
    "allgather_kv": functools.partial(_over_keys, ring.allgather_kv),
    "ring": functools.partial(_over_keys, _ring),
}


def _letters(op: Op, i: int, x: Array | None) -> str:
    return "h" if x is not None and x.ndim == 1 else op.x[i]


def _run(
    name: str, x: tuple, state: PyTree, segment_ids: Array | None, shards: Shards | None, how: Mapping[str, Any]
) -> tuple[Array, PyTree]:
    """An op of whole rows, on the devices that share them."""
    op = OPS[name]
    if shards is None:
        return op.run(*x, initial_state=state, segment_ids=segment_ids, **how)
    mesh, letters = jax.sharding.get_abstract_mesh(), [_letters(op, i, a) for i, a in enumerate(x)]
    sizes = _sizes([(a, w) for a, w in zip((*x, state), (*letters, op.state), strict=True)])
    on = _axes(mesh, sizes)
    chosen = strategy(op.transition, shards.wanted)
    heads = [n // (mesh.shape["tensor"] if "h" in on else 1) for n in sizes["h"]]
    if chosen == "ulysses" and any(n % mesh.shape[AXIS] for n in heads):
        allowed = f"{name} has {min(heads)} heads per device: expected a multiple of mesh.context = {mesh.shape[AXIS]}"
        raise ConfigError("mesh.strategy", chosen, allowed)

    def spec(letters: str) -> PartitionSpec:
        return PartitionSpec(*(on.get(letter) for letter in letters))

    def local(x: tuple, state: PyTree, ids: Array | None, joined: Array, ends: Array) -> tuple[Array, PyTree]:
        return LOCAL[chosen](op, x, state, ids, joined[:, 0], ends[:, 0], how)

    rows = spec("bt")
    return jax.shard_map(
        local,
        in_specs=(tuple(map(spec, letters)), spec(op.state), rows, rows, rows),
        out_specs=(spec("bth"), spec(op.state)),
    )(x, state, segment_ids, shards.joined, shards.ends)


def _sizes(arrays: Sequence[tuple[PyTree, str]]) -> dict[str, set[int]]:
    """The lengths of all dimensions with the same letter."""
    sizes: dict[str, set[int]] = {letter: set() for letter in "bth_"}
    for array, letters in arrays:
        for leaf in jax.tree.leaves(array):
            for letter, size in zip(letters, leaf.shape, strict=False):
                sizes[letter].add(size)
    return sizes


def _axes(mesh: AbstractMesh, sizes: Mapping[str, set[int]]) -> dict[str, tuple[str, ...]]:
    """Which mesh axes divide rows, tokens and heads: those that divide them evenly in all arrays."""
    axes = {"b": dict(rules.RULES)["batch"], "t": (AXIS,), "h": ("tensor",)}
    axes = {c: tuple(a for a in on if mesh.shape.get(a, 1) > 1) for c, on in axes.items()}
    parts = {c: math.prod(mesh.shape[a] for a in on) for c, on in axes.items()}
    return {c: on for c, on in axes.items() if on and all(size % parts[c] == 0 for size in sizes[c])}


Facts = Any
"""`initial_state`, `segment_ids` and what else the op takes by name."""


def _op(name: str, x: tuple, shards: Shards | None, how: dict[str, Any]) -> tuple[Array, PyTree]:
    return _run(name, x, how.pop("initial_state", None), how.pop("segment_ids", None), shards, how)


def linear_attention(
    q: Array, k: Array, v: Array, log_decay: Array | None = None, *, shards: Shards | None, **facts: Facts
) -> tuple[Array, Array]:
    """`ops.linear.linear_attention`."""
    return _op("linear_attention", (q, k, v, log_decay), shards, facts)


def delta_rule(
    q: Array, k: Array, v: Array, beta: Array, log_decay: Array | None = None, *, shards: Shards | None, **facts: Facts
) -> tuple[Array, Array]:
    """`ops.delta.delta_rule`."""
    return _op("delta_rule", (q, k, v, beta, log_decay), shards, facts)


def linear_scan(a: Array, b: Array, *, shards: Shards | None, **facts: Facts) -> tuple[Array, Array]:
    """`ops.scan.linear_scan`."""
    return _op("linear_scan", (a, b), shards, facts)


def selective_scan(
    x: Array, dt: Array, A: Array, b: Array, c: Array, *, shards: Shards | None, **facts: Facts
) -> tuple[Array, Array]:
    """`ops.scan.selective_scan`."""
    return _op("selective_scan", (x, dt, A, b, c), shards, facts)


def slot_attention(
    q: Array, k: Array, v: Array, write: Array, log_decay: Array, *, shards: Shards | None, **facts: Facts
) -> tuple[Array, tuple[Array, Array]]:
    """`ops.slots.slot_attention`."""
    return _op("slot_attention", (q, k, v, write, log_decay), shards, facts)


def softmax_decay(logits: Array, *, shards: Shards | None, **facts: Facts) -> tuple[Array, Array]:
    """`ops.slots.softmax_decay`."""
    return _op("softmax_decay", (logits,), shards, facts)


def slot_softmax(
    q: Array, scores: Array, v: Array, *, shards: Shards | None, **facts: Facts
) -> tuple[Array, tuple[Array, Array, Array]]:
    """`ops.slots.slot_softmax`."""
    return _op("slot_softmax", (q, scores, v), shards, facts)


def short_conv(
    x: Array, w: Array, b: Array | None = None, *, shards: Shards | None, **facts: Facts
) -> tuple[Array, Array]:
    """`ops.conv.short_conv`."""
    return _op("short_conv", (x, w, b), shards, facts)


def self_attention(
    q: Array, k: Array, v: Array, *, shards: Shards | None, sinks: Array | None = None, **facts: Facts
) -> Array:
    """`ops.softmax.attention` of rows to themselves."""
    positions = facts.pop("positions") if facts.get("sink_tokens") else None
    facts.pop("positions", None)
    return _op("attention", (q, k, v, sinks, positions), shards, facts)[0]
