"""Rows whose tokens are divided over devices: what is sent, where halos come from, and what is refused."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.core.typing import Array
from hydrax.models.divided import check_divided
from hydrax.models.spec import ModelConfig
from hydrax.parallel import layout as layouts, sequence
from hydrax.parallel.halo import halo_left
from hydrax.parallel.layout import LAYOUTS
from hydrax.parallel.mesh import MeshConfig
from hydrax.parallel.shards import NEEDS, STRATEGIES, Shards, place, restore, strategy
from tests.contract.cases import D, case, segments
from tests.parallel.devices import ROWS, count, mesh_of
from tests.tolerances import assert_equal

T = 48


def forward(name: str, strategy: str, layout: str) -> str:
    """The compiled forward pass of a layer on 4 devices; its input is divided, its parameters are on all."""
    c, x = case(name), jax.ShapeDtypeStruct((2, T, D), jnp.float32)

    def run(params: dict[str, Array], x: Array) -> Array:
        return c(params, x, shards=Shards.of(x.shape[:2], None, (strategy,), layout))[0]

    mesh = mesh_of(4)
    rows, whole = (jax.sharding.NamedSharding(mesh, spec) for spec in (ROWS, jax.sharding.PartitionSpec()))
    with jax.set_mesh(mesh):
        compiled = jax.jit(run, in_shardings=(whole, rows), out_shardings=rows).lower(c.params, x).compile()
    return compiled.as_text()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["lightning", pytest.param("gdn", marks=pytest.mark.slow)])
def test_a_layer_gathers_states_once_and_no_tokens(name: str, layout: str):
    program = forward(name, "allgather_state", layout)
    gathers = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", program)
    assert len(gathers) == 1
    assert str(T) not in gathers[0].split(",")
    assert count("all-to-all", program) == count("all-reduce", program) == 0


@pytest.mark.parametrize(("layout", "passes"), [("contiguous", 1), ("zigzag", 2)])
def test_a_state_that_goes_from_shard_to_shard_is_not_gathered(layout: str, passes: int):
    program = forward("lightning", "ring_state", layout)
    assert count("collective-permute", program) == passes  # each in a loop over the shards
    assert count("all-gather", program) == count("all-to-all", program) == count("all-reduce", program) == 0


def test_many_shards_pass_keys_on(monkeypatch: pytest.MonkeyPatch):
    assert count("all-gather", forward("attn", "", "contiguous")) > 0
    monkeypatch.setattr(sequence, "MANY_SHARDS", 3)
    monkeypatch.setattr(sequence, "WIDE_KEYS", 15)  # 2 heads of 8
    program = forward("attn", "", "contiguous")
    assert count("all-gather", program) == 0 < count("collective-permute", program)
    assert count("all-gather", forward("attn", "allgather_kv", "contiguous")) > 0


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


def test_a_halo_of_two_slots_comes_from_both_sides():
    """Shard r of 3 has slots r and 5-r of 4 tokens; the last one has two that follow one another."""
    x, seg = jnp.arange(24.0).reshape(1, 24) + 1, jnp.asarray(segments([8, 16], 24))[None]
    x, seg = (layouts.place(a, "zigzag", 3) for a in (x, seg))

    def halos(x: Array) -> Array:
        f = lambda x, s: halo_left(x, 2, s, axis="context", layout="zigzag").reshape(1, 4)  # noqa: E731
        return jax.shard_map(f, in_specs=(ROWS, ROWS), out_specs=ROWS)(x, seg)

    with jax.set_mesh(mesh_of(3)):
        got, pullback = jax.vjp(halos, x)
        (dx,) = pullback(jnp.ones_like(got))
    np.testing.assert_array_equal(got[0], [0, 0, 19, 20, 3, 4, 15, 16, 0, 0, 11, 12])
    np.testing.assert_array_equal(np.sort(x[dx != 0]), [3, 4, 11, 12, 15, 16, 19, 20])


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


def model_of(pattern: str, **options: Any) -> ModelConfig:
    tiny = {name: dict(mixers.row(name).tiny) for name in pattern.split(",")}
    return build(ModelConfig, {"d_model": D, "pattern": pattern, "mixers": tiny, **options})


@pytest.mark.parametrize(
    ("pattern", "sizes", "seq_len", "mesh", "message"),
    [
        ("gdn", {"context": 4}, 62, {}, "data.seq_len = 62: expected a multiple of 4 for mesh.context = 4, "),
        ("gdn", {"context": 4}, 60, {"layout": "zigzag"}, "= 60: expected a multiple of 8 .*, mesh.layout = 'zigzag'$"),
        (
            "gdn,gla",
            {"context": 4},
            64,
            {"strategy": "ring"},
            "mesh.strategy = 'ring': .*gdn: allgather_state or ring_state or ulysses; gla: all",
        ),
        ("attn,gdn", {"context": 2}, 64, {"strategy": "rings"}, "strategy = 'rings': .*attn: allgather_kv or ring or "),
        ("gla", {"context": 4}, 64, {"strategy": "ulysses"}, "gla has heads = 2; .* = 4 per .* or allgather_state or "),
        ("gla", {"context": 2, "tensor": 2}, 64, {"strategy": "ulysses"}, "has heads = 2; .* = 2 per tensor shard"),
        ("nonapprox", {"context": 4}, 64, {}, "strategy = 'ulysses': nonapprox has heads = 2; .* per tensor shard$"),
        (
            "attn,nonapprox",
            {"context": 2},
            64,
            {"layout": "zigzag"},
            "mesh.layout = 'zigzag': nonapprox is served by ulysses: expected contiguous$",
        ),
        ("gated_conv", {"context": 8}, 24, {}, "mesh.context = 8: gated_conv sees 4 .*, and a device has 3 of a row$"),
    ],
)
def test_what_cannot_be_divided_is_refused(pattern: str, sizes: dict, seq_len: int, mesh: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        check_divided(model_of(pattern), build(MeshConfig, mesh), {"tensor": 1, **sizes}, seq_len)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": {"workspace": {}}}, "mesh.layout = 'zigzag': model.memory.workspace reads rows in their order"),
        ({"ffn": "moe", "moe": {"granularity": "chunk"}}, "'zigzag': model.moe.granularity = 'chunk' reads rows in"),
    ],
)
def test_what_reads_rows_in_their_order_has_them_so(options: dict, message: str):
    sizes = {"context": 2, "tensor": 1}
    with pytest.raises(ConfigError, match=f"{message}.*: expected contiguous"):
        check_divided(model_of("gla", **options), MeshConfig(layout="zigzag"), sizes, 64)
    check_divided(model_of("gla", **options), MeshConfig(), sizes, 64)


def test_what_can_be_divided_is_not_refused():
    names = [name for name in mixers.names() if mixers.row(name).transition not in ("stabilised", "nonlinear")]
    model, sizes = model_of(",".join(names)), {"tensor": 1}
    check_divided(model, MeshConfig(strategy="ring", layout="zigzag"), {"context": 8, **sizes}, 64)
    check_divided(model, MeshConfig(strategy="nothing"), {"context": 1, **sizes}, 63)


def test_strategies_in_order_of_preference():
    assert strategy("gdn", "full", ("ring", "ulysses", "ring_state")) == "ulysses"
    assert strategy("gdn", "full", ("ring", "ulysses", "ring_state"), "zigzag") == "ring_state"
    assert strategy("gdn", "full", ("ring",), "zigzag") == "allgather_state"
    with pytest.raises(
        ConfigError, match=r"gdn is served by ulysses: expected contiguous, or mesh.strategy allgather_"
    ):
        strategy("gdn", "full", ("ulysses",), "zigzag")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            "contiguous",
            "mesh.strategy = 'ulysses': linear_attention has 2 heads per device: expected a multiple of",
        ),
        ("zigzag", "mesh.layout = 'zigzag': linear_attention is served by ulysses: expected contiguous, or mesh.strat"),
    ],
)
def test_an_op_refuses_as_well(layout: str, message: str):
    with pytest.raises(ConfigError, match=message):
        forward("lightning", "ulysses", layout)


def test_every_transition_has_a_strategy():
    assert {mixers.row(name).transition for name in mixers.names()} <= STRATEGIES.keys()
    assert {name for names in STRATEGIES.values() for name in names} == NEEDS.keys()
    assert {layout for needs in NEEDS.values() for layout in needs.layouts} == LAYOUTS.keys()


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


def test_facts_of_two_slots_are_where_the_slots_are():
    """Slots of 6 tokens on 4 devices: 0 7 | 1 6 | 2 5 | 3 4."""
    seg = jnp.asarray(np.stack([segments([6, 19, 23], T), segments([5, 30], T)]))
    with jax.set_mesh(mesh_of(4)):
        assert Shards.of((2, T - 4), seg[:, 4:], layout="zigzag") is None
        facts = Shards.of((2, T), seg, layout="zigzag")
    joined = np.ones((2, 8), bool)
    joined[0, 2] = False
    assert_equal("joined", facts.joined, joined)
    assert np.argmax(facts.ends, axis=1).tolist() == [1, 5] and np.all(np.sum(facts.ends, axis=1) == 1)


def test_rows_are_placed_where_a_mesh_divides_them():
    x = jnp.arange(16)[None]
    assert place(x, "zigzag") is x
    with jax.set_mesh(mesh_of(4)):
        assert place(x[:, :12], "zigzag").tolist() == x[:, :12].tolist()  # not 8 slots
        assert place(x, "zigzag").tolist() == layouts.order("zigzag", 4, 16)[None].tolist()
        assert restore(place(x, "zigzag"), "zigzag").tolist() == x.tolist()
