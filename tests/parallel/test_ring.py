"""Attention over tokens divided over devices equals attention on one: outputs, log-sum-exp and all gradients."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from hydrax.core.typing import Array
from hydrax.ops.documents import document_positions
from hydrax.ops.softmax import attention, forms
from hydrax.parallel import layout as layouts
from hydrax.parallel.ring import allgather_kv, ring_attention, tree_attention
from tests.parallel.devices import ROWS, count, mesh_of, shapes
from tests.tolerances import TOLERANCE, assert_close, assert_equal

STRATEGIES: dict[str, Callable] = {"allgather_kv": allgather_kv, "ring": ring_attention}
T = 48  # 6 tokens per shard of 8, 3 per slot

IDS = np.ones((2, T), np.int32)
for first, name in (
    (12, 2),
    (13, 5),
    (15, 3),
    (34, 4),
):  # at a shard's edge, of one token, within a shard, over 3 shards
    IDS[0, first:] = name
IDS[1, 7:], IDS[1, 31:] = 9, 0  # the last shards hold nothing but padding


@dataclasses.dataclass(frozen=True)
class Case:
    H: int = 4
    Hk: int = 2
    K: int = 8
    V: int = 8
    documents: bool = False
    positions: bool = False
    sinks: bool = False
    lifetimes: bool = False  # ends of keys and a bias of them
    options: tuple = ()


CASES = {
    "causal": Case(),
    "documents": Case(V=4, documents=True),
    # the first token of a shard of 8 sees one token of the second shard before it
    "window": Case(H=2, Hk=2, options=(("window", 8), ("chunk_size", 2))),
    "wide_window": Case(H=2, Hk=1, documents=True, options=(("window", 15), ("scale", 0.7))),
    "sink_tokens": Case(documents=True, positions=True, options=(("window", 4), ("sink_tokens", 2))),
    "sinks_softcap": Case(documents=True, sinks=True, options=(("window", 9), ("softcap", 2.0))),
    "lifetimes": Case(documents=True, positions=True, lifetimes=True, options=(("dilation", 2),)),
    "window_lifetimes": Case(lifetimes=True, options=(("window", 9), ("chunk_size", 2))),
}


def problem(case: Case, dtype: jnp.dtype = jnp.float32) -> tuple[dict[str, Array], dict[str, Array], tuple]:
    """Differentiable inputs, integer ones, and cotangents of output and log-sum-exp."""
    normal = np.random.default_rng(0).normal
    x = {
        "q": 2 * normal(size=(2, T, case.H, case.K)),
        "k": normal(size=(2, T, case.Hk, case.K)),
        "v": normal(size=(2, T, case.Hk, case.V)),
    }
    x = {name: jnp.asarray(a, dtype) for name, a in x.items()}
    if case.sinks:
        x["sinks"] = jnp.asarray(normal(size=case.H), jnp.float32)
    facts = {"segment_ids": jnp.asarray(IDS)} if case.documents else {}
    if case.positions:
        facts["positions"] = document_positions(facts["segment_ids"])
    if case.lifetimes:
        x["key_bias"] = jnp.asarray(normal(size=(2, T, case.Hk)), jnp.float32)
        facts["ends"] = jnp.asarray(np.random.default_rng(1).integers(-1, T, size=(2, T, case.Hk)), jnp.int32)
    do, dlse = normal(size=(2, T, case.H, case.V)), normal(size=(2, T, case.H))
    return x, facts, (jnp.asarray(do, dtype), jnp.asarray(dlse, jnp.float32))


def evaluate(f: Callable, x: dict, facts: dict, cotangents: tuple) -> dict[str, Array]:
    """o, lse and the gradients of f."""
    (o, lse), pullback = jax.vjp(lambda x: f(**x, **facts, return_lse=True), x)
    seen = lse > -jnp.inf
    gradients = pullback((cotangents[0], jnp.where(seen, cotangents[1], 0)))[0]
    return {"o": o, "lse": jnp.where(seen, lse, 0), "seen": seen} | {f"d{name}": g for name, g in gradients.items()}


def spec(name: str) -> PartitionSpec:
    return PartitionSpec() if name.endswith("sinks") else ROWS


def divided(f: Callable, layout: str, shards: int, x: dict, facts: dict, cotangents: tuple) -> dict[str, Array]:
    """`evaluate` with tokens over `shards` devices; results in the order of the row."""
    inputs = ({n: a if n == "sinks" else layouts.place(a, layout, shards) for n, a in x.items()},)
    inputs += tuple(jax.tree.map(lambda a: layouts.place(a, layout, shards), (facts, cotangents)))
    f = functools.partial(f, axis="context", layout=layout)
    run = jax.shard_map(
        functools.partial(evaluate, f),
        mesh=mesh_of(shards),
        in_specs=({n: spec(n) for n in x}, {n: spec(n) for n in facts}, (ROWS, ROWS)),
        out_specs={n: spec(n) for n in ("o", "lse", "seen", *(f"d{n}" for n in x))},
    )
    return {n: a if n == "dsinks" else layouts.restore(a, layout, shards) for n, a in jax.jit(run)(*inputs).items()}


@functools.cache
def expected(name: str) -> dict[str, Array]:
    f = functools.partial(attention, **dict(CASES[name].options))
    return jax.jit(functools.partial(evaluate, f))(*problem(CASES[name]))


def check(strategy: str, layout: str, shards: int, name: str) -> None:
    f = functools.partial(STRATEGIES[strategy], **dict(CASES[name].options))
    actual, want = divided(f, layout, shards, *problem(CASES[name])), expected(name)
    assert_equal("rows that see a key", actual.pop("seen"), want["seen"])
    for what, x in actual.items():
        assert_close(what, x, want[what], TOLERANCE["fp32_op"])


@pytest.mark.parametrize(
    ("strategy", "layout", "shards", "name"),
    [
        ("ring", "contiguous", 8, "documents"),
        ("ring", "contiguous", 8, "window"),
        ("ring", "zigzag", 4, "sink_tokens"),
        ("ring", "contiguous", 2, "sinks_softcap"),
        ("ring", "zigzag", 4, "lifetimes"),
        ("ring", "contiguous", 8, "window_lifetimes"),
        ("allgather_kv", "zigzag", 4, "lifetimes"),
        ("allgather_kv", "contiguous", 8, "documents"),
        ("allgather_kv", "zigzag", 4, "sink_tokens"),
        ("allgather_kv", "contiguous", 2, "sinks_softcap"),
    ],
)
def test_equals_one_device(strategy: str, layout: str, shards: int, name: str) -> None:
    check(strategy, layout, shards, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equals_one_device_everywhere(strategy: str, layout: str, shards: int, name: str) -> None:
    check(strategy, layout, shards, name)


@pytest.mark.parametrize(("strategy", "layout"), [("ring", "zigzag"), ("allgather_kv", "contiguous")])
def test_bf16_stays_near_fp32(strategy: str, layout: str) -> None:
    """Of the same inputs; the ring accumulates in fp32 whatever it passes on."""
    case = CASES["documents"]
    x, facts, cotangents = problem(case, jnp.bfloat16)
    actual = divided(STRATEGIES[strategy], layout, 4, x, facts, cotangents)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (x, cotangents))
    want = jax.jit(functools.partial(evaluate, attention))(wide[0], facts, wide[1])
    assert actual["o"].dtype == actual["dk"].dtype == jnp.bfloat16 and actual["lse"].dtype == jnp.float32
    for what in ("o", "lse", "dq", "dk", "dv"):
        tolerance = TOLERANCE["bf16_gradient" if what.startswith("d") else "bf16_output"]
        assert_close(what, actual[what], want[what], tolerance)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_future_and_other_documents_leave_no_trace(strategy: str) -> None:
    """Bit by bit, over the edges of shards."""
    x, facts, _ = problem(CASES["documents"])
    t = 20  # in a document that begins on shard 1 and ends on shard 2 of 4
    later = {n: a.at[:, t:].add(1) for n, a in x.items()}
    other = {n: a.at[0, 15:34].add(1) for n, a in x.items()}
    f = functools.partial(STRATEGIES[strategy], axis="context", layout="zigzag")
    run = jax.jit(jax.shard_map(lambda x, facts: f(**x, **facts), mesh=mesh_of(4), in_specs=ROWS, out_specs=ROWS))

    def output(x: dict) -> Array:
        there = jax.tree.map(lambda a: layouts.place(a, "zigzag", 4), (x, facts))
        return layouts.restore(run(*there), "zigzag", 4)

    a, b, c = map(output, (x, later, other))
    assert_equal("past", a[:, :t], b[:, :t])
    outside = np.asarray(IDS[0] != 3)
    assert_equal("other documents", a[0, outside], c[0, outside])
    assert not np.array_equal(a[0, t:34], b[0, t:34]) and not np.array_equal(a[0, 15:34], c[0, 15:34])


def compiled(strategy: str, gradient: bool, name: str = "causal") -> str:
    """The program of one of 4 devices."""
    x, facts, cotangents = problem(CASES[name])
    f = functools.partial(STRATEGIES[strategy], axis="context")
    run = functools.partial(evaluate, f) if gradient else lambda x, facts, _: f(**x, **facts)
    outputs = dict.fromkeys(("o", "lse", "seen", *(f"d{n}" for n in x)), ROWS) if gradient else ROWS
    run = jax.shard_map(run, mesh=mesh_of(4), in_specs=ROWS, out_specs=outputs)
    return jax.jit(run).lower(x, facts, cotangents).compile().as_text()


def test_the_ring_holds_no_row_and_gathers_nothing() -> None:
    for gradient in (False, True):
        program = compiled("ring", gradient)
        assert count("all-gather", program) == count("all-reduce", program) == count("all-to-all", program) == 0
        assert count("collective-permute", program) > 0
        assert any(T // 4 in shape for shape in shapes(program)) and all(T not in shape for shape in shapes(program))


@pytest.mark.parametrize("layout", ["contiguous", pytest.param("zigzag", marks=pytest.mark.slow)])
def test_with_a_window_the_ring_forms_the_scores_near_the_diagonal_alone(layout: str) -> None:
    """Of 24 tokens, the 4 of a block and the 4 before them; none of all pairs."""
    x, _, _ = problem(CASES["causal"])
    f = functools.partial(ring_attention, axis="context", layout=layout, window=5, chunk_size=4)
    run = jax.shard_map(lambda x: jax.grad(lambda x: f(**x).sum())(x), mesh=mesh_of(2), in_specs=ROWS, out_specs=ROWS)
    scores = [shape for shape in shapes(jax.jit(run).lower(x).compile().as_text()) if shape[:3] == [2, 2, 4]]
    assert scores and all(np.prod(shape) <= 2 * 2 * 4 * 2 * 8 for shape in scores)


def test_keys_and_values_are_gathered_once() -> None:
    program = compiled("allgather_kv", False)
    assert count("all-gather", program) == 2
    assert count("collective-permute", program) == count("all-reduce", program) == 0
    assert all(shape.count(T) < 2 for shape in shapes(program))
    program = compiled("allgather_kv", True)
    assert (count("all-gather", program), count("reduce-scatter", program)) == (2, 2)
    assert count("all-gather", compiled("allgather_kv", False, "documents")) == 3  # and the ids


@pytest.mark.parametrize(("layout", "visits"), [("contiguous", [1, 2, 3, 4]), ("zigzag", [9, 9, 9, 9])])
def test_zigzag_shards_work_alike(layout: str, visits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of scores that are formed on each of 4 shards: of 12 x 12 tokens, or 6 x 6."""
    done = []
    chunked = forms.chunked

    def counted(*args: object, **options: object) -> tuple:
        jax.debug.callback(lambda rank: done.append(int(rank)), jax.lax.axis_index("context"))
        return chunked(*args, **options)

    monkeypatch.setattr(forms, "chunked", counted)
    x, _, _ = problem(CASES["causal"])
    f = functools.partial(ring_attention, axis="context", layout=layout)
    run = jax.shard_map(lambda x: f(**x), mesh=mesh_of(4), in_specs=ROWS, out_specs=ROWS)
    jax.block_until_ready(jax.jit(run)({n: layouts.place(a, layout, 4) for n, a in x.items()}))
    jax.effects_barrier()
    assert [done.count(rank) for rank in range(4)] == visits


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4, "sink_tokens": 1}, "sink_tokens: expected the positions"),
        ({"facts": {"ends": np.zeros((2, T, 2), np.int32)}}, "ends: expected the positions"),
        ({"layout": "spiral"}, "layout = 'spiral': expected one of contiguous, zigzag"),
    ],
)
def test_refusals(strategy: str, options: dict, message: str) -> None:
    x, facts, _ = problem(CASES["documents"])
    options = dict(options)
    facts |= options.pop("facts", {})
    f = functools.partial(STRATEGIES[strategy], axis="context", **options)
    run = jax.shard_map(lambda x, facts: f(**x, **facts), mesh=mesh_of(4), in_specs=ROWS, out_specs=ROWS)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, x, facts)


