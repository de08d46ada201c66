"""Ops against the naive functions of flash-linear-attention: `make oracles`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.mixers import Context
from hydrax.ops.delta import delta_rule
from hydrax.ops.linear import linear_attention
from hydrax.ops.linear.cases import CASES
from hydrax.ops.scan import linear_scan
from hydrax.ops.slots import slot_attention, softmax_decay
from hydrax.ops.slots.cases import CASES as SLOTS
from tests.ops import matrix_state
from tests.oracles.parity import FORMS, D, assembler, compare, naive, torch

pytestmark = pytest.mark.oracle

STATE = {"output_final_state": True}


def per_value_head(x: Any, v: Any) -> Any:
    """Queries, keys or decays [B,T,H,K], once for every value head that their head serves."""
    return x.repeat_interleave(v.shape[2] // x.shape[2], dim=2)


def heads_first(*inputs: Any) -> list:
    return [x.transpose(1, 2) for x in inputs]


def linear_attn(q: Any, k: Any, v: Any, initial_state: Any) -> Any:
    f = naive("linear_attn").naive_recurrent_linear_attn
    return f(q, k, v, initial_state=initial_state, **STATE)


def simple_gla(q: Any, k: Any, v: Any, log_decay: Any, initial_state: Any) -> Any:
    f = naive("simple_gla").naive_recurrent_simple_gla
    return f(per_value_head(q, v), per_value_head(k, v), v, log_decay, initial_state=initial_state, **STATE)


def gla(q: Any, k: Any, v: Any, log_decay: Any, initial_state: Any) -> Any:
    f = naive("gla").naive_recurrent_gla
    q, k, g = (per_value_head(x, v) for x in (q, k, log_decay))
    return f(q, k, v, g, initial_state=initial_state, **STATE)


def ungated_delta_rule(q: Any, k: Any, v: Any, beta: Any, initial_state: Any) -> Any:
    f = naive("delta_rule").delta_rule_recurrence
    o, S = f(*heads_first(q, k, v, beta), initial_state=initial_state)
    return o.transpose(1, 2), S


def gated_delta_rule(q: Any, k: Any, v: Any, beta: Any, log_decay: Any, initial_state: Any) -> Any:
    f = naive("gated_delta_rule").naive_recurrent_gated_delta_rule
    return f(per_value_head(q, v), per_value_head(k, v), v, beta, log_decay, initial_state=initial_state, **STATE)


def kda(q: Any, k: Any, v: Any, beta: Any, log_decay: Any, initial_state: Any) -> Any:
    f = naive("kda").naive_recurrent_kda
    return f(q, k, v, per_value_head(log_decay, v), beta, initial_state=initial_state, **STATE)


@FORMS
@pytest.mark.parametrize(
    ("case", "theirs"),
    [
        ("none", linear_attn),
        ("scalar", simple_gla),
        ("scalar_grouped", simple_gla),
        ("vector", gla),
        ("vector_grouped", gla),
    ],
)
def test_linear_attention(case: str, theirs: Callable, how: dict) -> None:
    inputs = matrix_state.inputs(CASES[case], beta=False)
    compare(lambda **x: linear_attention(**x, **how), theirs, inputs)


def test_normalised_linear_attention() -> None:
    """What the reference does in its op is done by the mixer here."""
    H, K, V = 2, 8, 16
    assemble = assembler("linear_attn", {"heads": H, "key_dim": K, "value_dim": V, "chunk_size": 16})
    rng = np.random.default_rng(0)
    shapes = {"q": (D, H, K), "k": (D, H, K), "v": (D, H, V), "project": (H, V, D)}
    kernels = {f"{name}/kernel": rng.normal(size=shape) / np.sqrt(D) for name, shape in shapes.items()}

    def ours(x: jax.Array, **p: jax.Array) -> jax.Array:
        return assemble(p)(x, Context.of(x))[0]

    def theirs(x: Any, **p: Any) -> Any:
        q, k, v = (torch.einsum("btd,dhk->bthk", x, p[f"{name}/kernel"]) for name in "qkv")
        q, k = (1 + torch.nn.functional.elu(y) for y in (q, k))
        o, _ = naive("linear_attn").naive_recurrent_linear_attn(q, k, v, normalize=True)
        return torch.einsum("bthv,hvd->btd", o, p["project/kernel"])

    compare(ours, theirs, {"x": rng.normal(size=(2, 37, D)), **kernels})


@FORMS
@pytest.mark.parametrize(
    ("case", "theirs"),
    [
        ("none", ungated_delta_rule),
        ("scalar", gated_delta_rule),
        ("scalar_grouped", gated_delta_rule),
        ("vector", kda),
        ("vector_grouped", kda),
    ],
)
def test_delta_rule(case: str, theirs: Callable, how: dict) -> None:
    inputs = matrix_state.inputs(CASES[case], beta=True)
    compare(lambda **x: delta_rule(**x, **how), theirs, inputs)


@FORMS
def test_linear_attention_with_the_decays_of_retention(how: dict) -> None:
    inputs = matrix_state.inputs(CASES["none"], beta=False)
    del inputs["initial_state"]  # the reference is the parallel form
    decay = np.log1p(-(2.0 ** (-5 - np.arange(CASES["none"].H))))

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return linear_attention(q, k, v, jnp.asarray(decay, jnp.float32), **how)[0]

    def theirs(q: Any, k: Any, v: Any) -> Any:
        return naive("retention").naive_retention(*heads_first(q, k, v)).transpose(1, 2)

    compare(ours, theirs, inputs)


@FORMS
def test_linear_scan(how: dict) -> None:
    rng = np.random.default_rng(0)
    inputs = {
        "x": rng.normal(size=(2, 65, 6)),
        "g": -np.logaddexp(0, rng.normal(size=(2, 65, 6))),
        "initial_state": rng.normal(size=(2, 6)),
    }

    def ours(x: jax.Array, g: jax.Array, initial_state: jax.Array) -> tuple:
        return linear_scan(jnp.exp(g), x, initial_state=initial_state, **how)

    # Not naive_chunk_hgrn, which sums its gates over the whole row and holds for a single chunk only.
    compare(ours, lambda **x: naive("hgrn").naive_recurrent_hgrn(**x, **STATE), inputs)


def slot_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    c = SLOTS["odd"]
    q, k = rng.normal(size=(2, c.B, c.T, c.H, c.K))
    v = rng.normal(size=(c.B, c.T, c.H, c.V))
    return {"q": q, "k": k, "v": v, "s": rng.normal(size=(c.B, c.T, c.H, c.M))}


def slots_first(K: Any, V: Any) -> tuple:
    """The reference keeps the keys of slots as [B,H,K,M]."""
    return K.transpose(2, 3), V


@FORMS
def test_gated_slot_attention(how: dict) -> None:
    inputs = slot_inputs()
    (B, T, H, K), M, V = inputs["q"].shape, inputs["s"].shape[-1], inputs["v"].shape[-1]
    rng = np.random.default_rng(2)
    inputs |= {"g": -np.logaddexp(0, inputs["s"]), "keys": rng.normal(size=(B, H, M, K))}
    inputs |= {"s": rng.uniform(size=(B, T, H, M)), "values": rng.normal(size=(B, H, M, V))}

    def ours(q: Any, k: Any, v: Any, s: Any, g: Any, keys: Any, values: Any) -> Any:
        return slot_attention(q, k, v, s, g, initial_state=(keys, values), **how)

    def theirs(q: Any, k: Any, v: Any, s: Any, g: Any, keys: Any, values: Any) -> Any:
        state = slots_first(keys, values)
        o, state = naive("gsa").naive_recurrent_gsa(q, k, v, s, g, initial_state=state, **STATE)
        return o, slots_first(*state)

    compare(ours, theirs, inputs)


@FORMS
def test_slots_that_average(how: dict) -> None:
    """Both definitions of ABC: sums divided by sums, and the recurrence, which also gives the state."""

    def ours(q: Any, k: Any, v: Any, s: Any) -> Any:
        g, _ = softmax_decay(s, impl=how["impl"])
        o, state = slot_attention(q, k, v, -jnp.expm1(g), g, **how)
        return o, o, state

    def theirs(q: Any, k: Any, v: Any, s: Any) -> Any:
        x = heads_first(q, k, v, s)
        sums, _ = naive("abc").naive_cumsum_abc(*x)
        steps, state = naive("abc").naive_recurrent_abc(*x, **STATE)
        return sums.transpose(1, 2), steps.transpose(1, 2), slots_first(*state)

    compare(ours, theirs, slot_inputs())
