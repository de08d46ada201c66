"""Keys and values of another layer, weights of other places, blocks that feed mixers: against plain formulas."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.core.typing import Array
from hydrax.models.sharing import LowRank
from hydrax.nn.param import param
from tests.models.small import (
    D,
    Params,
    attention,
    below,
    drawn,
    fp64,
    in_pieces,
    normal,
    plan,
    rms,
    rope,
    silu,
    swa_layer,
    tokens,
    unstacked,
    visible,
)
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

pytestmark = pytest.mark.thorough

T = 15
IDS = tokens(2, T)
SEG = np.asarray([[1] * T, [1] * 6 + [2] * 8 + [0]], np.int32)
POSITIONS = np.asarray([[*range(T)], [*range(6), *range(8), 0]])
SINKING = {"swa": {"heads": 2, "kv_heads": 1, "key_dim": 4, "window": 3, "sink_tokens": 2}}


def hidden(made: Any, params: Params) -> Array:
    return jax.jit(lambda p: made.merge(p).hidden(IDS, jnp.asarray(SEG)))(params)


# ---------------------------------------------------------------------------------------------------- keys and values

GROUPS = [[0, 3], [2, 4, 5]]  # the second begins before the first one ends


@functools.cache
def lending() -> tuple[Any, Params]:
    """Six layers of windows with sink tokens as in Hymba, one of them with keys that nobody else reads."""
    made = plan("6*swa", ffn="none", mixers=SINKING, share={"kv": GROUPS}, scan=False)
    return made, drawn(made.shapes)


def by_hand(p: dict[str, np.ndarray]) -> np.ndarray:
    """The hidden states of `lending`."""
    x, seen = p["embed/weight"][IDS], visible(POSITIONS, SEG, 3, 2)
    producers = {layer: group[0] for group in GROUPS for layer in group[1:]}
    made: dict[int, Any] = {}
    for i in range(6):
        own = {path: value[0] for path, value in below(p, f"periods/{i}/blocks/0/").items()}
        x, made[i] = swa_layer(own, x, POSITIONS, seen, made.get(producers.get(i)))
    return rms(x, p["norm/weight"])


def test_consumers_attend_to_the_keys_and_values_of_their_producer():
    made, params = lending()
    assert_close("hidden", hidden(made, params), by_hand(fp64(params)), TOLERANCE["fp32_model"])


def test_consumers_have_no_keys_and_values_and_no_cache_of_their_own():
    made, params = lending()
    for i in range(6):
        names = {path.split("/")[2] for path in below(params, f"periods/{i}/blocks/0/") if "qkv" in path}
        assert names == ({"q"} if i in (3, 4, 5) else {"q", "k", "v"})
    cache = jax.eval_shape(lambda p: made.merge(p).init_cache(2, T), made.shapes)
    assert [len(jax.tree.leaves(layers)) > 0 for layers in cache.layers] == [i < 3 for i in range(6)]


@pytest.mark.parametrize("name", ["k", "v"])
def test_gradients_of_consumers_reach_their_producer(name: str):
    """The producer's own output goes nowhere: what moves its W_k and W_v comes from the others."""
    made, params = lending()
    producer = "periods/2/blocks/0/mixer/"
    params = params | {f"{producer}project/kernel": jnp.zeros_like(params[f"{producer}project/kernel"])}
    path, weights = f"{producer}qkv/{name}/kernel", normal("cotangent", 2, T, D) * (SEG != 0)[..., None]
    gradient = jax.jit(jax.grad(lambda p: jnp.vdot(weights, made.merge(p).hidden(IDS, jnp.asarray(SEG)))))(params)[path]
    p, direction = fp64(params), np.asarray(normal("direction", *params[path].shape), np.float64)
    w = np.asarray(weights, np.float64)
    up, down = (np.vdot(w, by_hand(p | {path: p[path] + e * direction})) for e in (1e-5, -1e-5))
    assert_close(path, np.vdot(gradient, direction), (up - down) / 2e-5, TOLERANCE["fp32_model"])
    assert abs(up - down) / 2e-5 > 1e-2


@pytest.mark.parametrize(
    ("pattern", "groups", "repeats"),
    [
        ("attn,4*swa,attn", [[1, 2], [3, 4]], [1, 2, 1]),
        ("4*swa,attn", [[0, 3]], [1, 2, 1, 1]),  # across a scan of others
        ("4*parallel(swa,gla)", [[0, 1], [2, 3]], [2]),
    ],
)
def test_groups_in_repeated_periods_equal_those_of_single_layers(pattern: str, groups: list, repeats: list):
    made, apart = (plan(pattern, ffn="none", share={"kv": groups}, scan=scan) for scan in (True, False))
    params = drawn(made.shapes)
    assert [made.shapes[f"periods/{j}/blocks/0/mixer_norm/weight"].shape[0] for j in range(len(repeats))] == repeats
    own = unstacked(made, params)
    assert own.keys() == apart.shapes.keys()
    assert_close("hidden", hidden(made, params), hidden(apart, own), TOLERANCE["fp32_model"])