@pytest.mark.parametrize(
    ("sinks", "options"),
    [(False, {}), (True, {"window": 6, "sink_tokens": 2, "softcap": 2.0})],
)
def test_one_token_over_a_divided_cache(sinks: bool, options: dict) -> None:
    """Of three rows: a full cache, one of which three of four shards are empty, and one without any key."""
    S, H, Hk, K, V = 24, 4, 2, 8, 6
    normal = np.random.default_rng(0).normal
    q, k, v = (jnp.asarray(normal(size=s), jnp.float32) for s in ((3, 1, H, K), (3, S, Hk, K), (3, S, Hk, V)))
    taken = jnp.asarray([S, 5, 0])
    keys = {
        "kv_positions": jnp.broadcast_to(jnp.arange(S), (3, S)),
        "kv_segment_ids": jnp.asarray(jnp.arange(S) < taken[:, None], jnp.int32),
    }
    queries = {"positions": taken[:, None], "segment_ids": jnp.ones((3, 1), jnp.int32)}
    if sinks:
        queries["sinks"] = jnp.asarray(normal(size=H), jnp.float32)

    def parts(q: Array, k: Array, v: Array, queries: dict, keys: dict) -> Array:
        return tree_attention(q, k, v, axis="context", **queries, **keys, **options)

    run = jax.jit(
        jax.shard_map(
            parts,
            mesh=mesh_of(4),
            in_specs=(PartitionSpec(), ROWS, ROWS, PartitionSpec(), ROWS),
            out_specs=PartitionSpec(),
        )
    )
    want = jax.jit(functools.partial(attention, **options))(q, k, v, **queries, **keys)
    assert_close("o", run(q, k, v, queries, keys), want, TOLERANCE["fp32_op"])
    assert not want[2].any() and want[:2].any()
    program = run.lower(q, k, v, queries, keys).compile().as_text()
    assert count("all-reduce", program) == 2 and count("all-gather", program) == 0
