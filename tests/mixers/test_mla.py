"""What is particular to mla: the equations as published, latents instead of keys and values, positions of a part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.core.build import build
from hydrax.core.typing import PyTree
from hydrax.mixers import Context
from hydrax.mixers.softmax.mla import Config, LatentAttention
from tests.contract.cases import inside, normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

pytestmark = pytest.mark.thorough

D, T, SPLIT = 16, 13, 5
SIZES = {"heads": 3, "kv_rank": 10, "nope_dim": 6, "rope_dim": 4, "value_dim": 5}
EPS = 1e-2
SEG = np.stack([segments([T], T), segments([3, 9], T), segments([SPLIT, 8], T)])
PLACES, STARTS = inside(SEG)
ROPES = pytest.mark.parametrize("rope", [{}, {"style": "interleaved", "theta": 100.0}, {"fraction": 0.0}], ids=str)


def made(**options: object) -> LatentAttention:
    """With no parameter at its initial value."""
    cfg = build(Config, {**SIZES, "norm_eps": EPS, **options}).fill(D)
    graph, state = nnx.split(LatentAttention(D, cfg, rngs=nnx.Rngs(0)))
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 0.3 * normal(1, *x.shape)), state))


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight


def turned(x: np.ndarray, cfg: Config) -> np.ndarray:
    """x [B,T,H,4], two complex numbers per head, turned by the angles of its positions."""
    interleaved = x if cfg.rope.style == "interleaved" else x[..., [0, 2, 1, 3]]
    pairs = interleaved[..., ::2] + 1j * interleaved[..., 1::2]
    pairs = pairs * np.exp(1j * PLACES[..., None, None] * cfg.rope.theta ** -np.array([0, 0.5]))
    out = np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)
    return out if cfg.rope.style == "interleaved" else out[..., [0, 2, 1, 3]]


def as_published(mixer: LatentAttention, x: np.ndarray) -> np.ndarray:
    """y of the equations in arXiv 2405.04434 §2.1 for packed rows, in fp64."""
    p = {"/".join(map(str, k)): np.asarray(v[...], np.float64) for k, v in nnx.to_flat_state(nnx.state(mixer))}
    n, place = mixer.cfg.nope_dim, functools.partial(turned, cfg=mixer.cfg)
    if mixer.cfg.rope.fraction == 0:
        place = np.asarray
    c = rms(x @ p["latent/down/kernel"], p["latent/norm/weight"])
    source = rms(x @ p["q_latent/down/kernel"], p["q_latent/norm/weight"]) if mixer.cfg.q_rank else x
    q, k, v = (np.tensordot(a, p[f"{name}/kernel"], 1) for a, name in ((source, "q"), (c, "k"), (c, "v")))
    q_r, k_r = place(q[..., n:]), place(np.tensordot(x, p["k_rope/kernel"], 1))
    z = np.einsum("bthk,bshk->bhts", q[..., :n], k) + np.einsum("bthk,bsgk->bhts", q_r, k_r)
    seen = (SEG[:, :, None] == SEG[:, None]) & (SEG[:, None] != 0) & np.tri(T, dtype=bool)
    weights = np.where(seen[:, None], np.exp(z / np.sqrt(q.shape[-1])), 0)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return np.tensordot(np.einsum("bhts,bshv->bthv", weights, v), p["project/kernel"], 2)


@ROPES
@pytest.mark.parametrize("q_rank", [None, 7])
def test_it_follows_the_published_equations(q_rank: int | None, rope: dict) -> None:
    mixer, x = made(q_rank=q_rank, rope=rope), normal(2, *SEG.shape, D)
    y, _ = jax.jit(lambda x: mixer(x, Context.of(x, jnp.asarray(SEG))))(x)
    assert_close("y", y, as_published(mixer, x.astype(np.float64)), TOLERANCE["fp32_op"])


def in_two_calls(mixer: LatentAttention, x: jax.Array) -> tuple[jax.Array, PyTree]:
    """The second of them continues the first, in one row the same document."""
    _, state = mixer(
        x[:, :SPLIT], Context.of(x[:, :SPLIT], jnp.asarray(SEG[:, :SPLIT])), mixer.init_state(3, T, x.dtype)
    )
    ids, positions = jnp.asarray(SEG[:, SPLIT:]), jnp.asarray(PLACES[:, SPLIT:])
    ctx = Context(positions, ids, starts=jnp.asarray(STARTS[:, SPLIT] & (SEG[:, SPLIT] != 0)))
    return mixer(x[:, SPLIT:], ctx, state)


@ROPES
def test_absorbed_queries_read_what_expanded_keys_tell(rope: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, state and all gradients of a prefill into a filled cache, both ways; and of one call without a cache."""
    mixer, x = made(rope=rope), jnp.asarray(normal(3, 3, T, D))
    graph, params = nnx.split(mixer)
    real = jnp.asarray(SEG[:, SPLIT:, None] != 0)
    weights = real * normal(4, 3, T - SPLIT, D)

    def run(params: PyTree, x: jax.Array) -> tuple[jax.Array, tuple]:
        y, state = in_two_calls(nnx.merge(graph, params), x)
        return jnp.sum(y * weights), (y * real, state)

    def whole(params: PyTree, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = nnx.merge(graph, params)(x, Context.of(x, jnp.asarray(SEG)))[0][:, SPLIT:]
        return jnp.sum(y * weights), y * real

    found = {}
    for absorbs in (True, False):
        monkeypatch.setattr(Config, "absorbs", lambda self, tokens, absorbs=absorbs: absorbs)
        found[absorbs] = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))(params, x)
    assert_trees_close("absorbed", found[True], found[False], TOLERANCE["fp32_op"])
    gradients, y = jax.jit(jax.grad(whole, argnums=(0, 1), has_aux=True))(params, x)
    assert_trees_close("in two calls", (found[True][0], found[True][1][0]), (gradients, y), TOLERANCE["fp32_op"])
    assert np.any(np.asarray(found[True][1][0] != found[False][1][0])), "both are the same program"