def test_the_keys_of_a_branch_serve_the_branch_of_another_layer():
    """Equal to layers of their own with the same W_k and W_v, if both read the same input."""
    mixer = {"blocks": {"x": {"mixer": "parallel(swa,gla)", "options": {"fusion": "concat"}}}, "ffn": "none"}
    shared, own = (plan("2*x", share={"kv": kv}, scan=False, **mixer) for kv in ([[0, 1]], []))
    params = drawn(own.shapes)
    first, second = "periods/0/blocks/0/", "periods/1/blocks/0/"
    same = {f"{second}{name}": params[f"{first}{name}"] for name in ("mixer_norm/weight", *KEYS)}
    still = {f"{first}mixer/project/kernel": jnp.zeros_like(params[f"{first}mixer/project/kernel"])}
    params = params | same | still  # the first layer adds nothing, so that the second reads what it read
    given = {path: params[path] for path in shared.shapes}
    assert len(given) == len(params) - 2
    assert_close("hidden", hidden(shared, given), hidden(own, params), TOLERANCE["fp32_model"])


KEYS = ("mixer/parts/0/qkv/k/kernel", "mixer/parts/0/qkv/v/kernel")


def test_decoding_lends_what_the_producers_cache_holds():
    made, params = lending()
    whole = jax.jit(lambda p: made.merge(p)(IDS))(params)
    assert_close("logits", in_pieces(made, params, IDS, 6), whole, TOLERANCE["fp32_model"])


# ------------------------------------------------------------------------------------------------------ common weights


def common(**fields: Any) -> dict[str, Any]:
    return {"blocks": {"x": {"mixer": "attn", "shared": True, **fields}}}


LORA = {"lora_rank": 2, "lora_on": ["mixer", "ffn.gate", "ffn.down"]}


def copied(params: Params, places: dict[int, str]) -> Params:
    """The parameters of the same layers without anything in common, changed where they have changes of their own."""
    found = {path: p for path, p in params.items() if not path.startswith(("shared/", "periods/"))}
    for i, name in places.items():
        own = below(params, f"periods/{i}/blocks/0/")
        for path, value in (below(params, f"shared/{name}/") if name else own).items():
            change = f"changes/{path.replace('/', '.')}/"
            if change + "down" in own:
                ab = np.asarray(own[change + "down"][0], np.float64) @ np.asarray(own[change + "up"][0], np.float64)
                value = value + jnp.asarray(ab.reshape(value.shape), jnp.float32)
            found[f"periods/{i}/blocks/0/{path}"] = value[None] if name else value
    return found


@pytest.mark.parametrize("lora", [{}, LORA], ids=["same", "lora"])
def test_places_have_one_set_of_weights_and_changes_of_their_own(lora: dict):
    """They are layers of their own with W + A B in place of W."""
    made, apart = plan("x,swa,x", scan=False, **common(**lora)), plan("attn,swa,attn", scan=False)
    params = drawn(made.shapes)
    copies = copied(params, {0: "x", 1: "", 2: "x"})
    assert copies.keys() == apart.shapes.keys()
    assert_close("hidden", hidden(made, params), hidden(apart, copies), TOLERANCE["fp32_model"])


def test_gradients_of_all_places_add():
    made, apart = plan("2*x", scan=False, **common()), plan("2*attn", scan=False)
    params, weights = drawn(made.shapes), normal("cotangent", 2, T, D)

    def gradients(plan: Any, params: Params) -> Params:
        return jax.jit(jax.grad(lambda p: jnp.vdot(weights, plan.merge(p).hidden(IDS, jnp.asarray(SEG)))))(params)

    each = gradients(apart, copied(params, {0: "x", 1: "x"}))
    first, second = (below(each, f"periods/{i}/blocks/0/") for i in range(2))
    summed = {path: first[path][0] + second[path][0] for path in first}
    assert_trees_close("gradient", below(gradients(made, params), "shared/x/"), summed, TOLERANCE["fp32_model"])


def test_common_weights_are_counted_once():
    same, apart = plan("x,swa,x", **common()), plan("attn,swa,attn")
    count = lambda shapes, prefix="": sum(np.prod(s.shape) for s in below(shapes, prefix).values())  # noqa: E731
    one = count(apart.shapes, "periods/0/")
    assert count(same.shapes) == count(apart.shapes) - one
    assert count(same.shapes, "shared/x/") == one
    assert not below(same.shapes, "periods/0/")


def test_changes_stand_where_they_are_told():
    made = plan("2*x", **common(**LORA))
    found = {path.split("/")[5] for path in made.shapes if "/changes/" in path}
    mixer = ("qkv.q", "qkv.k", "qkv.v", "project")
    assert found == {f"mixer.{name}.kernel" for name in mixer} | {"ffn.gate.kernel", "ffn.down.kernel"}
    change = "periods/0/blocks/0/changes/mixer.qkv.q.kernel/"
    assert (made.shapes[change + "down"].shape, made.shapes[change + "up"].shape) == ((2, D, 2), (2, 2, 8))
    assert made.meta[change + "up"].axes == ("layers", "rank", "inner")


