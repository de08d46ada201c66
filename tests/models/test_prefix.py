"""Learned vectors in front of every document: laid out, implied, cached, and in generation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core.build import ConfigError
from hydrax.core.typing import Array
from hydrax.infer.sample import generate
from tests.models.small import (
    VOCABULARY,
    D,
    Params,
    below,
    config,
    drawn,
    fp64,
    in_pieces,
    plan,
    rms,
    swa_layer,
    tokens,
    visible,
)
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

pytestmark = pytest.mark.thorough

M, T = 3, 9
IDS = tokens(2, T)
SWA = {"swa": {"heads": 2, "key_dim": 4, "window": 2, "sink_tokens": M}}
PATTERNS = {"swa": "2*swa", "mixed": "modes(gla),swa"}


@functools.cache
def prefixed(name: str) -> tuple[Any, Params]:
    made = plan(PATTERNS[name], ffn="none", mixers=SWA, prefix={"meta_tokens": M})
    return made, drawn(made.shapes)


@functools.cache
def runner(name: str) -> Any:
    made, params = prefixed(name)
    return jax.jit(made.merge(params).hidden)


def laid_out(ids: np.ndarray, filler: int = 0) -> np.ndarray:
    return np.concatenate([np.full((len(ids), M), filler, np.int32), ids], axis=1)


def test_the_prefix_is_one_set_of_vectors():
    made, _ = prefixed("swa")
    assert made.shapes["meta"].shape == (M, D)
    assert made.meta["meta"].axes == ("prefix", "embed") and made.meta["meta"].cast
    assert "meta" not in plan("swa").shapes
    with pytest.raises(ConfigError, match=r"prefix\.meta_tokens = -1: expected an integer >= 0"):
        config("swa", prefix={"meta_tokens": -1})


def test_documents_begin_with_it():
    """Against the plain formula for a packed row: every document has its own copy at its first positions."""
    _, params = prefixed("swa")
    first, second = tokens(1, 5, seed=1)[0], tokens(1, 6, seed=2)[0]
    row = np.concatenate([laid_out(first[None])[0], laid_out(second[None], 7)[0], [4, 4]])[None]
    seg = np.asarray([[1] * (M + 5) + [2] * (M + 6) + [0] * 2], np.int32)
    positions = np.asarray([[*range(M + 5), *range(M + 6), 0, 1]])
    p = fp64(params)
    x = np.where(positions[..., None] < M, p["meta"][np.minimum(positions, M - 1)], p["embed/weight"][row])
    for r in range(2):
        own = {path: value[r] for path, value in below(p, "periods/0/blocks/0/").items()}
        x, _ = swa_layer(own, x, positions, visible(positions, seg, 2, M))
    got = runner("swa")(row, jnp.asarray(seg))
    assert_close("hidden", got[seg != 0], rms(x, p["norm/weight"])[seg != 0], TOLERANCE["fp32_model"])


def test_rows_without_documents_get_it_and_return_their_own_tokens():
    run = runner("mixed")
    y = run(IDS)
    assert y.shape == (2, T, D)
    want = [run(laid_out(IDS, filler), jnp.ones((2, M + T), jnp.int32))[:, M:] for filler in (0, 5)]
    assert_equal("filler", want[0], want[1])
    assert_close("hidden", y, want[0], TOLERANCE["fp32_op"])


def test_modes_are_those_of_tokens():
    """What is given for the prefix changes nothing: the cache of a prefix does not know what will be asked."""
    run, modes = runner("mixed"), np.asarray([[1] * 4 + [0] * 5, [0] * 4 + [1] * 5], np.int32)
    y, seg = run(IDS, modes=modes), jnp.ones((2, M + T), jnp.int32)
    for given in (0, 1, -1):
        wide = np.pad(modes, ((0, 0), (M, 0)), constant_values=given)
        assert_close(f"hidden with {given}", run(laid_out(IDS), seg, modes=wide)[:, M:], y, TOLERANCE["fp32_op"])
    assert np.abs(run(IDS) - y).max() > 1e-2
    made, params = prefixed("mixed")
    prefill = jax.jit(lambda p: made.merge(p).prefill(IDS, made.merge(p).init_cache(2, T), modes=modes)[0])
    want = made.merge(params).logits(y)[..., :VOCABULARY]
    assert_close("logits after the cached prefix", prefill(params), want, TOLERANCE["fp32_model"])


def test_every_document_starts_from_the_same_state():
    """The same document first in its row, behind another, and alone."""
    other, own = laid_out(tokens(1, 4, seed=3)), laid_out(IDS[:1])
    row = np.concatenate([own, other, own], axis=1)
    seg = np.repeat([[1, 2, 3]], [M + T, M + 4, M + T], axis=1).astype(np.int32)
    y = runner("mixed")(row, jnp.asarray(seg))
    assert_close("behind another", y[:, -T:], y[:, M : M + T], TOLERANCE["fp32_op"])
    assert_close("alone", runner("mixed")(IDS[:1]), y[:, M : M + T], TOLERANCE["fp32_op"])


def test_an_empty_cache_is_that_after_the_prefix():
    """As if the prefix had been laid out in front of the first tokens, in a document of its own."""
    made, params = prefixed("mixed")

    @jax.jit
    def caches(params: Params) -> Any:
        model = made.merge(params)
        empty = model.init_cache(2, T)
        seg = jnp.full((2, M + T), 2, jnp.int32)  # not the document of the cache
        return empty, model.prefill(IDS, empty)[1], model.prefill(laid_out(IDS), empty, seg)[1]

    empty, after, laid = caches(params)
    assert_equal("position", empty.position, np.full(2, M))
    assert_equal("segment", empty.segment, np.ones(2))
    assert_equal("position", after.position, np.full(2, M + T))
    assert_equal("position", laid.position, after.position)
    assert_trees_close("layers", after.layers, laid.layers, TOLERANCE["fp32_op"])


def test_decoding_goes_on_from_it():
    made, params = prefixed("mixed")
    whole = made.merge(params).logits(runner("mixed")(IDS))[..., :VOCABULARY]
    assert_close("logits", in_pieces(made, params, IDS, 4), whole, TOLERANCE["fp32_model"])


@pytest.mark.parametrize(("sink_tokens", "seen"), [(M, M), (M + 1, M), (1, 1), (0, 0)])
def test_sink_tokens_keep_it_visible(sink_tokens: int, seen: int):
    """From beyond the window of a single layer, gradients reach the vectors that are sinks."""
    mixers = {"swa": {**SWA["swa"], "sink_tokens": sink_tokens}}
    single = plan("swa", ffn="none", mixers=mixers, prefix={"meta_tokens": M})
    params = drawn(single.shapes)
    gradient = jax.jit(jax.grad(lambda p: single.merge(p).hidden(IDS)[0, -1].sum()))(params)["meta"]
    assert np.any(np.asarray(gradient) != 0, axis=1).tolist() == [i < seen for i in range(M)]


def test_prompts_of_any_length_are_continued():
    """Greedily, as the whole rows would have it; what pads a shorter prompt is no part of it."""
    made, params = prefixed("mixed")
    model, lengths, count = made.merge(params), np.asarray([T, 2]), 4
    continued = generate(model, IDS, max_new_tokens=count, temperature=0.0, lengths=lengths)
    rows = np.zeros((2, T + count), np.int32)
    for row, prompt, n, new in zip(rows, IDS, lengths, continued, strict=True):
        row[: n + count] = [*prompt[:n], *new]
    logits: Array = model.logits(runner("mixed")(rows))
    for row, n, new in zip(logits, lengths, continued, strict=True):
        assert new.tolist() == np.argmax(row[n - 1 : n - 1 + count], axis=-1).tolist()
