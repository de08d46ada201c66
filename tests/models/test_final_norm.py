"""A last norm by the past: what it norms, its state in the model's cache, and what it does not go with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core import tree
from hydrax.core.build import ConfigError, build
from hydrax.infer.policy.serve import served_layers
from hydrax.mixers import Context
from hydrax.models.cost import cost
from hydrax.models.lm import LM
from hydrax.models.spec import ModelConfig
from tests.contract.cases import segments
from tests.tolerances import TOLERANCE, assert_close

pytestmark = pytest.mark.thorough

LENGTHS, T = (5, 1, 9), 17
SEG = jnp.asarray(segments(LENGTHS, T))[None]
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 60, (1, T)))
KINDS = pytest.mark.parametrize("kind", ["timestep_norm", "timestep_decay_norm"])


def options(**values: Any) -> dict[str, Any]:
    base = {"d_model": 16, "vocab_size": 60, "mixers": {"attn": {"heads": 2}}, "ffn": "none", "final_groups": 4}
    return {**base, "pattern": "attn", **values}


def made(kind: str) -> LM:
    return LM(build(ModelConfig, options(final_norm=kind)), key=jax.random.key(0))


@KINDS
def test_it_norms_the_stream_document_by_document(kind: str) -> None:
    """Of random streams, against the moments of every document."""
    lm, x = made(kind), np.random.default_rng(1).standard_normal((1, T, 16)).astype(np.float32)
    y = np.asarray(jax.jit(lambda x: lm.finish(x, Context.of(x, SEG))[0])(x))[0]
    for i, n in enumerate(LENGTHS):
        own = np.asarray(SEG[0]) == i + 1
        past, got = x[0, own].astype(np.float64).reshape(n, 4, -1), y[own].reshape(n, 4, -1)
        mean, var = past[0].mean(-1), past[0].var(-1)
        want = (past[0] - mean[:, None]) / np.sqrt(var + 1e-5)[:, None]
        assert_close(f"first token of document {i}", got[0], want, TOLERANCE["fp32_op"])
        if kind == "timestep_norm":
            want = (past[-1] - past.mean((0, 2))[:, None]) / np.sqrt(past.var((0, 2)) + 1e-5)[:, None]
            assert_close(f"last token of document {i}", got[-1], want, TOLERANCE["fp32_op"])


@KINDS
def test_decoding_continues_its_state(kind: str) -> None:
    """Prefill of some tokens and steps, over the edges of documents, give the logits of the whole pass."""
    lm, split = made(kind), 4
    full = jax.jit(lm)(TOKENS, SEG)
    cache = lm.init_cache(1, T)
    assert {name: leaf.shape for name, leaf in cache.final.items()} == {"mean": (1, 4), "var": (1, 4)}
    assert tree.nbytes((cache.layers, cache.final)) == cost(lm.cfg, seq_len=T, itemsize=4).cache_bytes
    first, cache = jax.jit(lm.prefill)(TOKENS[:, :split], cache, SEG[:, :split])
    step, logits = jax.jit(lm.step), [first]
    for t in range(split, sum(LENGTHS)):
        y, cache = step(TOKENS[:, t], cache, SEG[:, t])
        logits.append(y[:, None])
    assert_close("logits", jnp.concatenate(logits, 1), full[:, : sum(LENGTHS)], TOLERANCE["fp32_op"])


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"final_groups": 3}, "final_groups = 3: expected a divisor of d_model = 16 below it"),
        ({"loop": {"n": 2, "norm": "final"}}, "final_norm = 'timestep_norm': expected none with loop.norm = final"),
        (
            {"two_hop": True, "norm_place": "post", "ffn": "mlp"},
            "pattern.two_hop = True: expected norm_place = pre, reordered or sandwich",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build(ModelConfig, options(final_norm="timestep_norm", **values))
    assert str(refused.value) == line


def test_policies_do_not_serve_it() -> None:
    with pytest.raises(ConfigError, match="expected a model whose last norm has no state"):
        served_layers(made("timestep_norm"))
