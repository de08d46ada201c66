"""attn and swa: their options against a formula in fp64, keys that another layer lends, a switch from RoPE to NoPE."""

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
from tests.contract.cases import inside, normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_equal

pytestmark = pytest.mark.thorough

D, T, H, G, K = 16, 13, 4, 2, 4
SIZES: dict[str, Any] = {"heads": H, "kv_heads": G, "key_dim": K}
RING: dict[str, Any] = {"swa": {"window": 5, "sink_tokens": 2}, "attn": {}}
SEG = np.stack([segments((6, 7), T), segments((10,), T)])


def made(name: str, seed: int = 0, **options: Any) -> Mixer:
    """A mixer of which no parameter is zero."""
    cls = mixers.get(name)
    mixer = cls(D, build(cls.Config, {**SIZES, **RING[name], **options}).fill(D), rngs=nnx.Rngs(seed))
    for i, (_, p) in enumerate(nnx.to_flat_state(nnx.state(mixer))):
        p[...] = jnp.asarray(np.asarray(p[...]) + 0.1 * normal(100 * seed + i, *p.shape))
    return mixer


def names(mixer: Mixer) -> set[str]:
    return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(mixer))}


# ------------------------------------------------------------------------------------------------------------- options


def turned(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """RoPE of [T,H,K] as a product of complex numbers."""
    z = x[..., : K // 2] + 1j * x[..., K // 2 :]
    z = z * np.exp(1j * positions[:, None, None] * 10000.0 ** (-np.arange(K // 2) / (K // 2)))
    return np.concatenate([z.real, z.imag], axis=-1)


def by_formula(mixer: Mixer, x: np.ndarray) -> np.ndarray:
    """y [B,T,D] in fp64, document by document and query by query."""
    p = {"/".join(map(str, path)): np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(nnx.state(mixer))}
    c, y = mixer.cfg, np.zeros_like(x, np.float64)
    for b, doc in {(b, int(SEG[b, t])) for b, t in np.argwhere(SEG)}:
        rows = np.flatnonzero(SEG[b] == doc)
        t = np.arange(len(rows))
        q, k, v = (
            np.einsum("td,dhk->thk", x[b, rows], p[f"qkv/{n}/kernel"]) + p.get(f"qkv/{n}/bias", 0.0) for n in "qkv"
        )
        q, k = (turned(a, t) if c.rope.fraction else a for a in (q, k))
        if c.q_logscale is not None:
            q = q * (np.log(t + c.q_logscale) / np.log(c.q_logscale))[:, None, None]
        k, v = (np.repeat(a, H // G, axis=1) for a in (k, v))
        z = np.einsum("thk,shk->hts", q, k) * (K**-0.5 if c.scale is None else c.scale)
        z = z if c.softcap is None else c.softcap * np.tanh(z / c.softcap)
        distance = t[:, None] - t
        window = getattr(c, "window", T)
        seen = (distance >= 0) & ((distance < window) | (t < getattr(c, "sink_tokens", 0)))
        w = np.where(seen, np.exp(z - z.max()), 0)
        o = np.einsum("hts,shv->thv", w / w.sum(-1, keepdims=True), v)
        y[b, rows] = np.einsum("thv,hvd->td", o, p["project/kernel"]) + p.get("project/bias", 0.0)
    return y


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.2},
        {"scale": 2.0, "softcap": 1.5},
        {"q_logscale": 2.0},
        {"rope": {"fraction": 0.0}, "q_logscale": 500.0},
        {"bias": True},
        {"out_bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", RING)
def test_options_follow_the_formula(name: str, options: dict[str, Any]) -> None:
    """Positions count from 0 in every document of a packed row."""
    mixer, x = made(name, **options), normal(0, 2, T, D)
    y = jax.jit(lambda x: mixer(x, Context.of(x, jnp.asarray(SEG)))[0])(x)
    want = by_formula(mixer, x)
    assert_close("y", y[SEG != 0], want[SEG != 0], TOLERANCE["fp32_op"])


@pytest.mark.parametrize("name", RING)
def test_biases_are_where_they_are_asked_for(name: str) -> None:
    bare = names(made(name))
    assert names(made(name, bias=True)) - bare == {f"qkv/{n}/bias" for n in "qkv"}
    assert names(made(name, out_bias=True)) - bare == {"project/bias"}


@pytest.mark.parametrize("name", RING)
def test_rope_and_nope_have_the_same_parameters(name: str) -> None:
    """What was trained with rotations goes on without them: equal parameters, other outputs."""
    rope, nope = made(name, qk_norm="head"), made(name, qk_norm="head", rope={"fraction": 0.0})
    trees = [jax.tree.map(lambda p: p.shape, nnx.to_pure_dict(nnx.state(m))) for m in (rope, nope)]
    assert trees[0] == trees[1]
    x = normal(1, 1, T, D)
    nnx.update(nope, nnx.state(rope))
    y, other = (m(x, Context.of(x))[0] for m in (rope, nope))
    assert_close("without a distance", y[:, 0], other[:, 0], TOLERANCE["fp32_op"])
    assert float(jnp.abs(y - other)[:, 1:].max()) > 1e-2


@pytest.mark.parametrize("value", [1.0, 0.5, 0.0])
def test_a_logarithm_needs_a_base_above_one(value: float) -> None:
    with pytest.raises(ConfigError, match=r"q_logscale = .*: expected a number > 1"):
        build(mixers.get("attn").Config, {"q_logscale": value})


@pytest.mark.parametrize("kind", ["elementwise", "headwise"])
def test_an_output_gate_may_start_open(kind: str) -> None:
    """o ⊙ σ(x W_g + b): with W_g = 0, σ(b) of what there is without a gate."""
    config = build(mixers.get("attn").Config, {**SIZES, "out_gate": kind, "out_gate_bias": 1.5}).fill(D)
    gated, plain = mixers.get("attn")(D, config, rngs=nnx.Rngs(1)), made("attn", 1)
    gated.gate.gate.kernel[...] = jnp.zeros_like(gated.gate.gate.kernel[...])
    nnx.update(gated, nnx.state(plain))
    x = normal(1, 1, T, D)
    y, want = (jax.jit(lambda m, x: m(x, Context.of(x))[0])(m, x) for m in (gated, plain))
    assert_close("y", y, want / (1 + np.exp(-1.5)), TOLERANCE["fp32_op"])


def test_a_bias_of_a_gate_needs_the_gate() -> None:
    with pytest.raises(ConfigError, match=r"out_gate_bias = 1.0: needs out_gate = elementwise or headwise"):
        build(mixers.get("attn").Config, {"out_gate_bias": 1.0})


# ----------------------------------------------------------------------------------------------------- keys of another


def pair(name: str) -> tuple[Mixer, Mixer]:
    """A layer with keys, and one that has queries, gate and output projection alone."""
    options = {"qk_norm": "head", "out_gate": "headwise"}
    return made(name, 1, **options), made(name, 2, kv="shared", **options)


@functools.partial(jax.jit, static_argnums=0)
def both(graph: Any, state: Any, x: jax.Array, z: jax.Array, ctx: dict[str, Any], past: Any) -> tuple:
    """Producer on x, then consumer on z with its keys: (y, state) of each."""
    producer, consumer = nnx.merge(graph, state)
    records: dict[str, Any] = {}
    first = producer(x, Context(**ctx, records=records), past[0])
    second = consumer(z, Context(**ctx, keys=records["keys"]), past[1])
    return first, second, records["keys"]


@pytest.mark.parametrize("name", RING)
def test_a_consumer_attends_to_what_the_producer_lends(name: str) -> None:
    """In training, and in prefill and steps from the producer's cache; keys are those of x, queries those of z."""
    producer, consumer = pair(name)
    graph, state = nnx.split((producer, consumer))
    x, z = normal(2, 2, T, D), normal(3, 2, T, D)
    place, ids = jnp.asarray(inside(SEG)[0]), jnp.asarray(SEG)
    q, (k, v) = consumer.qkv(z, place)[0], producer.qkv(x, place)[1:]
    want = consumer.out(consumer.gate(attention(q, k, v, segment_ids=ids, impl="recurrent", **RING[name]), z))

    facts = {"positions": place, "segment_ids": ids}
    (_, none), (y, nothing), keys = both(graph, state, x, z, facts, (None, None))
    assert none is None and nothing is None and keys[2:] == (None, None)
    assert_close("training", y, want, TOLERANCE["fp32_op"])

    past = (producer.init_state(2, T, jnp.float32), consumer.init_state(2, T, jnp.float32))
    assert past[1] == {}
    pieces = []
    for a, b in [(0, 8), *((t, t + 1) for t in range(8, T))]:
        starts = jnp.asarray((SEG[:, a] != SEG[:, a - 1]) & (SEG[:, a] != 0) & (a > 0))
        here = jax.tree.map(lambda f, a=a, b=b: f[:, a:b], facts) | {"starts": starts}
        (_, kept), (y, rest), _ = both(graph, state, x[:, a:b], z[:, a:b], here, past)
        past = (kept, rest)
        pieces.append(y)
    assert past[1] == {}
    assert_close("decoding", jnp.concatenate(pieces, axis=1), want, TOLERANCE["fp32_op"])


@pytest.mark.parametrize("name", RING)
def test_a_consumer_has_no_keys_and_no_state(name: str) -> None:
    producer, consumer = pair(name)
    assert names(producer) - names(consumer) == {"qkv/k/kernel", "qkv/v/kernel", "qkv/k_norm/weight"}
    row = mixers.row(name)
    assert row.state_bytes(consumer.cfg, 100, 2) == 0 < row.state_bytes(producer.cfg, 100, 2)
    assert not row.grows(consumer.cfg)
    x = normal(4, 1, T, D)
    with pytest.raises(ValueError, match="expected the keys of another layer"):
        consumer(x, Context.of(x))


def test_gradients_reach_the_keys_of_the_producer() -> None:
    producer, consumer = pair("attn")
    graph, state = nnx.split((producer, consumer))
    x = normal(5, 1, T, D)

    def loss(state: Any) -> jax.Array:
        ctx = {"positions": jnp.arange(T)[None], "segment_ids": None}
        return both(graph, state, x, x, ctx, (None, None))[1][0].sum()

    grads = nnx.to_pure_dict(jax.grad(loss)(state))[0]
    for part in ("k", "v"):
        assert float(jnp.abs(grads["qkv"][part]["kernel"]).max()) > 1e-3
    assert_equal("queries of the producer", grads["qkv"]["q"]["kernel"], np.zeros((D, H, K)))


def test_values_of_a_consumer_can_be_tapped() -> None:
    producer, consumer = pair("attn")
    x, records = normal(6, 1, T, D), {}
    producer(x, Context.of(x, records=records))
    y, _ = consumer(x, Context.of(x, keys=records["keys"], taps={"values": jnp.zeros_like}))
    assert_equal("y", y, np.zeros_like(y))
