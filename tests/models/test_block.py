"""One layer against its equation: where norms stand, what they are, and what goes round the mixer."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from hydrax.core.typing import Array
from hydrax.mixers import Context
from hydrax.models.block import Block
from tests.models.small import D, attention, config, drawn, fp64, layers, normal, rms, rope, silu, visible
from tests.tolerances import TOLERANCE, assert_close, assert_equal

pytestmark = pytest.mark.thorough

T, EPS = 9, 0.1
X = normal("x", 2, T, D)
ALPHA, BETA = 1.7, 0.6


def build(**values: Any) -> Block:
    """The first layer of a model, with parameters of which none is zero."""
    values = {"norm_eps": EPS, "post_alpha": ALPHA, "post_beta": BETA, **values}
    (spec,) = layers("swa", **values)
    graph, state = nnx.split(nnx.eval_shape(lambda: Block(config("swa", **values), spec, depth=1, rngs=nnx.Rngs(0))))
    flat = nnx.to_flat_state(state)
    params = drawn({"/".join(map(str, path)): v for path, v in flat})
    return nnx.merge(graph, nnx.from_flat_state([(p, v.replace(params["/".join(map(str, p))])) for p, v in flat]))


def parameters(block: Block) -> dict[str, np.ndarray]:
    return fp64({"/".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(nnx.state(block))})


def run(block: Block, x: Array = X, **facts: Any) -> Array:
    return jax.jit(lambda x: block(x, Context.of(x, **facts))[0])(x)


def mixed(p: dict[str, np.ndarray], h: np.ndarray) -> np.ndarray:
    positions = np.broadcast_to(np.arange(T), (2, T))
    q, k, v = (np.tensordot(h, p[f"mixer/qkv/{name}/kernel"], 1) for name in "qkv")
    seen = visible(positions, np.ones((2, T), int), 4)
    return np.tensordot(attention(rope(q, positions), rope(k, positions), v, seen), p["mixer/project/kernel"], 2)


def widened(p: dict[str, np.ndarray], h: np.ndarray) -> np.ndarray:
    return (silu(h @ p["ffn/gate/kernel"]) * (h @ p["ffn/up/kernel"])) @ p["ffn/down/kernel"]


PLACES = {
    "pre": lambda x, f, before, after: x + f(before(x)),
    "reordered": lambda x, f, before, after: x + after(f(x)),
    "sandwich": lambda x, f, before, after: x + after(f(before(x))),
    "post": lambda x, f, before, after: ALPHA * before(x) + BETA * f(before(x)),
}
WEIGHTS = {"rmsnorm": lambda w: w, "rmsnorm1p": lambda w: 1 + w, "srmsnorm": lambda w: 1.0}


@pytest.mark.parametrize(
    ("place", "norm"),
    [
        *((place, "rmsnorm") for place in PLACES),
        ("sandwich", "rmsnorm1p"),
        ("sandwich", "srmsnorm"),
        ("post", "rmsnorm1p"),
    ],
)
def test_norms_stand_where_they_are_told(place: str, norm: str):
    block = build(norm_place=place, norm=norm)
    p, x = parameters(block), np.asarray(X, np.float64)
    found = {path.split("/")[0] for path in p if path.endswith("norm/weight")}
    before, after = {"mixer_norm", "ffn_norm"}, {"mixer_post_norm", "ffn_post_norm"}
    want = {"pre": before, "post": before, "reordered": after, "sandwich": before | after}
    assert found == (set() if norm == "srmsnorm" else want[place])

    def normed(name: str) -> Any:
        return lambda h: rms(h, WEIGHTS[norm](p.get(f"{name}/weight")), eps=EPS)

    for name, f in (("mixer", mixed), ("ffn", widened)):
        x = PLACES[place](x, lambda h, f=f: f(p, h), normed(f"{name}_norm"), normed(f"{name}_post_norm"))
    assert_close("y", run(block), x, TOLERANCE["fp32_op"])


@pytest.mark.parametrize("place", ["pre", "reordered", "sandwich"])
def test_two_hops_leave_the_mixer_out_of_the_stream(place: str):
    """The FFN reads x + mixer(x), but joins x: with nothing from it, a layer gives back what it read."""
    block = build(norm_place=place, norm="srmsnorm", two_hop=True)
    p, x, same = parameters(block), np.asarray(X, np.float64), lambda h: rms(h, 1.0, eps=EPS)
    middle = PLACES[place](x, lambda h: mixed(p, h), same, same)
    after = PLACES[place](middle, lambda h: widened(p, h), same, same) - middle
    assert_close("y", run(block), x + after, TOLERANCE["fp32_op"])
    block.ffn.down.kernel[...] *= 0
    assert_equal("nothing from the FFN", run(block), X)


def test_a_mixer_that_norms_its_input_has_no_norm_before_it():
    (spec,) = layers("megalodon", mixers={"megalodon": {"groups": 4}})
    block = Block(config("megalodon", mixers={"megalodon": {"groups": 4}}), spec, depth=1, rngs=nnx.Rngs(0))
    assert block.mixer_norm is None
    assert_close("y", block._add(X, lambda h: h, block.mixer_norm, None), 2 * X, TOLERANCE["fp32_op"])


def test_a_layer_without_channel_mixing_has_no_norm_for_it():
    block = build(ffn="none", norm_place="sandwich")
    p, x = parameters(block), np.asarray(X, np.float64)
    assert not any(path.startswith("ffn") for path in p)
    inner = mixed(p, rms(x, p["mixer_norm/weight"], eps=EPS))
    assert_close("y", run(block), x + rms(inner, p["mixer_post_norm/weight"], eps=EPS), TOLERANCE["fp32_op"])


def test_a_norm_of_one_plus_w_starts_as_a_plain_norm():
    """Its parameter is 0 at first, so that weight decay pulls the weight to 1."""
    for norm, value in (("rmsnorm", 1.0), ("rmsnorm1p", 0.0)):
        (spec,) = layers("swa", norm=norm, ffn="none")
        block = Block(config("swa", norm=norm, ffn="none"), spec, depth=1, rngs=nnx.Rngs(0))
        assert_equal(norm, block.mixer_norm.weight[...], np.full(D, value))
        assert_close(norm, block.mixer_norm(X), rms(np.asarray(X, np.float64)), TOLERANCE["fp32_op"])


@pytest.mark.parametrize("router_at", ["ffn", "pre_attn"])
def test_experts_may_be_chosen_by_what_the_layer_read(router_at: str):
    """By the residual stream before the mixer, and not by their own input; their losses are recorded."""
    moe = {"experts": 4, "top_k": 2, "width": 8, "router_at": router_at}
    block = build(ffn="moe", moe=moe)
    p, x = parameters(block), np.asarray(X, np.float64)
    x = x + mixed(p, rms(x, p["mixer_norm/weight"], eps=EPS))
    h = rms(x, p["ffn_norm/weight"], eps=EPS).astype(np.float32)
    ctx = Context.of(X)
    y, _, losses = jax.jit(
        lambda h: block.moe(h, router_input=X if router_at == "pre_attn" else None, positions=ctx.positions)
    )(h)
    records: dict[str, Any] = {}
    got = jax.jit(lambda x: (block(x, Context.of(x, records=records))[0], dict(records)))(X)
    assert_close("y", got[0], x + np.asarray(y), TOLERANCE["fp32_op"])
    assert losses.keys() == {"balance", "router_z"}
    for name, value in losses.items():
        assert_close(name, got[1][name], value, TOLERANCE["fp32_op"])


def test_memories_are_read_after_the_channels():
    memory = {
        "workspace": {"slots": 3, "rank": 2, "chunk": 4},
        "pkm": {"rows": 3, "key_dim": 2, "value_dim": 4, "top_k": 2},
    }
    block, bare = build(memory=memory), build()
    ctx, facts = Context.of(X), {"positions": Context.of(X).positions, "segment_ids": None}

    @jax.jit
    def by_hand(x: Array) -> Array:
        x = bare(x, ctx)[0]
        x = x + block.workspace(block.workspace_norm(x), **facts, state=None)[0]
        return x + block.pkm(block.pkm_norm(x))

    assert_close("y", run(block), by_hand(X), TOLERANCE["fp32_op"])