def test_the_cheaper_way_is_taken() -> None:
    """FLOPs per key: scores and reads of all queries, and what the keys and values of a head take to make."""
    rng = np.random.default_rng(0)
    seen = set()
    for r, n, k, v, tokens in rng.integers(1, 40, (200, 5)).tolist():
        cfg = Config(kv_rank=r, nope_dim=n, rope_dim=k, value_dim=v)
        absorbed, expanded = tokens * (r + k + r), tokens * (n + k + v) + r * (n + v)
        assert cfg.absorbs(tokens) == (absorbed < expanded)
        seen.add(cfg.absorbs(tokens))
    assert seen == {True, False}
    published = Config(**Config.PRESETS["kimi"])
    assert [published.absorbs(tokens) for tokens in (1, 170, 171, 4096)] == [True, True, False, False]


def test_training_expands_and_a_step_absorbs(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x, taken = made(), jnp.asarray(normal(8, 1, T, D)), []
    for name in ("_expanded", "_absorbed"):
        way = getattr(LatentAttention, name)
        monkeypatch.setattr(LatentAttention, name, lambda *args, name=name, way=way: taken.append(name) or way(*args))
    for tokens, state in (
        (T, None),
        (1, None),
        (T, mixer.init_state(1, T, x.dtype)),
        (1, mixer.init_state(1, T, x.dtype)),
    ):
        jax.eval_shape(lambda x, state: mixer(x, Context.of(x), state), x[:, :tokens], state)
    assert [mixer.cfg.absorbs(tokens) for tokens in (T, 1)] == [False, True]
    assert taken == ["_expanded", "_expanded", "_expanded", "_absorbed"]


@ROPES
def test_the_state_is_latents_and_turned_keys(rope: dict) -> None:
    mixer, x = made(rope=rope), jnp.asarray(normal(5, 1, 4, D))
    _, state = mixer(x, Context.of(x), mixer.init_state(1, 6, jnp.float32))
    assert_equal("c", state["v"][:, :4, 0], mixer.latent(x))
    plain, places = mixer.k_rope(x), Context.of(x).positions
    assert_equal("k_r", state["k"][:, :4], mixer.cfg.rope.turn(plain, places))
    assert np.array_equal(state["k"][:, 1:4], plain[:, 1:]) == (mixer.cfg.rope.fraction == 0)
    assert sum(a.shape[2] * a.shape[3] for a in (state["k"], state["v"])) == SIZES["kv_rank"] + SIZES["rope_dim"]


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_only_turned_channels_know_positions(fraction: float) -> None:
    mixer, x = made(rope={"fraction": fraction}), jnp.asarray(normal(6, 1, T, D))
    places = Context.of(x).positions
    run = jax.jit(lambda positions: mixer(x, Context(positions))[0])
    near, far, later = (run(positions) for positions in (places, 3 * places, places + 40))
    assert np.array_equal(near, far) == (fraction == 0)
    assert_close("all moved alike", later, near, TOLERANCE["fp32_op"])


def test_a_tap_on_values_sees_them_beside_a_cache_too() -> None:
    """A step would not form values: it does where someone wants them."""
    mixer, x = made(), jnp.asarray(normal(7, 2, 1, D))
    assert mixer.cfg.absorbs(1)
    seen = []

    def tap(v: jax.Array) -> jax.Array:
        seen.append(v.shape)
        return 0 * v

    y, _ = mixer(x, Context.of(x, taps={"values": tap}), mixer.init_state(2, 4, x.dtype))
    assert seen == [(2, 5, 3, 5)]
    assert_equal("y of no values", y, jnp.zeros_like(y))


@pytest.mark.parametrize(
    ("options", "d_model", "expected"),
    [
        ({"heads": 16}, 1024, {"nope_dim": 64, "rope_dim": 32, "value_dim": 64, "kv_rank": 256, "q_rank": None}),
        ({"nope_dim": 1}, 30, {"rope_dim": 1, "kv_rank": 4}),
        (Config.PRESETS["kimi"], 2304, SIZES | Config.PRESETS["kimi"]),
    ],
)
def test_widths_that_follow_from_the_model(options: dict, d_model: int, expected: dict) -> None:
    filled = build(Config, options).fill(d_model)
    plain = {name: getattr(filled, name) for name in expected if name != "rope"}
    assert plain == {name: value for name, value in expected.items() if name != "rope"}
    assert filled.fill(d_model) == filled
