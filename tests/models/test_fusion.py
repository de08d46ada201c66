"""Several mixers in one layer: every fusion against its formula, the order of heads, and what layers reduce to."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.core.build import ConfigError
from hydrax.core.typing import Array
from hydrax.mixers import Context
from tests.models.small import (
    D,
    Layer,
    Params,
    drawn,
    fp64,
    layers,
    normal,
    plan,
    rms,
    softmax,
    tokens,
    unstacked,
)
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

pytestmark = pytest.mark.thorough

T, EPS = 11, 0.1
X = normal("x", 2, T, D)
SEG = jnp.asarray([[1] * T, [1] * 4 + [2] * 5 + [0] * 2], jnp.int32)
FUSIONS: dict[str, dict[str, Any]] = {
    "concat": {},
    "mean_norm": {"norm_eps": EPS},
    "scale_norm": {"norm_eps": EPS},
    "weighted": {},
    "weighted fixed": {"weights": [0.5, -2.0]},
    "weighted learned": {"weights": [0.5, -2.0], "learned": True},
    "softmax_gate": {},
    "hierarchical": {"width": 3},
}
WIDTHS = {"swa": {"heads": 4, "key_dim": 4, "value_dim": 2, "window": 3}}


def layer(mixer: str, fusion: str, pattern: str = "x", index: int = 0, **values: Any) -> Layer:
    """A composition as it is in layer `index` of a pattern, with parameters."""
    options = {"fusion": fusion.split()[0], **FUSIONS.get(fusion, {}), **values.pop("options", {})}
    return Layer.of(layers(pattern, blocks={"x": {"mixer": mixer, "options": options}}, **values)[index].mix)


@functools.partial(jax.jit, static_argnums=0)
def outputs(made: Layer, params: Params, index: int | Array = 0) -> tuple[Array, list[Array]]:
    """y of a composition, and what each of its parts reads."""
    mixer, ctx = made.merge(params), Context.of(X, SEG, layer_index=index)
    parts: Any = getattr(mixer, "parts", [])
    return mixer(X, ctx)[0], [part.mix(X, ctx, None)[0] for part in parts]


def fused(zs: list[Array], p: dict[str, np.ndarray], fusion: str) -> list[np.ndarray]:
    """The parts' heads [B,T,H,V] after the fusion."""
    a, b = (np.asarray(z, np.float64) for z in zs)
    match fusion:
        case "concat" | "weighted":
            return [a, b]
        case "mean_norm":
            return [rms(z, p[f"fusion/norms/{i}/weight"], (-2, -1), EPS) / 2 for i, z in enumerate((a, b))]
        case "scale_norm":
            z = [rms(z, p[f"fusion/norms/{i}/weight"], -1, EPS) for i, z in enumerate((a, b))]
            return [z[i] * p[f"fusion/gains/{i}"][:, None] for i in range(2)]
        case "weighted fixed":
            return [0.5 * a, -2.0 * b]
        case "weighted learned":
            return [p["fusion/learned"][0] * a, p["fusion/learned"][1] * b]
        case "softmax_gate":
            shares = 2 * softmax(np.asarray(X, np.float64) @ p["fusion/gate/kernel"])[..., None, None]
            return [shares[:, :, 0] * a, shares[:, :, 1] * b]
        case "hierarchical":
            q, flat = np.asarray(X, np.float64) @ p["fusion/q/kernel"], [z.reshape(*z.shape[:2], -1) for z in (a, b)]
            keys = [z @ p[f"fusion/keys/{i}/kernel"][0] for i, z in enumerate(flat)]
            shares = 2 * softmax(np.stack([(q * k).sum(-1) for k in keys], -1) * 3**-0.5)[..., None, None]
            return [shares[:, :, 0] * a, shares[:, :, 1] * b]
    raise AssertionError(fusion)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_heads_are_fused_and_joined_in_their_order(fusion: str):
    made = layer("heads(attn[1],swa[3,0,2])", fusion)
    y, zs = outputs(made, made.params)
    p = fp64(made.params)
    attn, swa = fused(zs, p, fusion)
    heads = np.stack([swa[:, :, 1], attn[:, :, 0], swa[:, :, 2], swa[:, :, 0]], axis=2)
    assert_close("y", y, np.tensordot(heads, p["project/kernel"], 2), TOLERANCE["fp32_op"])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_branches_are_fused_and_added(fusion: str):
    """Under one projection, whatever their heads; those that nothing brings to a common scale, side by side."""
    made = layer("parallel(attn,swa)", fusion, mixers=WIDTHS)
    y, zs = outputs(made, made.params)
    assert [z.shape[2:] for z in zs] == [(2, 4), (4, 2)]
    p = fp64(made.params)
    flat = [z.reshape(*z.shape[:2], 8) for z in fused(zs, p, fusion)]
    joined = np.concatenate(flat, axis=-1) if fusion == "concat" else flat[0] + flat[1]
    assert_close("y", y, joined @ p["project/kernel"][0], TOLERANCE["fp32_op"])


