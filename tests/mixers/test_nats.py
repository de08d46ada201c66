"""nats: lifetimes by type, what types are worth against a formula in fp64, the cost of keys, and a full cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.mixers import Context, Mixer
from hydrax.ops.softmax import attention
from hydrax.ops.sparse.typed import GLOBAL, LOCAL, OPEN, SLIDING, next_global, typed_ends
from tests.contract.cases import inside, normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

pytestmark = pytest.mark.thorough

D, T, H, G, K, L = 16, 16, 4, 2, 4, 3
SEG = np.stack([segments((6, 10), T), segments((13,), T)])
PLACES = inside(SEG)[0]
KEY = jax.random.key(5)


def made(**options: Any) -> Mixer:
    cls = mixers.get("nats")
    cfg = build(cls.Config, {"heads": H, "kv_heads": G, "key_dim": K, "sliding": L, **options}).fill(D)
    mixer = cls(D, cfg, rngs=nnx.Rngs(0))
    for i, (_, p) in enumerate(nnx.to_flat_state(nnx.state(mixer))):
        p[...] = jnp.asarray(np.asarray(p[...]) + 0.2 * normal(i, *p.shape))
    return mixer


def only(kind: int, **options: Any) -> Mixer:
    """A mixer whose keys are all of one kind, whatever the noise: of inputs whose first channel is 1."""
    mixer = made(**options)
    mixer.scorer[...] = jnp.zeros((D, G, 3)).at[0, :, kind].set(1e3)
    return mixer


def inputs() -> np.ndarray:
    x = normal(0, 2, T, D)
    x[..., 0] = 1
    return x


def context(x: Any, **facts: Any) -> Context:
    return Context.of(x, jnp.asarray(SEG), **facts)


def following(kinds: np.ndarray) -> np.ndarray:
    """n_j [B,T,G]."""
    n = np.full(kinds.shape, OPEN)
    for b, j, g in np.ndindex(kinds.shape):
        later = [t for t in range(j + 1, T) if kinds[b, t, g] == GLOBAL and SEG[b, t] == SEG[b, j] != 0]
        n[b, j, g] = PLACES[b, later[0]] if later else OPEN
    return n


def test_lifetimes_by_type() -> None:
    """Local keys are still seen by the next global one of their document, sliding ones by L more tokens."""
    kinds = np.random.default_rng(0).integers(0, 3, (2, T, G))
    n, last = jax.jit(next_global)(jnp.asarray(kinds), jnp.asarray(PLACES), jnp.asarray(SEG))
    real = SEG != 0
    assert_equal("next global key", n[real], following(kinds)[real])
    lengths = np.stack([[(row == i).sum() for i in row] for row in SEG])
    assert_equal("last token", last[real], lengths[real] - 1)
    ends = np.asarray(typed_ends(jnp.asarray(kinds), jnp.asarray(PLACES), n, L))
    for b, j, g in np.ndindex(kinds.shape):
        want = {GLOBAL: 2**30, LOCAL: n[b, j, g], SLIDING: PLACES[b, j] + L}
        assert ends[b, j, g] == want[int(kinds[b, j, g])]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(GLOBAL, {}, id="global"),
        pytest.param(LOCAL, {}, id="local", marks=pytest.mark.slow),
        pytest.param(SLIDING, {"window": L + 1, "sink_tokens": 1}, id="sliding"),  # the first token is global
    ],
)
def test_one_type_alone(kind: int, options: dict[str, Any]) -> None:
    """All global, or all local and nothing that ends them: causal attention; all sliding: a window. Equal gradients."""
    mixer, x, do = only(kind), inputs(), normal(1, 2, T, D)
    graph, state = nnx.split(mixer)

    def dense(mixer: Mixer, x: jax.Array) -> jax.Array:
        q, k, v = mixer.qkv(x, jnp.asarray(PLACES))
        return mixer.out(attention(q, k, v, segment_ids=jnp.asarray(SEG), impl="xla", **options))

    def loss(state: Any, x: jax.Array, f: Any) -> jax.Array:
        return jnp.sum(f(nnx.merge(graph, state), x) * do * (SEG != 0)[..., None])

    forms = (lambda m, x: m(x, context(x))[0], dense)
    got, want = (jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)(state, x, f) for f in forms)
    assert_trees_close("gradients", nnx.to_pure_dict(got[0]), nnx.to_pure_dict(want[0]), TOLERANCE["fp32_op"])
    assert_close("dx", got[1], want[1], TOLERANCE["fp32_op"])


# ------------------------------------------------------------------------------------------------------------ learning


def drawn(mixer: Mixer, x: np.ndarray, noise: Any = KEY, layer: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Types [B,T,G], and the softmax [B,T,G,3] through which they learn, in fp64."""
    logits = np.einsum("btd,dgn->btgn", x, np.asarray(mixer.scorer[...], np.float64))
    logits += np.asarray(jax.random.gumbel(jax.random.fold_in(noise, layer), logits.shape, jnp.float32), np.float64)
    soft = np.exp(logits - logits.max(-1, keepdims=True))
    soft /= soft.sum(-1, keepdims=True)
    return np.where((PLACES == 0)[..., None], GLOBAL, logits.argmax(-1)), soft


