"""Context parallelism: rows whose tokens are divided over devices give what they give on one."""

import dataclasses
import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.core.typing import Array, PyTree
from hydrax.models.divided import check_divided
from hydrax.models.mix import Single
from hydrax.models.spec import ModelConfig, resolve
from hydrax.parallel.halo import halo_left
from hydrax.parallel.shards import STRATEGIES, Shards
from tests.contract.cases import Case, D, case, normal, segments
from tests.parallel.devices import ROWS, count, mesh_of
from tests.tolerances import TOLERANCE, assert_equal, assert_trees_close

T = 48
DOCUMENTS = np.stack([segments([6, 19, 1, 2, 13, 7], T), segments([5, 30], T)])
"""On 8 devices of 6 tokens: an edge on that of a shard, documents over three and more shards, two edges within one, one
token alone; and padding that fills the last two shards."""

COVERING = [("gdn", 4, ""), ("hgrn", 8, ""), ("swa", 2, "ulysses")]
PRODUCT = [
    (name, P, strategy)
    for name in mixers.names()
    for P in (2, 4, 8)
    for strategy in STRATEGIES[mixers.row(name).transition]
]


def singles(model: ModelConfig) -> list[Single]:
    return [single for layer in resolve(model) for single in layer.mix.singles()]


def states(c: Case) -> PyTree | None:
    """A state to start from; None where it is a cache, which is not divided."""
    if c.row.transition not in ("none", "scalar", "diag", "full"):
        return None
    return jax.tree.map(lambda x: jnp.asarray(np.abs(normal(2, *x.shape))), c.init(2, T))


def evaluate(c: Case, wanted: tuple[str, ...], impl: str | None, *inputs: PyTree) -> tuple[PyTree, PyTree]:
    """Outputs, final state and all gradients of a sum of both."""
    seg, dy = jnp.asarray(DOCUMENTS), jnp.asarray(normal(1, 2, T, D))

    def total(params: dict[str, Array], x: Array, state: PyTree | None) -> tuple[Array, PyTree]:
        results = c(params, x, seg, state=state, shards=Shards.of(x.shape[:2], seg, wanted), impl=impl)
        y, end = results
        ends = [jnp.sum(jnp.sin(jnp.arange(e.size).reshape(e.shape)) * e) for e in jax.tree.leaves(end)]
        return jnp.sum(dy * y) + (sum(ends) if state is not None else 0), results

    return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*inputs)


@functools.cache
def expected(name: str) -> tuple[Case, tuple, PyTree]:
    c = case(name)
    inputs = c.params, jnp.asarray(normal(0, 2, T, D)), states(c)
    return c, inputs, jax.jit(functools.partial(evaluate, c, (), "recurrent"))(*inputs)


def compare(name: str, P: int, strategy: str) -> None:
    c, inputs, want = expected(name)
    wanted = (strategy,) if strategy else ()
    with jax.set_mesh(mesh_of(P)):
        got = jax.jit(functools.partial(evaluate, c, wanted, None))(*inputs)
    assert_trees_close("gradients, outputs", jax.device_get(got), jax.device_get(want), TOLERANCE["fp32_model"])


@pytest.mark.parametrize(("name", "P", "strategy"), COVERING)
def test_a_divided_row_gives_what_a_whole_one_gives(name: str, P: int, strategy: str):
    """Outputs, final state, and the gradients of parameters, inputs and initial state, on every shard."""
    compare(name, P, strategy)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "P", "strategy"), PRODUCT)
def test_every_mixer_and_strategy(name: str, P: int, strategy: str):
    """Each combination is right, or refused in one line."""
    model = build(ModelConfig, {"d_model": D, "pattern": name, "mixers": {name: dict(mixers.row(name).tiny)}})
    counts = [
        getattr(single.options, n, None) for single in singles(model) for n in ("heads", "value_heads", "kv_heads")
    ]
    if strategy != "ulysses" or all((n or P) % P == 0 for n in counts):
        compare(name, P, strategy)
        return
    with pytest.raises(ConfigError, match=r"mesh\.strategy = 'ulysses': .* expected a multiple of context = "):
        check_divided(model, {"context": P, "tensor": 1}, T, strategy)
    with pytest.raises(ConfigError, match=r"mesh\.strategy = 'ulysses': .* heads per device: expected a multiple"):
        compare(name, P, strategy)


def forward(name: str, wanted: Sequence[str] = ()) -> str:
    """The compiled forward pass of a layer on 4 devices; its input is divided, its parameters are on all."""
    c, x = case(name), jax.ShapeDtypeStruct((2, T, D), jnp.float32)

    def run(params: dict[str, Array], x: Array) -> Array:
        return c(params, x, shards=Shards.of(x.shape[:2], None, tuple(wanted)))[0]

    mesh = mesh_of(4)
    rows, whole = (jax.sharding.NamedSharding(mesh, spec) for spec in (ROWS, jax.sharding.PartitionSpec()))
    with jax.set_mesh(mesh):
        compiled = jax.jit(run, in_shardings=(whole, rows), out_shardings=rows).lower(c.params, x).compile()
    return compiled.as_text()


