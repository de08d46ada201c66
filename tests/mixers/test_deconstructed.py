"""The mixers of "Deconstructing Attention" against their formulas over all pairs of tokens, in fp64: outputs, all
gradients, documents, decoding. And what each of them does not depend on."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax import mixers
from hydrax.core import tree
from hydrax.core.build import ConfigError, build
from hydrax.core.typing import Array
from hydrax.interp import effective_attention as ea
from hydrax.mixers import Context, Mixer
from hydrax.mixers.linear import nonapprox, taylor
from hydrax.mixers.softmax import fixedqk, mlp
from tests.contract.cases import inside, normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

pytestmark = pytest.mark.thorough

D, T, SPLIT = 32, 37, 25
SEG = np.stack([segments((20, 1, 13), T), segments((T,), T), segments((1, 17, 12, 7), T)])
POSITIONS, STARTS = inside(SEG)
REAL = (SEG != 0)[..., None]
X, E, COTANGENTS = (normal(i, *SEG.shape, D) for i in range(3))
VISIBLE = (SEG[:, :, None] == SEG[:, None]) & np.tri(T, dtype=bool) & REAL

Params = dict[str, Array]
Formula = Callable[[Params, Array, Array, Any], Array]


# ----------------------------------------------------------------------------------- the formulas, dense and in fp64


def turned(x: Array) -> Array:
    """RoPE of [B,T,H,K]."""
    half = x.shape[-1] // 2
    angles = POSITIONS[..., None, None] * 10000.0 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], axis=-1)


def rms(x: Array) -> Array:
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def silu(x: Array) -> Array:
    return x / (1 + jnp.exp(-x))


def scores(q: Array, k: Array) -> Array:
    """K^-½ q_t·k_s [B,H,T,S], every key repeated for the queries of its group."""
    return jnp.einsum("bthk,bshk->bhts", q, jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)) / np.sqrt(q.shape[-1])


def average(weights: Array, v: Array) -> Array:
    """Σ_s w_ts v_s / Σ_s w_ts over the visible s, in fp64; 0 where none is."""
    w = jnp.where(VISIBLE[:, None], weights, 0)
    total = w.sum(-1, keepdims=True)
    w = w / jnp.where(total == 0, 1, total)
    return jnp.einsum("bhts,bshv->bthv", w, jnp.repeat(v, w.shape[1] // v.shape[2], axis=2))


def projected(p: Params, name: str, x: Array) -> Array:
    return jnp.einsum("btd,dhk->bthk", x, p[f"{name}/kernel"])


def out(p: Params, o: Array) -> Array:
    return jnp.einsum("bthv,hvd->btd", o, p["project/kernel"])


def mlp_formula(p: Params, x: Array, e: Array, cfg: mlp.Config) -> Array:
    return (silu(x @ p["gate/kernel"]) * (x @ p["up/kernel"])) @ p["project/kernel"]


def taylor_formula(p: Params, x: Array, e: Array, cfg: taylor.TaylorConfig) -> Array:
    s = scores(turned(projected(p, "q", x)), turned(projected(p, "k", x)))
    return out(p, average(1 + s + s**2 / 2, projected(p, "v", x)))


def nonapprox_formula(p: Params, x: Array, e: Array, cfg: nonapprox.Config) -> Array:
    q, k = silu(projected(p, "q", x)), projected(p, "k", x)
    if cfg.qk_norm == "head":
        q, k = rms(q) * p["q_norm/weight"], rms(k) * p["k_norm/weight"]
    s = (q * k).sum(-1) / np.sqrt(q.shape[-1])
    return out(p, average(jnp.exp(jnp.moveaxis(s, 1, 2)[:, :, None]), projected(p, "v", x)))


def softmax_formula(p: Params, x: Array, e: Array) -> Array:
    s = scores(turned(projected(p, "qkv/q", e)), turned(projected(p, "qkv/k", e)))
    return out(p, average(jnp.exp(s), projected(p, "qkv/v", x)))


def fixedqk_formula(p: Params, x: Array, e: Array, cfg: fixedqk.Config) -> Array:
    """The stream as a table over positions, each drawn by itself."""
    key = jax.random.key(cfg.seed, impl="threefry2x32")
    rows = [jax.random.normal(jax.random.fold_in(key, t), (D,), jnp.float32) for t in range(T)]
    return softmax_formula(p, x, cfg.sigma * jnp.stack(rows).astype(x.dtype)[POSITIONS])


def staticqk_formula(p: Params, x: Array, e: Array, cfg: Any) -> Array:
    return softmax_formula(p, x, rms(e))


HEADS = {"heads": 2, "key_dim": 6, "value_dim": 8}
CASES: dict[str, tuple[str, dict[str, Any], Formula]] = {
    "mlp": ("mlp", {}, mlp_formula),
    "taylor": ("taylor", HEADS, taylor_formula),
    "nonapprox": ("nonapprox", HEADS, nonapprox_formula),
    "nonapprox_normed": ("nonapprox", {**HEADS, "qk_norm": "head"}, nonapprox_formula),
    "fixedqk": ("fixedqk", {"heads": 4, "kv_heads": 2, "sigma": 0.7, "seed": 3}, fixedqk_formula),
    "staticqk": ("staticqk", {"heads": 4, "kv_heads": 2}, staticqk_formula),
}
EVERY = pytest.mark.parametrize("name", CASES)


# ---------------------------------------------------------------------------------------------------------- the mixers


def make(name: str, d_model: int = D, **options: Any) -> Mixer:
    cls = mixers.get(name)
    return cls(d_model, build(cls.Config, options).fill(d_model), rngs=nnx.Rngs(0))


@functools.cache
def case(name: str) -> tuple[Mixer, nnx.GraphDef, Params, Formula]:
    """A mixer, its structure and its parameters, of which none is 1 or 0."""
    mixer, options, formula = CASES[name]
    module = make(mixer, **options)
    graph, state = nnx.split(module)
    flat = nnx.to_flat_state(state)
    params = {
        "/".join(path): jnp.asarray(np.asarray(v[...]) + 0.1 * normal(i, *v.shape)) for i, (path, v) in enumerate(flat)
    }
    return module, graph, params, formula


def merged(name: str, params: Params) -> Mixer:
    _, graph, _, _ = case(name)
    flat = [(path, v.replace(params["/".join(path)])) for path, v in nnx.to_flat_state(nnx.split(case(name)[0])[1])]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def context(part: Any, e: Array, **facts: Any) -> Context:
    return Context(positions=jnp.asarray(POSITIONS[part]), segment_ids=jnp.asarray(SEG[part]), embeddings=e, **facts)


def whole(name: str, params: Params, x: Array, e: Array, impl: str | None) -> Array:
    return merged(name, params)(x, context(np.s_[:], e, impl=impl))[0] * REAL


@functools.cache
def expected(name: str) -> tuple[np.ndarray, Any]:
    """The formula and its gradients of parameters, x and e, for one cotangent."""
    _, _, params, formula = case(name)
    cfg = case(name)[0].cfg
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, X, E))
        y, pullback = jax.vjp(jax.jit(lambda p, x, e: formula(p, x, e, cfg) * REAL), *wide)
        return jax.tree.map(np.asarray, (y, pullback(jnp.asarray(COTANGENTS, jnp.float64))))


@EVERY
@pytest.mark.parametrize("impl", ["recurrent", "chunked", None])
def test_outputs_and_gradients_are_those_of_the_formula(name: str, impl: str | None) -> None:
    y, gradients = expected(name)
    assert np.any(gradients[2]) == (name == "staticqk"), "embeddings"

    @jax.jit
    def run(params: Params, x: Array, e: Array) -> tuple:
        found, pullback = jax.vjp(lambda *a: whole(name, *a, impl), params, x, e)
        return found, pullback(jnp.asarray(COTANGENTS))

    found = run(case(name)[2], X, E)
    assert_close("y", found[0], y, TOLERANCE["fp32_op"])
    assert_trees_close("gradient", found[1], gradients, TOLERANCE["fp32_op"])


@EVERY
def test_prefill_and_steps_give_the_formula(name: str) -> None:
    """Documents that start in a step too; the embeddings are those of the tokens of each call."""

    @jax.jit
    def run(params: Params, x: Array) -> Array:
        module = merged(name, params)
        state = module.init_state(len(SEG), T, jnp.float32)
        first, state = module(x[:, :SPLIT], context(np.s_[:, :SPLIT], E[:, :SPLIT]), state)

        def step(state: Any, now: tuple) -> tuple:
            x, e, positions, starts, seg = now
            ctx = Context(positions=positions[:, None], segment_ids=seg[:, None], starts=starts, embeddings=e[:, None])
            y, state = module.step(x, ctx, state)
            return state, y

        later = jax.tree.map(lambda a: jnp.moveaxis(jnp.asarray(a)[:, SPLIT:], 1, 0), (x, E, POSITIONS, STARTS, SEG))
        return jnp.concatenate([first, jnp.moveaxis(jax.lax.scan(step, state, later)[1], 0, 1)], axis=1) * REAL

    starts = STARTS[:, SPLIT:] & (SEG[:, SPLIT:] != 0)
    assert starts.any()
    assert_close("y", run(case(name)[2], X), expected(name)[0], TOLERANCE["fp32_op"])


# ------------------------------------------------------------------------------------------------- what is particular


def outputs(module: Mixer, x: np.ndarray, **facts: Any) -> np.ndarray:
    return np.asarray(jax.jit(lambda x: module(x, Context.of(x, **facts))[0])(jnp.asarray(x)))


def test_mlp_mixes_nothing_and_has_no_state() -> None:
    module, x = make("mlp"), normal(0, 1, T, D)
    assert module.init_state(2, T, jnp.float32) == {}
    order = np.random.default_rng(0).permutation(T)
    # Not bit by bit: on some CPUs a product rounds the last rows of its tiles differently.
    assert_close("permuted", outputs(module, x[:, order]), outputs(module, x)[:, order], TOLERANCE["fp32_op"])


@pytest.mark.parametrize("d_model", [64, 256, 1024, 2048])
def test_mlp_has_as_many_parameters_as_attention(d_model: int) -> None:
    width = mlp.Config().fill(d_model).inner_dim
    assert width % 8 == 0 and abs(3 * width / (4 * d_model) - 1) < 0.05 * 64 / d_model
    ours, theirs = (nnx.eval_shape(lambda n=n: nnx.state(make(n, d_model), nnx.Param)) for n in ("mlp", "attn"))
    assert abs(tree.count(ours) / tree.count(theirs) - 1) < 0.05 * 64 / d_model
    assert mlp.Config(inner_dim=5).fill(d_model).inner_dim == 5


def attended(module: Mixer, x: np.ndarray, e: np.ndarray) -> np.ndarray:
    """The weights of the values [B,H,T,T]."""
    ctx = context(np.s_[:], jnp.asarray(e))
    return np.asarray(jax.jit(lambda x: ea.probe(module, x, ctx))(jnp.asarray(x)))


def test_fixedqk_has_one_map_for_all_texts() -> None:
    """A row of one document has that of every other one; another seed makes another."""
    A = attended(make("fixedqk"), X, E)
    assert_equal("of another text", attended(make("fixedqk"), E, X), A)
    assert_close("of another document", A[0, :, :20, :20], A[1, :, :20, :20], TOLERANCE["fp32_op"])
    assert np.abs(attended(make("fixedqk", seed=1), X, E) - A).max() > 0.1


def test_staticqk_has_the_map_of_its_embeddings() -> None:
    module = make("staticqk")
    A = attended(module, X, E)
    assert_equal("of another input", attended(module, E, E), A)
    assert_close("of large embeddings", attended(module, X, 100 * E), A, TOLERANCE["fp32_op"])
    assert np.abs(attended(module, X, X) - A).max() > 0.1
    assert_close("outside a model", outputs(module, X), outputs(module, X, embeddings=jnp.asarray(X)), 1e-6)


def test_the_stream_of_positions_is_normal_and_the_same_wherever_they_stand() -> None:
    positions = jnp.asarray([[0, 1, 2, 3], [3, 2, 1, 1_000_000]], jnp.int32)
    e = np.asarray(jax.jit(lambda p: fixedqk.stream(p, 4096, 0))(positions))
    assert_equal("reversed", e[1, :3], e[0, 3:0:-1])
    assert_close("alone", fixedqk.stream(positions[1:, 3:], 4096, 0)[0, 0], e[1, 3], 1e-6)
    apart = np.concatenate([e[0], e[1, 3:]])
    assert_close("moments", apart @ apart.T / 4096, np.eye(5), 0.1)


@pytest.mark.parametrize("qk_norm", ["none", "head"])
def test_scores_of_nonapprox_are_bounded_by_a_norm_alone(qk_norm: str) -> None:
    """Without one the scores grow with the square of the input; outputs stay averages of values."""
    module = make("nonapprox", heads=2, qk_norm=qk_norm)
    x = 100 * X
    size = float(jnp.abs(module._scores(jnp.asarray(x))).max())
    assert size <= 4.001 if qk_norm == "head" else size > 1e3
    z, state = module.mix(jnp.asarray(x), Context.of(x), None)
    v = np.asarray(module.v(jnp.asarray(x)))
    assert np.all(z <= np.maximum.accumulate(v, axis=1) + 1e-2)
    assert np.all(z >= np.minimum.accumulate(v, axis=1) - 1e-2)
    assert np.isfinite(state["memory"]["numerator"]).all()
    assert (np.abs(state["max"]).max() > 1e3) == (qk_norm == "none")


def test_taylor_in_bf16_keeps_weights_that_are_small_sums_of_large_products() -> None:
    """Long queries and keys that are nearly orthogonal: products of features are hundreds of times their sums w."""
    module = make("taylor", heads=1, value_dim=8, rope={"fraction": 0.0}, chunk_size=16)
    rng = np.random.default_rng(0)
    long, across = 10 * rng.normal(size=(2, 16))
    across -= long * (long @ across) / (long @ long)
    for linear, direction in ((module.q, long), (module.k, across)):
        linear.kernel[...] = jnp.asarray(np.eye(D)[:, :1, None] * direction, jnp.float32)
    x = jnp.asarray(np.where(np.arange(D) == 0, 1 + 0.1 * X, X), jnp.bfloat16)
    low = module.mix(x, context(np.s_[:], None), None)[0]
    assert low.dtype == jnp.bfloat16
    q, k, v = (np.asarray(linear(x), np.float64) for linear in (module.q, module.k, module.v))
    s = np.einsum("bthk,bshk->bhts", q, k) / 4
    products = np.einsum("bthk,bshk->bhts", q**2, k**2) / 32
    assert np.median(products / (1 + s + s**2 / 2)) > 100
    with jax.enable_x64(True):
        want = average(1 + s + s**2 / 2, v)
    assert_close("z", low.astype(jnp.float32) * REAL[..., None], want, TOLERANCE["bf16_output"])


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        (taylor.TaylorConfig(), {"key_dim": 16, "value_dim": 16, "state_shape": (4, 153, 17)}),
        (taylor.TaylorConfig(heads=3, value_dim=5), {"value_dim": 5}),
        (nonapprox.Config(), {"key_dim": 16, "value_dim": 16}),
        (fixedqk.Config(kv_heads=2), {"kv_heads": 2, "key_dim": 16, "value_dim": 16, "sigma": 1.0}),
    ],
)
def test_widths_that_follow_from_the_model(cfg: Any, expected: dict) -> None:
    filled = cfg.fill(64)
    assert {name: getattr(filled, name) for name in expected} == expected
    assert filled.fill(64) == filled


@pytest.mark.parametrize("name", ["taylor", "nonapprox", "fixedqk", "staticqk"])
def test_heads_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="heads = 3: expected a divisor of d_model = 32"):
        make(name, heads=3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nonapprox", {"qk_norm": "full"}, "qk_norm = 'full': expected one of none, head"),
        ("fixedqk", {"sigma": 0.0}, "sigma = 0.0: expected a number > 0"),
        ("fixedqk", {"seed": -1}, "seed = -1: expected an integer >= 0"),
        ("mlp", {"inner_dim": 0}, "inner_dim = 0: expected an integer >= 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, **options)