def test_changes_start_as_none():
    rngs, kinds = nnx.Rngs(0), {"matrix": ((-3,), (-2, -1))}
    weight = param(rngs, jax.nn.initializers.normal(), (64, 4, 16), ("embed", "heads", "head_dim"), **kinds)
    change = LowRank(weight, 8, rngs=rngs)
    assert_equal("W", change(weight[...]), weight[...])
    assert 0.9 < float(jnp.std(change.down[...])) * 64**0.5 < 1.1


def test_places_in_a_scan_have_changes_of_their_own():
    made, apart = (plan("3*x", scan=scan, **common(**LORA)) for scan in (True, False))
    params = drawn(made.shapes)
    assert_close("hidden", hidden(made, params), hidden(apart, unstacked(made, params)), TOLERANCE["fp32_model"])


# ------------------------------------------------------------------------------------------- blocks that feed mixers


FED = {
    "a": {
        "mixer": "attn",
        "options": {"heads": 4, "kv_heads": 2, "key_dim": 6, "value_dim": 5},
        "ffn": "swiglu",
        "shared": True,
        **LORA,
    },
    "by": {"mixer": "swa", "feed": "a"},
}


def fed(p: dict[str, np.ndarray], places: int) -> np.ndarray:
    """x <- x + mixer(norm(x + W F([x, e]))), F(u) = FFN(norm(attention(norm u))), changed at every place."""
    e = x = p["embed/weight"][IDS]
    common, seen = below(p, "shared/a/"), visible(POSITIONS, SEG)
    for i in range(places):
        own = {path: value[0] for path, value in below(p, f"periods/{i}/blocks/0/").items()}
        changes = below(own, "feed/changes/")

        def weight(name: str, changes: dict = changes) -> np.ndarray:
            w, path = common[f"{name}/kernel"], f"{name.replace('/', '.')}.kernel"
            return (
                w + (changes[f"{path}/down"] @ changes[f"{path}/up"]).reshape(w.shape)
                if f"{path}/down" in changes
                else w
            )

        u = rms(np.concatenate([x, e], axis=-1), common["mixer_norm/weight"])
        q, k, v = (np.tensordot(u, weight(f"mixer/qkv/{name}"), 1) for name in "qkv")
        z = attention(rope(q, POSITIONS), rope(k, POSITIONS), v, seen)
        f = rms(np.tensordot(z, common["project/kernel"], 2), common["ffn_norm/weight"])
        f = (silu(f @ weight("ffn/gate")) * (f @ weight("ffn/up"))) @ weight("ffn/down")
        y, _ = swa_layer(own, x + f @ own["feed_out/kernel"], POSITIONS, visible(POSITIONS, SEG, 4))
        x = y - f @ own["feed_out/kernel"]
    return rms(x, p["norm/weight"])


def test_a_common_block_feeds_the_mixer_of_its_places():
    made = plan("2*by", ffn="none", blocks=FED, scan=False)
    params = drawn(made.shapes)
    assert params["shared/a/mixer/qkv/q/kernel"].shape == (2 * D, 4, 6)
    assert {path.split("/")[6] for path in params if "/changes/mixer" in path} == {
        f"mixer.qkv.{n}.kernel" for n in "qkv"
    }
    assert_close("hidden", hidden(made, params), fed(fp64(params), 2), TOLERANCE["fp32_model"])
    scanned = plan("2*by", ffn="none", blocks=FED)
    stacked = {path: p for path, p in params.items() if not path.startswith("periods/")}
    stacked |= {
        f"periods/0/{path}": jnp.concatenate([p, params[f"periods/1/{path}"]])
        for path, p in below(params, "periods/0/").items()
    }
    assert_close("hidden", hidden(scanned, stacked), fed(fp64(params), 2), TOLERANCE["fp32_model"])


def test_decoding_keeps_a_state_of_the_feeding_block_for_every_place():
    made = plan("by,swa,by", ffn="none", blocks=FED)
    params = drawn(made.shapes)
    whole = jax.jit(lambda p: made.merge(p)(IDS))(params)
    assert_close("logits", in_pieces(made, params, IDS, 6), whole, TOLERANCE["fp32_model"])


def test_a_common_block_may_be_fed_itself():
    both = FED | {"s": {"mixer": "swa", "feed": "a", "shared": True}}
    made, apart = plan("2*s", ffn="none", blocks=both, scan=False), plan("2*by", ffn="none", blocks=both, scan=False)
    params = drawn(made.shapes)
    copies = {path: p for path, p in params.items() if not path.startswith("shared/s/")}
    copies |= {
        f"periods/{i}/blocks/0/{path}": p[None] for i in range(2) for path, p in below(params, "shared/s/").items()
    }
    assert_close("hidden", hidden(made, params), hidden(apart, copies), TOLERANCE["fp32_model"])