def union(mixer: Any, x: Array) -> Array:
    """y of one softmax over the keys of two branches of heads of their own."""
    zs = []
    for part in mixer.parts:
        q, k, v = part.qkv(x, Context.of(x, SEG).positions)
        index = jnp.arange(T)
        seen = (SEG[:, :, None] == SEG[:, None]) & (SEG != 0)[:, None] & (index[:, None] >= index)
        seen &= index[:, None] - index < getattr(part.cfg, "window", T)
        z = jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
        zs.append((jnp.where(seen[:, None], z, -jnp.inf), v))
    z = jnp.concatenate([z for z, _ in zs], axis=-1)
    z = jnp.where((SEG != 0)[:, None, :, None], z, 0)
    v = jnp.concatenate([v for _, v in zs], axis=1)
    o = jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(z), v)
    return mixer.out(o.reshape(*x.shape[:2], 1, -1))


def test_a_flat_fusion_is_one_softmax_over_the_keys_of_all_branches():
    """Outputs and gradients, of whole rows and, outputs, in steps."""
    made = layer("parallel(attn,swa)", "flat")
    real, dy = (SEG != 0)[..., None], normal("dy", 2, T, D)

    def fusion(params: Params, x: Array) -> Array:
        return jnp.where(real, made.merge(params)(x, Context.of(x, SEG))[0], 0)

    def formula(params: Params, x: Array) -> Array:
        return jnp.where(real, union(made.merge(params), x), 0)

    def graded(f: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(dy * f(p, x)), argnums=(0, 1)))(made.params, X)

    assert_close("y", jax.jit(fusion)(made.params, X), jax.jit(formula)(made.params, X), TOLERANCE["fp32_op"])
    assert_trees_close("gradients", graded(fusion), graded(formula), TOLERANCE["fp32_op"])
    state = made.merge().init_state(2, T, jnp.float32)
    whole, _ = jax.jit(made)(made.params, X)
    step = jax.jit(lambda p, x, s, t: made.merge(p)(x, Context(positions=t), s))
    for t in range(T):
        y, state = step(made.params, X[:, t : t + 1], state, jnp.full((2, 1), t, jnp.int32))
        assert_close(f"y at {t}", y[:, 0], whole[:, t], TOLERANCE["fp32_op"])


@pytest.mark.parametrize(
    ("mixer", "mixers", "line"),
    [
        (
            "parallel(attn,gla)",
            {},
            "gla has no lse beside what it averages: expected attn or swa without out_gate or hops",
        ),
        (
            "parallel(attn,swa)",
            {"attn": {"heads": 2, "key_dim": 4, "out_gate": "headwise"}},
            "attn has no lse beside what it averages: expected attn or swa without out_gate or hops",
        ),
        (
            "parallel(attn,swa)",
            {"attn": {"heads": 2, "key_dim": 4, "hops": 2}},
            "attn has no lse beside what it averages: expected attn or swa without out_gate or hops",
        ),
        ("parallel(attn,swa)", WIDTHS, "expected parts of equal heads and value_dim, and they have (2, 4), (4, 2)"),
        ("heads(2*attn,2*swa)", {}, "heads have no keys in common: expected parallel(...)"),
    ],
)
def test_a_flat_fusion_needs_branches_of_one_softmax(mixer: str, mixers: dict[str, Any], line: str):
    with pytest.raises(ConfigError) as error:
        layer(mixer, "flat", mixers=mixers)
    assert str(error.value) == f"blocks.x.options.fusion = 'flat': {line}"


