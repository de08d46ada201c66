"""attn with hops: against the recurrence in fp64 with slopes, special cases, decoding, and what refuses or takes it."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.core.build import ConfigError, build
from hydrax.infer.policy.serve import served_layers
from hydrax.interp.effective_attention import probe
from hydrax.mixers import Context
from hydrax.mixers.softmax.attn import Attention, Config
from hydrax.models import lm
from hydrax.models.cost import cost
from hydrax.models.spec import ModelConfig
from tests.contract import test_hybrids as hybrids
from tests.contract.cases import normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_trees_close

pytestmark = pytest.mark.thorough

D, T, H, G, K = 12, 11, 4, 2, 4
SEG = np.stack([segments((5, 6), T), segments((T,), T)])
ANY = {"qk_norm": "head", "q_logscale": 3.0, "softcap": 4.0, "out_gate": "elementwise", "bias": True}


def made(**options: Any) -> Attention:
    """A mixer of which no parameter is at its first value."""
    cfg = build(Config, {"heads": H, "kv_heads": G, "key_dim": K, **options}).fill(D)
    mixer = Attention(D, cfg, rngs=nnx.Rngs(0))
    for i, (_, p) in enumerate(nnx.to_flat_state(nnx.state(mixer))):
        p[...] = jnp.asarray(np.asarray(p[...]) + 0.3 * normal(i, *p.shape))
    return mixer


def turned(x: np.ndarray, t: int) -> np.ndarray:
    """RoPE of [H,K] at position t."""
    z = (x[:, : K // 2] + 1j * x[:, K // 2 :]) * np.exp(1j * t * 10000.0 ** (-np.arange(K // 2) / (K // 2)))
    return np.concatenate([z.real, z.imag], axis=1)


def rms(x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
    return x if weight is None else x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def by_tokens(c: Config, p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """y [B,T,D] in fp64, token by token and hop by hop."""
    y = np.zeros(x.shape)
    for b, t in np.argwhere(SEG):
        if t == 0 or SEG[b, t] != SEG[b, t - 1]:
            keys: list[np.ndarray] = []
            values: list[np.ndarray] = []
        at = len(keys)
        q, k, v = (np.einsum("d,dhk->hk", x[b, t], p[f"qkv/{n}/kernel"]) + p.get(f"qkv/{n}/bias", 0.0) for n in "qkv")
        u, k = rms(q, p.get("qkv/q_norm/weight")), rms(k, p.get("qkv/k_norm/weight"))
        keys.append(np.repeat(turned(k, at), H // G, axis=0))
        values.append(np.repeat(v, H // G, axis=0))
        for _ in range(c.hops):
            place = turned(u, at) * (1 if c.q_logscale is None else np.log(at + c.q_logscale) / np.log(c.q_logscale))
            z = np.einsum("hk,shk->hs", place, np.stack(keys)) / np.sqrt(K)
            z = z if c.softcap is None else c.softcap * np.tanh(z / c.softcap)
            w = np.exp(z - z.max(1, keepdims=True))
            read = np.einsum("hs,shv->hv", w / w.sum(1, keepdims=True), np.stack(values))
            u = read + (np.einsum("hk,hkv->hv", u, p["hop/kernel"]) if c.hop_map == "learned" else u)
        if c.out_gate != "none":
            u = u / (1 + np.exp(-np.einsum("d,dhv->hv", x[b, t], p["gate/gate/kernel"])))
        y[b, t] = np.einsum("hv,hvd->d", u, p["project/kernel"])
    return y


@pytest.mark.parametrize("options", [{"hops": 3}, {"hops": 2, "hop_map": "learned", **ANY}], ids=["plain", "any"])
def test_outputs_are_those_of_the_recurrence_and_gradients_its_slopes(options: dict[str, Any]) -> None:
    mixer = made(**options)
    graph, state = nnx.split(mixer)
    p = {"/".join(map(str, path)): np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(state)}
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, 2, T, D))

    def loss(p: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        flat = [(path, v.replace(p["/".join(map(str, path))])) for path, v in nnx.to_flat_state(state)]
        y, _ = nnx.merge(graph, nnx.from_flat_state(flat))(x, Context.of(x, jnp.asarray(SEG)))
        return jnp.sum(y * weights), y

    with jax.enable_x64(True):
        (dp, dx), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(p, jnp.asarray(x))
    assert_close("y", y, by_tokens(mixer.cfg, p, x), TOLERANCE["fp64"])
    for name, value, gradient in [*((name, p[name], dp[name]) for name in p), ("x", x, dx)]:
        along = 1e-5 * rng.normal(size=value.shape)
        moved = [({**p, name: value + s * along}, value + s * along if name == "x" else x) for s in (1, -1)]
        ends = [by_tokens(mixer.cfg, *both) for both in moved]
        slope = np.sum(weights * (ends[0] - ends[1])) / 2
        if name != "qkv/k/bias" or "qk_norm" in options:  # a bias of all keys alike changes nothing without a norm
            assert_close(f"slope along {name}", np.sum(np.asarray(gradient) * along), slope, 1e-6)


def run(mixer: Attention, x: np.ndarray, skip: bool = False) -> dict[str, Any]:
    """y, and the gradients of Σ sin y; with the query before RoPE beside what is read if `skip`."""
    graph, state = nnx.split(mixer)

    def loss(state: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        m, ctx = nnx.merge(graph, state), Context.of(x, jnp.asarray(SEG))
        o, _ = m.mix(x, ctx, None)
        y = m.out(o + m.qkv(x, ctx.positions, placed=False)[0] if skip else o)
        return jnp.sum(jnp.sin(y)), y

    (params, dx), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, x)
    return {"y": y, "x": dx, **nnx.to_pure_dict(params)}


def test_one_hop_is_attention_beside_its_query() -> None:
    x = normal(1, 2, T, D)
    assert_trees_close("one hop", run(made(hops=1), x), run(made(), x, skip=True), TOLERANCE["fp32_op"])


def test_a_learned_identity_is_the_identity() -> None:
    x, learned, fixed = normal(2, 2, T, D), made(hops=3, hop_map="learned"), made(hops=3)
    nnx.update(fixed, {name: nnx.state(learned)[name] for name in ("qkv", "project")})
    learned.hop.kernel[...] = jnp.broadcast_to(jnp.eye(K), (H, K, K))
    got, want = run(learned, x), run(fixed, x)
    assert float(jnp.abs(got.pop("hop")["kernel"]).max()) > 1e-2
    assert_trees_close("identity", got, want, TOLERANCE["fp32_op"])


def test_decoding_is_training() -> None:
    """Prefill of 4 tokens, then steps, also over the edge of a document."""
    mixer = made(hops=3, hop_map="learned", **ANY)
    graph, params = nnx.split(mixer)
    x, full = normal(3, 2, T, D), Context.of(normal(3, 2, T, D), jnp.asarray(SEG))
    want, _ = mixer(x, full)

    @functools.partial(jax.jit, static_argnums=0)
    def call(n: int, x: jax.Array, positions: jax.Array, ids: jax.Array, starts: jax.Array, state: Any) -> tuple:
        del n
        return nnx.merge(graph, params)(x, Context(positions=positions, segment_ids=ids, starts=starts), state)

    state, found = mixer.init_state(2, T, jnp.float32), []
    for a, b in [(0, 4), *((t, t + 1) for t in range(4, T))]:
        starts = jnp.asarray(SEG[:, a] != SEG[:, a - 1]) if a else jnp.zeros(2, bool)
        y, state = call(b - a, x[:, a:b], full.positions[:, a:b], jnp.asarray(SEG)[:, a:b], starts, state)
        found.append(y)
    assert_close("y", jnp.concatenate(found, axis=1), want, TOLERANCE["fp32_op"])


# --------------------------------------------------------------------------------------------- what refuses, what works


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"hops": 2, "value_dim": 8}, "hops = 2: expected value_dim = key_dim = 4, and it is 8"),
        ({"hops": 0}, "hops = 0: expected an integer >= 1"),
        ({"hop_map": "learned"}, "hop_map = 'learned': needs hops"),
    ],
)
def test_options_that_do_not_fit_end_in_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)):
        build(Config, {"heads": H, "key_dim": K, **options}).fill(D)


def config(pattern: str, **values: Any) -> ModelConfig:
    own = {"attn": {"heads": 4, "hops": 2, "hop_map": "learned"}, "gla": {"heads": 4}}
    return build(
        ModelConfig, {"d_model": 32, "vocab_size": 67, "ffn_dim": 32, "pattern": pattern, "mixers": own, **values}
    )


def test_policies_serve_layers_that_read_once() -> None:
    model = lm.LM(config("attn"), key=jax.random.key(0))
    with pytest.raises(ConfigError, match=re.escape("policy = 'hops = 2': expected attn layers without hops")):
        served_layers(model)


def test_there_is_no_matrix_of_several_reads() -> None:
    x = jnp.asarray(normal(4, 1, T, D))
    with pytest.raises(ValueError, match="Attention is not linear in its values"):
        probe(made(hops=1), x, Context.of(x))


def test_cost_counts_every_read() -> None:
    """2 hops: twice the scores and sums, and R once more than its parameters."""
    hops, plain = (
        cost(config("attn", mixers={"attn": {"heads": 4, **own}}), seq_len=64)
        for own in ({"hops": 2, "hop_map": "learned"}, {})
    )
    R, read = 4 * 8 * 8, 2 * 32 * 2 * 65 / 2
    assert hops.parameters - plain.parameters == R
    assert hops.flops_per_token - plain.flops_per_token == read + 2 * 2 * R
    assert hops.cache_bytes == plain.cache_bytes


class Composed(hybrids.Hybrid):
    """Hops in every composition that takes attention, in loops, and with the keys of another layer."""

    @functools.cached_property
    def cfg(self) -> ModelConfig:
        blocks = {
            "beside": {"mixer": "parallel(attn,gla)", "options": {"fusion": "hierarchical"}},
            "split": {"mixer": "heads(2*attn,2*gla)"},
            "routed": {"mixer": "route(attn,gla)", "options": {"width": 8}},
        }
        return config("beside,split,routed,loop(2,2*attn)", blocks=blocks, share={"kv": [[3, 4]]})


@pytest.mark.slow
def test_compositions_take_hops() -> None:
    model = Composed(0)
    hybrids.test_packed_documents_equal_separate_ones(model)
    hybrids.test_the_past_ignores_the_future(model)
    hybrids.test_documents_padding_and_neighbours_do_not_matter(model)
    hybrids.test_prefill_then_steps_equal_the_whole_pass(model)
    hybrids.test_cache_bytes_are_what_cost_says(model)
