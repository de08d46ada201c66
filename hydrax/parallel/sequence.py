"""The ops that look along a row, for rows whose tokens may be divided over the mesh axis `context`.

Mixers call these with the facts of `Shards`. Without them an op is that of `hydrax.ops`; with them it runs inside a
`jax.shard_map` over the whole mesh, each device doing its rows, tokens and heads. Arguments, results and errors are
those of the op: mixers see whole rows, their tokens in the order of `Shards.layout`, and all that they do token by
token is left to the compiler.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from hydrax.core import tree
from hydrax.core.build import ConfigError
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, PyTree
from hydrax.ops import conv, delta, ema, linear, lstm as cells, scan, slots, softmax, sparse
from hydrax.ops.slots import working_memory as memory
from hydrax.ops.softmax import relative
from hydrax.parallel import halo, layout, ring, rules, state_scan
from hydrax.parallel.exchange import exchange
from hydrax.parallel.shards import AXIS, NEEDS, Shards, restore, strategy


@dataclasses.dataclass(frozen=True)
class Op:
    """An op of rows: (*x, initial_state, segment_ids) -> (y, final state).

    Attributes:
      run: the op.
      transition: how its states compose, a key of `STRATEGIES`.
      x, state: what the dimensions of inputs and state are: b rows, t tokens, h heads, others are not divided. An
        input of one dimension is "h".
      summarize: (*x, segment_ids) -> (M, U), see `state_scan`.
      in_order: it needs all keys in the order of the row, with these facts of theirs, which follow queries, keys and
        values in x.
    """

    run: Callable
    transition: str
    x: tuple[str, ...]
    state: str = "bh"
    summarize: Callable | None = None
    in_order: tuple[str, ...] = ()


def _summarize_sums(logits: Array, *, segment_ids: Array | None) -> tuple[Array, Array]:
    new = jnp.exp(fp32(logits))
    return scan.summarize_linear(jnp.ones_like(new), new, segment_ids=segment_ids)


def _writes(summarize: Callable) -> Callable:
    """`summarize` of all inputs but the queries, which come first."""
    return lambda _, *x, **facts: summarize(*x, **facts)


OF_TOKENS = {"sinks": "h", "positions": "bt", "ends": "bth", "key_bias": "bth"}
"""What else softmax attention takes of heads and tokens, beside q, k and v."""


def _attention(q: Array, k: Array, v: Array, *facts: Array | None, initial_state: None, **options: Any) -> tuple:
    options |= dict(zip(OF_TOKENS, facts, strict=True))
    return softmax.attention(q, k, v, **options), None


def _of_keys(f: Callable, *names: str) -> Callable:
    """An op over chosen keys, as an op of rows: its facts of these names follow queries, keys and values."""

    def run(q: Array, k: Array, v: Array, *x: Array, initial_state: None, **options: Any) -> tuple:
        facts = dict(zip(names, x, strict=False))
        return f(q, k, v, *x[len(names) :], **facts, **options), None

    return run


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
    "lstm": Op(cells.lstm, "nonlinear", ("bth", "h")),
    "moving_average": Op(
        ema.ema,
        "diag",
        ("bth", *("h",) * 4),
        summarize=lambda x, g, write, read, angle, **facts: ema.summarize(x, g, write, angle, **facts),
    ),
    "slot_attention": Op(slots.slot_attention, "diag", ("bth",) * 5, summarize=_writes(slots.summarize)),
    "softmax_decay": Op(slots.softmax_decay, "diag", ("bth",), summarize=_summarize_sums),
    "slot_softmax": Op(slots.slot_softmax, "stabilised", ("bth",) * 3),
    "working_memory": Op(memory.working_memory, "stabilised", ("bth", "bth", "bth", "bt")),
    "short_conv": Op(conv.short_conv, "taps", ("bth", "_h", "h"), state="b_h"),
    "attention": Op(_attention, "lse", (*("bth",) * 3, *OF_TOKENS.values()), state=""),
    "window_attention": Op(_attention, "window", (*("bth",) * 3, *OF_TOKENS.values()), state=""),
    "relative_attention": Op(
        _of_keys(relative.relative_attention, "positions"),
        "groups",
        ("bth", "bth", "bth", "bt", "h"),
        state="",
        in_order=("positions",),
    ),
    "chunk_attention": Op(
        _of_keys(sparse.chunk_attention, "positions"),
        "groups",
        ("bth", "bth", "bth", "bt", "bth"),
        state="",
        in_order=("positions",),
    ),
    "landmark_attention": Op(
        _of_keys(sparse.landmark_attention, "positions"),
        "groups",
        ("bth", "bth", "bth", "bt"),
        state="",
        in_order=("positions",),
    ),
    "permuted_window": Op(
        _of_keys(sparse.permuted_window, "positions", "ranks"),
        "groups",
        ("bth", "bth", "bth", "bt", "bt"),
        state="",
        in_order=("positions", "ranks"),
    ),
    "clustered_window": Op(
        _of_keys(sparse.clustered_window, "clusters", "ranks"),
        "groups",
        ("bth",) * 7,
        state="",
        in_order=("clusters", "ranks"),
    ),
}

MANY_SHARDS, WIDE_KEYS = 8, 1024
"""Keys of more shards, with more numbers per token, are served as those of a window: by a ring, if none is wanted."""


class Rows(NamedTuple):
    """What one device knows beside the inputs of an op: the state before its rows, their documents, facts of `Shards`.

    Attributes:
      joined, ends: [B,N], of the N slots of each row that are here.
    """

    state: PyTree
    segment_ids: Array | None
    joined: Array
    ends: Array
    layout: str


# What a strategy does on one device: (op, x, rows, options) -> (y, final state).


def _carried_state(carrier: str, op: Op, x: tuple, rows: Rows, how: Mapping[str, Any]) -> tuple[Array, PyTree]:
    def run(x: tuple, state: PyTree, ids: Array | None) -> tuple[Array, PyTree]:
        return op.run(*x, initial_state=state, segment_ids=ids, **how)

    def summarize(x: tuple, ids: Array | None) -> tuple[Array, PyTree]:
        assert op.summarize is not None
        return op.summarize(*x, segment_ids=ids)

    cut = tuple(layout.cut(a, rows.layout) if "t" in _letters(op, i, a) else a for i, a in enumerate(x))
    ids, joined = layout.cut(rows.segment_ids, rows.layout), rows.joined.reshape(-1)
    chain = state_scan.Chain(AXIS, op.transition, rows.layout, carrier)
    y, end = state_scan.run(chain, run, summarize, cut, rows.state, ids, joined)
    return layout.join(y, rows.layout), state_scan.last(end, rows.ends, AXIS)


def _ulysses(op: Op, x: tuple, rows: Rows, how: Mapping[str, Any]) -> tuple[Array, PyTree]:
    kinds = {"bth": "heads", "bt": "rows", "h": "weights"}

    def run(ids: Array | None, state: PyTree, *x: Array) -> tuple[Array, PyTree]:
        return op.run(*x, initial_state=state, segment_ids=ids, **how)

    inputs = ("rows", "state", *(kinds[_letters(op, i, a)] for i, a in enumerate(x)))
    outputs = ("heads", "state")
    y, end = exchange(run, axis=AXIS, inputs=inputs, outputs=outputs)(rows.segment_ids, rows.state, *x)
    return y, end


def _halo(op: Op, x: tuple, rows: Rows, how: Mapping[str, Any]) -> tuple[Array, PyTree]:
    inputs, taps, *others = x
    facts: dict[str, Any] = {"axis": AXIS, "layout": rows.layout, "first": rows.state}
    tail = halo.halo_left(inputs, (taps.shape[0] - 1) * how.get("dilation", 1), rows.segment_ids, **facts)
    inputs, ids = layout.cut((inputs, rows.segment_ids), rows.layout)
    y, end = op.run(inputs, taps, *others, initial_state=tail, segment_ids=ids, **how)
    return layout.join(y, rows.layout), state_scan.last(end, rows.ends, AXIS)


def _over_keys(f: Callable, op: Op, x: tuple, rows: Rows, how: Mapping[str, Any]) -> tuple[Array, PyTree]:
    q, k, v, *own = x
    facts = {"axis": AXIS, "layout": rows.layout, "segment_ids": rows.segment_ids}
    return f(q, k, v, **dict(zip(OF_TOKENS, own, strict=True)), **facts, **how), None


def _allgather_kv(op: Op, x: tuple, rows: Rows, how: Mapping[str, Any]) -> tuple[Array, PyTree]:
    if not op.in_order:
        return _over_keys(ring.allgather_kv, op, x, rows, how)
    ids = jnp.ones(x[0].shape[:2], jnp.int32) if rows.segment_ids is None else rows.segment_ids
    (q, k, v, *own), ids = tree.alike((x, ids))
    k, v, ids_of_keys, *of_keys = (ring.whole(a, AXIS, rows.layout) for a in (k, v, ids, *own[: len(op.in_order)]))
    facts = {f"kv_{name}": a for name, a in zip(op.in_order, of_keys, strict=True)}
    facts |= {"segment_ids": ids, "kv_segment_ids": ids_of_keys}
    return op.run(q, k, v, *own, initial_state=None, **facts, **how)


def _ring(*args: Any, **how: Any) -> Array:
    return ring.ring_attention(*args, **{name: value for name, value in how.items() if name != "impl"})


LOCAL: dict[str, Callable] = {
    **{name: functools.partial(_carried_state, name) for name in state_scan.CARRIERS},
    "ulysses": _ulysses,
    "halo": _halo,
    "allgather_kv": _allgather_kv,
    "ring": functools.partial(_over_keys, _ring),
}


def over_all_keys(f: Callable[[PyTree, PyTree], PyTree], rows: PyTree, keys: PyTree, shards: Shards | None) -> PyTree:
    """f(rows, keys), of arrays [B,T,...] and [B,S,...]: every device does its rows, and has the keys of the whole row.

    `keys` reach f in the order of the row, whatever the layout. Both must hold all arrays that f reads.
    """
    if shards is None:
        return f(rows, keys)
    strategy("chosen keys", "chosen", shards.wanted, shards.layout)
    keys = jax.tree.map(lambda a: restore(a, shards.layout), keys)
    arrays = [(a, "bt") for a in jax.tree.leaves((rows, keys))]
    on = _axes(jax.sharding.get_abstract_mesh(), _sizes(arrays))
    by_rows = PartitionSpec(on.get("b"), AXIS)

    def local(rows: PyTree, keys: PyTree) -> PyTree:
        return f(*tree.alike((rows, keys)))

    return jax.shard_map(local, in_specs=(by_rows, PartitionSpec(on.get("b"))), out_specs=by_rows)(rows, keys)


def _letters(op: Op, i: int, x: Array | None) -> str:
    return "h" if x is not None and x.ndim == 1 else op.x[i]


def _run(
    name: str,
    x: tuple,
    *,
    shards: Shards | None = None,
    initial_state: PyTree = None,
    segment_ids: Array | None = None,
    **how: Any,
) -> tuple[Any, Any]:
    """An op of whole rows, on the devices that share them."""
    op = OPS[name]
    if shards is None:
        return op.run(*x, initial_state=initial_state, segment_ids=segment_ids, **how)
    mesh, letters = jax.sharding.get_abstract_mesh(), [_letters(op, i, a) for i, a in enumerate(x)]
    sizes = _sizes([(a, w) for a, w in zip((*x, initial_state), (*letters, op.state), strict=True)])
    on = _axes(mesh, sizes)
    chosen = strategy(name, op.transition, shards.wanted, shards.layout)
    heads = [n // (mesh.shape["tensor"] if "h" in on else 1) for n in sizes["h"]]
    if NEEDS[chosen].heads and any(n % mesh.shape[AXIS] for n in heads):
        allowed = f"{name} has {min(heads)} heads per device: expected a multiple of mesh.context = {mesh.shape[AXIS]}"
        raise ConfigError("mesh.strategy", chosen, allowed)

    def spec(letters: str) -> PartitionSpec:
        return PartitionSpec(*(on.get(letter) for letter in letters))

    def local(x: tuple, state: PyTree, ids: Array | None, joined: Array, ends: Array) -> tuple[Array, PyTree]:
        return LOCAL[chosen](op, x, Rows(state, ids, joined, ends, shards.layout), how)

    rows = spec("bt")
    return jax.shard_map(
        local,
        in_specs=(tuple(map(spec, letters)), spec(op.state), rows, rows, rows),
        out_specs=(spec("bth"), spec(op.state)),
    )(x, initial_state, segment_ids, shards.joined, shards.ends)


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


# Arguments, results and errors are those of the ops of these names; `facts` are `shards` and what an op takes by name.


def linear_attention(q: Array, k: Array, v: Array, log_decay: Array | None = None, **facts: Any) -> tuple[Array, Array]:
    """`ops.linear.linear_attention`."""
    return _run("linear_attention", (q, k, v, log_decay), **facts)


def delta_rule(
    q: Array, k: Array, v: Array, beta: Array, log_decay: Array | None = None, **facts: Any
) -> tuple[Array, Array]:
    """`ops.delta.delta_rule`."""
    return _run("delta_rule", (q, k, v, beta, log_decay), **facts)


def linear_scan(a: Array, b: Array, **facts: Any) -> tuple[Array, Array]:
    """`ops.scan.linear_scan`."""
    return _run("linear_scan", (a, b), **facts)


def selective_scan(x: Array, dt: Array, A: Array, b: Array, c: Array, **facts: Any) -> tuple[Array, Array]:
    """`ops.scan.selective_scan`."""
    return _run("selective_scan", (x, dt, A, b, c), **facts)


def lstm(x: Array, w: Array, **facts: Any) -> tuple[Array, tuple[Array, Array]]:
    """`ops.lstm.lstm`."""
    return _run("lstm", (x, w), **facts)


def moving_average(
    x: Array, log_decay: Array, write: Array, read: Array, angle: Array | None = None, **facts: Any
) -> tuple[Array, Array]:
    """`ops.ema.ema`."""
    return _run("moving_average", (x, log_decay, write, read, angle), **facts)


def slot_attention(
    q: Array, k: Array, v: Array, write: Array, log_decay: Array, **facts: Any
) -> tuple[Array, tuple[Array, Array]]:
    """`ops.slots.slot_attention`."""
    return _run("slot_attention", (q, k, v, write, log_decay), **facts)


def softmax_decay(logits: Array, **facts: Any) -> tuple[Array, Array]:
    """`ops.slots.softmax_decay`."""
    return _run("softmax_decay", (logits,), **facts)


def slot_softmax(q: Array, scores: Array, v: Array, **facts: Any) -> tuple[Array, tuple[Array, Array, Array]]:
    """`ops.slots.slot_softmax`."""
    return _run("slot_softmax", (q, scores, v), **facts)


def working_memory(q: Array, k: Array, v: Array, positions: Array, **facts: Any) -> tuple[Array, tuple[Array, Array]]:
    """`ops.slots.working_memory.working_memory`."""
    return _run("working_memory", (q, k, v, positions), **facts)


def short_conv(x: Array, w: Array, b: Array | None = None, **facts: Any) -> tuple[Array, Array]:
    """`ops.conv.short_conv`."""
    return _run("short_conv", (x, w, b), **facts)


def self_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    sinks: Array | None = None,
    positions: Array | None = None,
    ends: Array | None = None,
    key_bias: Array | None = None,
    **facts: Any,
) -> Any:
    """`ops.softmax.attention` of rows to themselves; `positions` are those in the documents."""
    shards = facts.get("shards")
    ends, key_bias = (x if x is None else jnp.broadcast_to(x, k.shape[:3]) for x in (ends, key_bias))
    many = shards is not None and shards.number > MANY_SHARDS and math.prod(k.shape[2:]) > WIDE_KEYS
    name = "window_attention" if many or facts.get("window") is not None else "attention"
    if ends is None and (shards is None or not facts.get("sink_tokens")):
        positions = None  # the op finds those in the row, which give the same distances
    return _run(name, (q, k, v, sinks, positions, ends, key_bias), **facts)[0]


def relative_attention(
    q: Array, k: Array, v: Array, table: Array | None = None, *, positions: Array, **facts: Any
) -> Array:
    """`ops.softmax.relative.relative_attention`."""
    return _run("relative_attention", (q, k, v, positions, table), **facts)[0]


def chunk_attention(q: Array, k: Array, v: Array, gate: Array, *, positions: Array, **facts: Any) -> Array:
    """`ops.sparse.chunk_attention`."""
    return _run("chunk_attention", (q, k, v, positions, gate), **facts)[0]


def landmark_attention(q: Array, k: Array, v: Array, *, positions: Array, **facts: Any) -> Array:
    """`ops.sparse.landmark_attention`."""
    return _run("landmark_attention", (q, k, v, positions), **facts)[0]


def permuted_window(q: Array, k: Array, v: Array, *, positions: Array, ranks: Array, **facts: Any) -> Array:
    """`ops.sparse.permuted_window`."""
    return _run("permuted_window", (q, k, v, positions, ranks), **facts)[0]


def clustered_window(
    q: Array,
    k: Array,
    v: Array,
    asked: Array | None = None,
    asked_ranks: Array | None = None,
    *,
    clusters: Array,
    ranks: Array,
    **facts: Any,
) -> Array:
    """`ops.sparse.clustered_window`."""
    return _run("clustered_window", (q, k, v, clusters, ranks, asked, asked_ranks), **facts)[0]
