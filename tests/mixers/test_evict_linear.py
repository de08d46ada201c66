"""evict_linear: against a loop in fp64, a window that holds everything, and what may not be asked of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.mixers import Context
from hydrax.ops.softmax import attention
from hydrax.ops.sparse import leaving
from tests.contract.cases import Case, D, case, inside, normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

pytestmark = pytest.mark.thorough

T, W = 19, 5
SEG = np.stack([segments((12, 7), T), segments((1, 15), T)])
JOINT = 0
"""The variant of the contract's cases: gated linear attention (elu1) under one denominator."""


def turned(x: np.ndarray) -> np.ndarray:
    """RoPE of [T,H,K] as a product of complex numbers."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    z = z * np.exp(1j * np.arange(len(x))[:, None, None] * 10000.0 ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag], axis=-1)


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


def elu1(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def projected(c: Case, x: np.ndarray) -> tuple[dict[str, np.ndarray], ...]:
    """Parameters, and queries, keys and values [T,H,.] of one document, in fp64."""
    p = {name: np.asarray(v, np.float64) for name, v in c.params.items()}
    q, k, v = (np.einsum("td,dhk->thk", x, p[f"{name}/kernel"]) for name in "qkv")
    return p, {"q": turned(q), "k": turned(k), "v": v}


def added(c: Case, x: np.ndarray) -> np.ndarray:
    """y of a window beside a gated delta rule, token by token: the state takes token t - W at token t."""
    p, m = projected(c, x)
    H, K, V = *m["q"].shape[1:], m["v"].shape[2]
    beta = 1 / (1 + np.exp(-(x @ p["beta/kernel"])))
    g = -np.exp(p["decay/A_log"]) * softplus(x @ p["step_size/kernel"] + p["decay/dt_bias"])
    S, z = np.zeros((H, K, V)), np.zeros((len(x), H, V))
    unit = {name: m[name] / np.sqrt((m[name] ** 2).sum(-1, keepdims=True) + 1e-6) for name in "qk"}
    for t in range(len(x)):
        if (j := t - W) >= 0:
            S = S * np.exp(g[j])[:, None, None]
            held = np.einsum("hkv,hk->hv", S, unit["k"][j])
            S = S + np.einsum("hk,hv->hkv", unit["k"][j], beta[j][:, None] * (m["v"][j] - held))
        near = window(m, t)[0]
        far = np.einsum("hkv,hk->hv", S, unit["q"][t]) * K**-0.5
        for i, o in enumerate((near, far)):
            z[t] += p["gains"][:, i, None] * o / np.sqrt((o**2).mean(-1, keepdims=True) + c.cfg.norm_eps)
    return np.einsum("thv,hvd->td", z, p["project/kernel"])


def window(m: dict[str, np.ndarray], t: int) -> tuple[np.ndarray, np.ndarray]:
    """The average over the last W keys [H,V], and its denominator [H]."""
    own = slice(max(t - W + 1, 0), t + 1)
    e = np.exp(np.einsum("shk,hk->hs", m["k"][own], m["q"][t]) * m["q"].shape[-1] ** -0.5)
    return np.einsum("hs,shv->hv", e, m["v"][own]) / e.sum(-1)[:, None], e.sum(-1)


def joined(c: Case, x: np.ndarray) -> np.ndarray:
    """y of one average over a window and a state with a decay per key channel."""
    p, m = projected(c, x)
    H, K, V = *m["q"].shape[1:], m["v"].shape[2]
    a = np.einsum("tr,rhk->thk", x @ p["step_down/kernel"], p["step_size/kernel"])
    g = -np.exp(p["decay/A_log"])[:, None] * softplus(a + p["decay/dt_bias"])
    S, n, z = np.zeros((H, K, V)), np.zeros((H, K)), np.zeros((len(x), H, V))
    for t in range(len(x)):
        if (j := t - W) >= 0:
            S = S * np.exp(g[j])[..., None] + np.einsum("hk,hv->hkv", elu1(m["k"][j]), m["v"][j])
            n = n * np.exp(g[j]) + elu1(m["k"][j])
        near, weight = window(m, t)
        far, more = np.einsum("hkv,hk->hv", S, elu1(m["q"][t])), np.sum(n * elu1(m["q"][t]), -1)
        z[t] = (near * weight[:, None] + far) / (weight + more)[:, None]
    return np.einsum("thv,hvd->td", z, p["project/kernel"])


@pytest.mark.parametrize(("variant", "definition"), [(None, added), (JOINT, joined)], ids=["sum", "joint"])
def test_it_is_the_loop_over_tokens(variant: int | None, definition: Any) -> None:
    c, x = case("evict_linear", variant), normal(0, 2, T, D)
    y = jax.jit(lambda p, x: c(p, x, SEG)[0])(c.params, x)
    for b, doc in {(b, int(SEG[b, t])) for b, t in np.argwhere(SEG)}:
        rows = np.flatnonzero(SEG[b] == doc)
        assert_close(f"document {doc} of row {b}", y[b, rows], definition(c, x[b, rows]), TOLERANCE["fp32_op"])


def test_a_window_over_the_whole_row_leaves_attention_alone() -> None:
    """No token leaves: outputs and all gradients are those of softmax attention."""
    c = case("evict_linear", JOINT)
    x, dy = normal(1, 2, T, D), normal(2, 2, T, D)

    def evicting(weights: dict[str, Any], x: Any) -> Any:
        mixer = c.merge(c.params | {f"{name}/kernel": w for name, w in weights.items()})
        mixer.cfg = dataclasses.replace(mixer.cfg, window=T)
        return jnp.sum(dy * mixer(x, Context.of(x, jnp.asarray(SEG)))[0])

    def plain(weights: dict[str, Any], x: Any) -> Any:
        positions = jnp.asarray(inside(SEG)[0])
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, weights[name]) for name in "qkv")
        q, k = (c.cfg.rope.turn(a, positions) for a in (q, k))
        o = attention(q, k, v, segment_ids=jnp.asarray(SEG))
        return jnp.sum(dy * jnp.einsum("bthv,hvd->btd", o, weights["project"]))

    weights = {name: c.params[f"{name}/kernel"] for name in (*"qkv", "project")}
    got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(weights, x) for f in (evicting, plain))
    assert_trees_close("value and gradients", got, want, TOLERANCE["fp32_op"])


@pytest.mark.parametrize("w", [1, 4, T])
def test_every_token_is_in_one_of_the_two_memories(w: int) -> None:
    """What a window of w has let go by token t: the tokens of its document before t - w + 1, each of them once."""
    index = np.broadcast_to(np.arange(1, T + 1), SEG.shape)
    positions = jnp.asarray(inside(SEG)[0])
    old, there = leaving({"x": jnp.asarray(index)}, None, window=w, positions=positions, segment_ids=jnp.asarray(SEG))
    for b, t in np.argwhere(SEG):
        own = (SEG[b] == SEG[b, t]) & (np.arange(T) <= t)
        gone = np.asarray(old["x"])[b, own & np.asarray(there)[b]]
        assert_equal("gone", gone, index[b, own][: max(own.sum() - w, 0)])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"window": 0}, "window = 0: expected an integer >= 1"),
        (
            {"fusion": "joint"},
            "fusion = 'joint': gdn can weigh below 0: expected sum, or memory linear_attn, mamba2, gla",
        ),
        (
            {"fusion": "joint", "memory": "gla", "feature_map": "hadamard"},
            "feature_map = 'hadamard': fusion = joint divides by a sum: expected one of dpfp, elu1, hedgehog, relu,"
            " t2r, taylor2",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(mixers.get("evict_linear").Config, options)
    assert str(error.value) == line
