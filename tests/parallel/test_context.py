"""Context parallelism: rows whose tokens are divided over devices give what they give on one."""

import dataclasses
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.core.typing import Array
from hydrax.models.divided import check_divided
from hydrax.models.spec import ModelConfig
from hydrax.parallel.halo import halo_left
from hydrax.parallel.shards import STRATEGIES, Shards
from tests.contract.cases import D, case, segments
from tests.parallel.devices import ROWS, count, mesh_of
from tests.tolerances import assert_equal

T = 48


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
