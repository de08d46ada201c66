"""Gates of heads: their distribution, what both ends compute, and what a short training finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hydrax
from hydrax.infer import policy as policies
from hydrax.infer.policy import gates
from hydrax.infer.policy.serve import Served
from tests.tolerances import TOLERANCE, assert_close

T, COUNT = 24, 3


@pytest.fixture(scope="module")
def model():
    lm = hydrax.build({"d_model": 32, "pattern": "2*attn", "mixers": {"attn": {"heads": 4}}, "vocab_size": 40}, seed=2)
    lm.embed.weight[...] *= 20
    return lm


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, T)))


def test_frequencies_of_the_distribution():
    given = {"a": jnp.log(jnp.array([[0.5, 2.0]])), "b": jnp.log(jnp.array([[1.5, 3.0]]))}
    u = jax.random.uniform(jax.random.key(0), (20000, 1, 2))
    z = jax.vmap(lambda u: gates.sample(given, u))(u)
    np.testing.assert_allclose((z > 0).mean(0), gates.open_probability(given), atol=0.01)
    np.testing.assert_allclose(jnp.median(z, axis=0), gates.median(given), atol=0.02)
    assert (z == 0).any()
    assert (z == 1).any()


def test_open_gates_are_the_model_and_closed_ones_the_policy(model, tokens):
    run = jax.jit(lambda z: gates.gated_logits(model, tokens, z, COUNT))
    assert_close("open", run(jnp.ones((1, 4))), model(tokens), TOLERANCE["fp32_model"])
    served = Served(model, policies.of(f"lychee:retrieval=((2,),),count={COUNT}"))
    expected, _ = jax.jit(lambda x: served.prefill(x, served.init_cache(2, T)))(tokens)
    assert_close("policy", run(jnp.array([[0.0, 0, 1, 0]])), expected, TOLERANCE["fp32_model"])


def test_the_budget_goes_to_the_head_that_needs_it(model, tokens):
    """Only one head of the second layer reaches the output, so that the other gates close at no cost."""
    used = 1
    graph_value = model.periods[0].blocks[0].mixer.project.kernel
    kernel = np.array(graph_value[...])
    changed = kernel.copy()
    changed[1, [h for h in range(4) if h != used]] = 0
    changed[1, used] *= 8
    graph_value[...] = jnp.asarray(changed)
    try:
        found, trained, losses = gates.train_gates(model, tokens, count=1, retrieval=0.25, steps=60)
    finally:
        graph_value[...] = jnp.asarray(kernel)
    assert np.isfinite(losses).all()
    opened = np.asarray(gates.open_probability(trained))[0]
    assert opened.argmax() == used
    assert found == ((used,),)
