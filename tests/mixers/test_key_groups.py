"""hcam and landmark: against loops in fp64, their degenerate cases, and which tokens a choice may depend on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops.softmax import attention
from hydrax.ops.sparse import chunk_attention, landmark_attention
from tests.contract.cases import case, normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

pytestmark = pytest.mark.thorough

T, H, G, K, C = 23, 4, 2, 4, 3
SEG = np.stack([segments((13, 10), T), segments((1, 19), T)])
REAL = (SEG != 0)[..., None, None]


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
    shapes = {"q": (2, T, H, K), "k": (2, T, G, K), "v": (2, T, G, 5)}
    return {name: normal(10 * seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def by_documents(x: dict[str, np.ndarray], one: Any) -> np.ndarray:
    """o of `one` query of a head: (q [K], k [t+1,K], v, index of batch, query and head) -> [V], in fp64."""
    o = np.zeros((2, T, H, x["v"].shape[-1]))
    for b, t in np.argwhere(SEG):
        own = np.flatnonzero((SEG[b] == SEG[b, t]) & (np.arange(T) <= t))
        for h in range(H):
            k, v = (x[name][b, own, h // (H // G)].astype(np.float64) for name in "kv")
            o[b, t, h] = one(x["q"][b, t, h].astype(np.float64), k, v, (b, t, h))
    return o


def chunks(gate: np.ndarray, top: int) -> Any:
    def one(q: np.ndarray, k: np.ndarray, v: np.ndarray, at: tuple) -> np.ndarray:
        z, own = k @ q * K**-0.5, (len(k) - 1) // C
        near = max(own - 1, 0) * C
        o = softmax(z[near:]) @ v[near:]
        r = np.array([k[c * C : (c + 1) * C].mean(0) @ q * K**-0.5 for c in range(own)])
        best = np.argsort(-r, kind="stable")[:top]
        for w, c in zip(softmax(r[best]) if own else (), best, strict=True):
            inside = slice(c * C, (c + 1) * C)
            o = o + gate[at] * w * (softmax(z[inside]) @ v[inside])
        return o

    return one


def sections(q: np.ndarray, k: np.ndarray, v: np.ndarray, at: tuple) -> np.ndarray:
    z, own = k @ q * K**-0.5, (len(k) - 1) // C
    marks = [c * C + C - 1 for c in range(own)]
    here = [s for s in range(own * C, len(k)) if s % C != C - 1]
    p = softmax(z[marks + here])
    o = p[own:] @ v[here]
    for c in range(own):
        inside = slice(c * C, c * C + C - 1)
        o = o + p[c] * (softmax(z[inside]) @ v[inside])
    return o


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
def test_chunks_are_those_of_the_loop(impl: str) -> None:
    x, gate = inputs(), np.abs(normal(5, 2, T, H))
    for top in (1, 2, T):
        run = jax.jit(lambda x, g, top=top: chunk_attention(**x, gate=g, size=C, top=top, segment_ids=SEG_, impl=impl))
        assert_close(f"top {top}", run(x, gate) * REAL, by_documents(x, chunks(gate, top)), TOLERANCE["fp32_op"])


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
def test_sections_are_those_of_the_loop(impl: str) -> None:
    x = inputs(1)
    run = jax.jit(lambda x: landmark_attention(**x, size=C, segment_ids=SEG_, impl=impl))
    assert_close("o", run(x) * REAL, by_documents(x, sections), TOLERANCE["fp32_op"])


SEG_ = jnp.asarray(SEG)


def graded(f: Any, x: dict[str, np.ndarray]) -> Any:
    dy = normal(9, 2, T, H, 5) * REAL
    return jax.jit(jax.value_and_grad(lambda x: jnp.sum(dy * f(x))))(x)


@pytest.mark.parametrize(
    "degenerate",
    [
        lambda x: landmark_attention(**x, size=T + 1, segment_ids=SEG_),
        lambda x: chunk_attention(**x, gate=jnp.ones((2, T, H)), size=T, top=4, segment_ids=SEG_),
    ],
    ids=["landmark", "hcam"],
)
def test_one_group_is_attention(degenerate: Any) -> None:
    """Nothing but the group of the query: values and gradients are those of softmax attention."""
    got, want = graded(degenerate, inputs(2)), graded(lambda x: attention(**x, segment_ids=SEG_), inputs(2))
    assert_trees_close("value and gradients", got, want, TOLERANCE["fp32_op"])


def test_one_chunk_behind_the_window_is_read_whole() -> None:
    """With one complete chunk whatever `top`: the window and a dense attention inside that chunk, and its gradients."""
    x, n = inputs(3), 6
    x = {name: a[:, : 2 * n] for name, a in x.items()}

    def parts(x: dict[str, Any]) -> Any:
        behind = attention(x["q"][:, n:], x["k"][:, :n], x["v"][:, :n], positions=jnp.full((2, n), n))
        return attention(**x) + jnp.pad(behind, [(0, 0), (n, 0), (0, 0), (0, 0)])

    dy = normal(9, 2, 2 * n, H, 5)
    runs = (lambda x: chunk_attention(**x, gate=jnp.ones((2, 2 * n, H)), size=n, top=3), parts)
    got, want = (jax.jit(jax.value_and_grad(lambda x, f=f: jnp.sum(dy * f(x))))(x) for f in runs)
    assert_trees_close("value and gradients", got, want, TOLERANCE["fp32_op"])


def test_weights_of_sections_sum_to_one() -> None:
    x = jax.tree.map(jnp.asarray, inputs(4) | {"v": np.ones((2, T, G, 5), np.float32)})
    o = landmark_attention(**x, size=C, segment_ids=SEG_)
    assert_close("sums", o * REAL, REAL * np.ones(o.shape), TOLERANCE["fp32_op"])


def test_all_sections_retrieved_are_all_sections() -> None:
    x = jax.tree.map(jnp.asarray, inputs(5))
    full = landmark_attention(**x, size=C, segment_ids=SEG_)
    assert_close("all", landmark_attention(**x, size=C, top=T, segment_ids=SEG_), full, TOLERANCE["fp32_op"])
    few = landmark_attention(**x, size=C, top=1, segment_ids=SEG_)
    assert_equal("queries with one section behind them", few[0, : 2 * C], full[0, : 2 * C])
    assert np.abs(few - full).max() > 1e-2
    shared = landmark_attention(**x, size=C, top=1, over_heads=True, segment_ids=SEG_)
    assert np.abs(shared - few).max() > 1e-2


@pytest.mark.parametrize("name", ["hcam", "landmark"])
def test_what_is_chosen_does_not_see_the_future(name: str) -> None:
    """Other tokens from t on, so large that they win every comparison, leave every bit before t."""
    c, n = case(name), 41
    run = jax.jit(lambda p, x: c(p, x)[0])
    x = normal(6, 1, n, 32)
    y = run(c.params, x)
    for t in (1, 8, 17, 20, 33, 40):
        other = run(c.params, np.where(np.arange(n)[None, :, None] < t, x, 50 * normal(7, 1, n, 32)))
        assert_equal(f"before {t}", other[:, :t], y[:, :t])


def test_a_longer_row_decodes_as_it_trains() -> None:
    """hcam with many more chunks than it reads, token by token from the middle of a chunk."""
    c, n, start = case("hcam"), 44, 6
    x = normal(8, 1, n, 32)
    full = jax.jit(lambda p, x: c(p, x)[0])(c.params, x)
    y, state = jax.jit(lambda p, x: c(p, x, state=c.init(1, n)))(c.params, x[:, :start])
    step = jax.jit(lambda p, x, t, s: c(p, x, positions=t, state=s))
    for t in range(start, n):
        y, state = step(c.params, x[:, t : t + 1], np.full((1, 1), t, np.int32), state)
        assert_close(f"y at {t}", y[:, 0], full[:, t], TOLERANCE["fp32_op"])