@pytest.mark.parametrize("name", ["lightning", pytest.param("gdn", marks=pytest.mark.slow)])
def test_a_layer_gathers_states_once_and_no_tokens(name: str):
    program = forward(name)
    gathers = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", program)
    assert len(gathers) == 1
    assert str(T) not in gathers[0].split(",")
    assert count("all-to-all", program) == count("all-reduce", program) == 0


def test_a_halo_is_the_end_of_the_shard_before_and_returns_its_gradient():
    x, seg = jnp.arange(24.0).reshape(1, 24), jnp.asarray(segments([7, 17], 24))[None]

    def halos(x: Array) -> Array:
        specs = (ROWS, ROWS)
        return jax.shard_map(lambda x, s: halo_left(x, 3, s, axis="context"), in_specs=specs, out_specs=ROWS)(x, seg)

    with jax.set_mesh(mesh_of(4)):
        got, pullback = jax.vjp(halos, x)
        (dx,) = pullback(jnp.ones_like(got))
    np.testing.assert_array_equal(got[0], [0, 0, 0, 3, 4, 5, 9, 10, 11, 15, 16, 17])
    np.testing.assert_array_equal(np.flatnonzero(dx[0]), [3, 4, 5, 9, 10, 11, 15, 16, 17])


def test_a_halo_does_not_cross_documents():
    x, seg = jnp.arange(24.0).reshape(1, 24) + 1, jnp.asarray(segments([4, 8, 12], 24))[None]
    with jax.set_mesh(mesh_of(4)):
        f = jax.shard_map(lambda x, s: halo_left(x, 3, s, axis="context"), in_specs=(ROWS, ROWS), out_specs=ROWS)
        got = f(x, seg)
        with pytest.raises(ValueError, match="6 tokens per shard along 'context': expected at least the 7"):
            jax.eval_shape(
                lambda x: jax.shard_map(lambda x: halo_left(x, 7, axis="context"), in_specs=ROWS, out_specs=ROWS)(x), x
            )
    np.testing.assert_array_equal(got[0], [0, 0, 0, 0, 5, 6, 0, 0, 0, 16, 17, 18])


@pytest.mark.parametrize(
    ("pattern", "sizes", "seq_len", "wanted", "message"),
    [
        ("gdn", {"context": 4}, 62, None, r"data\.seq_len = 62: expected a multiple of mesh.context = 4"),
        (
            "gdn,gla",
            {"context": 4},
            64,
            "ring",
            r"mesh\.strategy = 'ring': .*gdn: allgather_state or ulysses; gla: all",
        ),
        ("attn,gdn", {"context": 2}, 64, "rings", r"mesh\.strategy = 'rings': .*attn: allgather_kv or ring or ulysses"),
        ("gla", {"context": 4}, 64, "ulysses", r"'ulysses': gla has heads = 2; .* = 4 .*, or allgather_state"),
        ("gla", {"context": 2, "tensor": 2}, 64, "ulysses", r"'ulysses': gla has heads = 2; .* = 2 per tensor shard"),
        (
            "nonapprox",
            {"context": 4},
            64,
            None,
            r"'ulysses': nonapprox has heads = 2; .* context = 4 per tensor shard$",
        ),
        (
            "gated_conv",
            {"context": 8},
            24,
            None,
            r"mesh\.context = 8: gated_conv sees 4 tokens back, .* has 3 of a row",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(pattern: str, sizes: dict, seq_len: int, wanted: str | None, message: str):
    tiny = {name: dict(mixers.row(name).tiny) for name in pattern.split(",")}
    model = build(ModelConfig, {"d_model": D, "pattern": pattern, "mixers": tiny})
    with pytest.raises(ConfigError, match=message):
        check_divided(model, {"tensor": 1, **sizes}, seq_len, wanted)


def test_what_can_be_divided_is_not_refused():
    tiny = {name: dict(mixers.row(name).tiny) for name in mixers.names()}
    every = ",".join(name for name in mixers.names() if name != "nonapprox")
    model = build(ModelConfig, {"d_model": D, "pattern": every, "mixers": tiny})
    check_divided(model, {"context": 8, "tensor": 1}, 64, "ring")
    check_divided(model, {"context": 1, "tensor": 1}, 63, "nothing")


def test_every_transition_has_a_strategy():
    assert {mixers.row(name).transition for name in mixers.names()} <= STRATEGIES.keys()


def test_facts_of_shards():
    seg = jnp.asarray(np.stack([segments([6, 19, 23], T), segments([5, 30], T), segments([], T)]))
    assert Shards.of((3, T), seg) is None
    with jax.set_mesh(mesh_of(8)):
        assert Shards.of((3, T - 1), seg[:, 1:]) is None
        facts = Shards.of((3, T), seg)
    joined = np.ones((3, 8), bool)
    joined[0, 1] = False
    assert_equal("joined", facts.joined, joined)
    assert np.argmax(facts.ends, axis=1).tolist() == [7, 5, 0] and np.all(np.sum(facts.ends, axis=1) == 1)
    assert dataclasses.replace(facts, wanted=("ring",)).wanted == ("ring",)