def parts(mixer: Mixer, x: np.ndarray, kinds: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In fp64: outputs y, and M [B,H,T,T], the derivative by a mask of visible keys times their share of all."""
    p = {"/".join(map(str, path)): np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(nnx.state(mixer))}
    q, k, v = (np.asarray(a, np.float64).repeat(H // a.shape[2], 2) for a in mixer.qkv(jnp.asarray(x), PLACES))
    same = (SEG[:, :, None] == SEG[:, None]) & (SEG != 0)[:, None] & np.tri(T, dtype=bool)
    ends = np.where(kinds == GLOBAL, OPEN, np.where(kinds == LOCAL, following(kinds), PLACES[..., None] + L))
    alive = np.moveaxis(ends, 1, 2)[:, :, None] >= PLACES[:, None, :, None]
    z, cap = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(K), mixer.cfg.softcap or 1e9
    e = np.exp(cap * np.tanh(z / cap)) * same[:, None]
    visible = e * alive.repeat(H // G, 1)
    share = e / np.maximum(e.sum(-1, keepdims=True), 1e-30)
    o = np.einsum("bhts,bshv->bthv", visible / np.maximum(visible.sum(-1, keepdims=True), 1e-30), v)
    do = np.einsum("btd,hvd->bthv", dy, p["project/kernel"])
    pull = np.einsum("bthv,bshv->bhts", do, v) - np.einsum("bthv,bthv->bht", do, o)[..., None]
    return np.einsum("bthv,hvd->btd", o, p["project/kernel"]), share * pull


@pytest.mark.parametrize("softcap", [pytest.param(None, marks=pytest.mark.slow), 1.0], ids=str)
def test_the_scorer_learns_what_types_are_worth(softcap: float | None) -> None:
    """Column sums of M over what each type adds, straight through the softmax of the noisy scores."""
    mixer, x = made(detach=False, softcap=softcap), normal(0, 2, T, D)
    dy = normal(1, 2, T, D) * (SEG != 0)[..., None]
    graph, state = nnx.split(mixer)
    run = jax.jit(jax.grad(lambda s, x: _loss(graph, s, x, dy), argnums=(0, 1), has_aux=True))
    (dstate, dx), y = run(state, jnp.asarray(x))

    kinds, soft = drawn(mixer, x)
    assert all((kinds == kind).sum() > 8 for kind in range(3))
    want, M = parts(mixer, x, kinds, dy)
    assert_close("y", y[SEG != 0], want[SEG != 0], TOLERANCE["fp32_op"])
    M, n, t = (
        M.reshape(2, G, H // G, T, T).sum(2),
        np.moveaxis(following(kinds), 1, 2)[:, :, None],
        PLACES[:, None, :, None],
    )
    until = {GLOBAL: t > n, LOCAL: t <= n, SLIDING: t <= PLACES[:, None, None] + L}
    worth = np.stack([np.moveaxis((M * until[kind]).sum(2), 1, 2) for kind in range(3)], -1)
    dlogits = soft * (worth - (soft * worth).sum(-1, keepdims=True)) * (PLACES != 0)[..., None, None]
    assert_close("dW", dstate["scorer"][...], np.einsum("btd,btgn->dgn", x, dlogits), TOLERANCE["fp32_op"])
    # What reaches x by the scorer is the difference to a scorer that reads x without a gradient.
    detached = nnx.split(made(detach=True, softcap=softcap))[0]
    (_, other), _ = jax.jit(jax.grad(lambda s, x: _loss(detached, s, x, dy), argnums=(0, 1), has_aux=True))(state, x)
    through = np.einsum("btgn,dgn->btd", dlogits, np.asarray(mixer.scorer[...], np.float64))
    assert_close("dx by the scorer", dx - other, through, 1e-4)  # a difference of larger numbers


def _loss(graph: Any, state: Any, x: jax.Array, dy: np.ndarray) -> tuple[jax.Array, jax.Array]:
    y = nnx.merge(graph, state)(x, context(x, noise=KEY))[0]
    return jnp.sum(y * dy), y


def test_without_noise_types_are_those_of_the_highest_score_and_nothing_is_learned() -> None:
    mixer, x = made(), normal(0, 2, T, D)
    graph, state = nnx.split(mixer)
    records: dict[str, Any] = {}

    @functools.partial(jax.jit, static_argnums=2)
    def run(state: Any, x: jax.Array, layer: int, noise: Any = None) -> jax.Array:
        return nnx.merge(graph, state)(x, context(x, noise=noise, layer_index=layer, records=records))[0]

    slope = jax.grad(lambda s: jnp.sum(jnp.sin(run(s, x, 0))))(state)
    assert not np.any(slope["scorer"][...]) and np.any(slope["qkv"]["q"]["kernel"][...])
    assert "nats_sparsity" not in records
    logits = np.einsum("btd,dgn->btgn", x, np.asarray(mixer.scorer[...]))
    kinds = np.where((PLACES == 0)[..., None], GLOBAL, logits.argmax(-1))
    assert_close("y", run(state, x, 0)[SEG != 0], parts(mixer, x, kinds, x)[0][SEG != 0], TOLERANCE["fp32_op"])
    first, again, layer, step = (run(state, x, n, k) for n, k in ((0, KEY), (0, KEY), (1, KEY), (0, jax.random.key(6))))
    assert np.array_equal(first, again) and not np.array_equal(first, layer) and not np.array_equal(first, step)


def test_keys_cost_the_queries_that_see_them() -> None:
    """λ Σ_j (n - j)/T for a global key, (n_j - j)/T for a local one, n the length of the document; mean over rows."""
    mixer, x = made(sparsity=0.5), normal(0, 2, T, D)
    kinds, soft = drawn(mixer, x)
    graph, state = nnx.split(mixer)

    @jax.jit
    @jax.value_and_grad
    def cost(state: Any) -> jax.Array:
        records: dict[str, Any] = {}
        nnx.merge(graph, state)(x, context(x, noise=KEY, records=records))
        return records["nats_sparsity"]

    got, slope = cost(state)
    lengths = np.stack([[(row == i).sum() for i in row] for row in SEG])[..., None]
    n = np.minimum(following(kinds), lengths - 1)
    seen = np.stack([np.broadcast_to(lengths - PLACES[..., None], n.shape), n - PLACES[..., None], 0 * n], -1) / T
    seen = seen * (SEG != 0)[..., None, None] * 0.5 / 2
    assert_close("cost", got, (seen * np.eye(3)[kinds]).sum(), TOLERANCE["fp32_op"])
    dlogits = soft * (seen - (soft * seen).sum(-1, keepdims=True)) * (PLACES != 0)[..., None, None]
    assert_close("dW", slope["scorer"][...], np.einsum("btd,btgn->dgn", x, dlogits), TOLERANCE["fp32_op"])


# --------------------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("pieces", [[12], [5, 7], [1] * 12], ids=str)
def test_a_full_cache_drops_the_oldest_local_keys_and_counts_them(pieces: list[int]) -> None:
    mixer, x = only(LOCAL, capacity=5), inputs()[:1, :12]
    state, start = mixer.init_state(1, 100, jnp.float32), 0
    run = jax.jit(lambda x, p, s: mixer(x, Context(positions=p), s)[1])
    for n in pieces:
        state = run(x[:, start : start + n], start + jnp.arange(n)[None], state)
        start += n
    held = np.sort(np.asarray(state["positions"])[0], axis=0)
    assert_equal("kept: the global first one, and the newest", held, np.repeat([[0], [8], [9], [10], [11]], G, 1))
    assert_equal("dropped", state["dropped"], [[7] * G])


def test_only_globals_stay_for_ever() -> None:
    """Sliding keys leave after L tokens: the rest of the cache is empty."""
    mixer, x = only(SLIDING), inputs()[:1]
    _, state = jax.jit(lambda x, s: mixer(x, Context.of(x), s))(x, mixer.init_state(1, T, jnp.float32))
    taken = np.asarray(state["segment_ids"])[0] != 0
    assert sorted(np.asarray(state["positions"])[0][taken[:, 0], 0]) == [0, *range(T - L, T)]


def test_keys_are_not_lent() -> None:
    with pytest.raises(ConfigError, match="kv = 'shared': expected own"):
        build(mixers.get("nats").Config, {"kv": "shared"})