def test_fixed_weights_are_no_parameters_and_learned_ones_start_there():
    for learned in (False, True):
        made = layer("parallel(attn,swa)", "weighted fixed", options={"learned": learned})
        assert ("fusion/learned" in made.params) == learned
    spec = layers(
        "x", blocks={"x": {"mixer": "parallel(attn,swa)", "options": {"fusion": "weighted", "learned": True}}}
    )
    assert_equal("weights", spec[0].mix.build(D, rngs=nnx.Rngs(0)).fusion.learned[...], np.ones(2))


def test_norms_and_gains_start_at_one():
    for fusion in ("mean_norm", "scale_norm"):
        spec = layers("x", blocks={"x": {"mixer": "heads(2*attn,2*swa)", "options": {"fusion": fusion}}})
        _, state = nnx.split(spec[0].mix.build(D, rngs=nnx.Rngs(0)).fusion)
        for path, value in nnx.to_flat_state(state):
            assert_equal(str(path), value[...], np.ones(value.shape))


def test_an_undecided_gate_takes_every_part_once():
    made, bare = layer("parallel(attn,swa)", "softmax_gate"), layer("parallel(attn,swa)", "weighted")
    params = {**made.params, "fusion/gate/kernel": jnp.zeros((D, 2))}
    want, _ = outputs(bare, {path: params[path] for path in bare.params})
    assert_close("y", outputs(made, params)[0], want, TOLERANCE["fp32_op"])


# ------------------------------------------------------------------------------------------------- what reduces to what


@pytest.mark.parametrize("name", ["attn", "gla"])
def test_heads_of_one_kind_are_the_layer_of_that_mixer(name: str):
    """All in one part, or in two parts that are told apart by which heads they have."""
    single = Layer.of(layers(f"heads(4*{name})")[0].mix.members[0])
    want, _ = outputs(single, single.params)
    for mixer, parts in ((f"heads(4*{name})", [[0, 1, 2, 3]]), (f"heads({name}[2],{name}[3,0,1])", [[2], [3, 0, 1]])):
        made = layer(mixer, "concat")
        params = {"project/kernel": single.params["project/kernel"]}
        for i, heads in enumerate(parts):
            params |= {f"parts/{i}/{path}": p for path, p in single.of_heads(single.params, heads).items()}
        params.pop("parts/0/project/kernel"), params.pop("parts/1/project/kernel", None)
        assert params.keys() == made.params.keys()
        assert_close(mixer, outputs(made, params)[0], want, TOLERANCE["fp32_op"])


def test_heads_may_be_permuted_with_the_rows_of_the_projection():
    """Which heads are whose is bookkeeping: the same parameters elsewhere are the same layer."""
    options = {"total": 4, "assignment": [[0, 2], [3, 1]]}
    made = layer("heads(attn,swa)", "scale_norm", "2*x", options=options)
    first, second = [0, 2, 1, 3], [3, 1, 0, 2]  # attention's heads and then the others', in the first and second layer
    rows = made.params["project/kernel"]
    moved = {**made.params, "project/kernel": jnp.zeros_like(rows).at[np.asarray(second)].set(rows[np.asarray(first)])}
    y, _ = outputs(made, made.params, 0)
    assert_close("y", outputs(made, moved, 1)[0], y, TOLERANCE["fp32_op"])
    assert np.abs(outputs(made, made.params, 1)[0] - y).max() > 0.1


def test_scanned_layers_have_heads_of_their_own():
    """Layers that differ in their assignment alone are one scan, and give what layers with pinned heads give."""
    options = {"total": 4, "assignment": [[0], [3], [2]]}
    blocks = {"x": {"mixer": "heads(attn,swa)", "options": options}}
    blocks |= {f"head{i}": {"mixer": f"heads(attn[{i}],swa)", "options": {"total": 4}} for i in (0, 2, 3)}
    scanned = plan("3*x", blocks=blocks, ffn="none")
    apart = plan("head0,head3,head2", scan=False, blocks=blocks, ffn="none")
    assert {path.split("/")[1] for path in scanned.shapes if path.startswith("periods/")} == {"0"}
    params, ids = drawn(scanned.shapes), tokens(2, T)
    own = unstacked(scanned, params)
    y = jax.jit(lambda p: scanned.merge(p).hidden(ids, SEG))(params)
    assert_close("hidden", jax.jit(lambda p: apart.merge(p).hidden(ids, SEG))(own), y, TOLERANCE["fp32_op"])
