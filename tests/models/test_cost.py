"""What a model costs, against counts that do not use its formulas."""

import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax import mixers
from hydrax.core import tree
from hydrax.core.build import ConfigError, build
from hydrax.models import lm
from hydrax.models.cost import cost
from hydrax.models.spec import ModelConfig

D, F, ROWS = 32, 40, 128
H, K, V = 2, 8, 16


def config(pattern: str, **values) -> ModelConfig:
    options = {name: mixers.row(name).tiny for name in mixers.names()}
    return build(
        ModelConfig,
        {"d_model": D, "pattern": pattern, "vocab_size": 100, "ffn_dim": F, "mixers": options, **values},
    )


GLA = 2 * D * H * K + 2 * D * H * V + D * 4 + 4 * H * K + H * K + V + H * V * D  # q k, v gate, decay, norm, project
ATTN = D * 4 * 8 + 2 * D * 2 * 8 + 2 * 8 + D * 4 * 8 + 4 * 8 * D  # q, k v, norms, gate, project
SWIGLU, MLP = 3 * D * F, 2 * D * F


@pytest.mark.parametrize(
    ("pattern", "values", "expected"),
    [
        ("gla", {}, ROWS * D + GLA + SWIGLU + 3 * D),
        ("5*(gla,attn)", {}, ROWS * D + 5 * (GLA + ATTN + 2 * SWIGLU + 4 * D) + D),
        ("attn,gla,gla", {"tie": False, "ffn": "mlp"}, 2 * ROWS * D + ATTN + 2 * GLA + 3 * MLP + 7 * D),
        ("attn", {"ffn": "none"}, ROWS * D + ATTN + 2 * D),
    ],
)
def test_parameters_counted_by_hand(pattern: str, values: dict, expected: int):
    cfg = config(pattern, **values)
    assert cost(cfg, seq_len=8).parameters == expected
    assert tree.count(lm.nnx.state(lm.build(cfg))) == expected


def dot_flops(jaxpr) -> float:
    """FLOPs of all matrix products of a program, the bodies of scans as often as they run."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        total += sum(times * dot_flops(inner) for inner in jax.extend.core.jaxprs_in_params(eqn.params))
    return total


@pytest.mark.parametrize("ffn", ["swiglu", "mlp", "none"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_flops_are_those_of_the_matrix_products(ffn: str, tie: bool):
    """The recurrence reads its state by a product (2KV) and writes it without one (2KV): the rest must be products."""
    T, layers = 24, 6
    cfg = config(f"{layers}*lightning", ffn=ffn, tie=tie)
    plan = lm.blueprint(cfg)
    tokens = jnp.zeros((1, T), jnp.int32)

    def run(params):
        model = plan.merge(params)
        return model.logits(model.hidden(tokens, impl="recurrent"))

    products = dot_flops(jax.make_jaxpr(run)(plan.shapes).jaxpr)
    assert cost(cfg, seq_len=T).flops_per_token * T == products + layers * T * 2 * H * K * V


def test_softmax_attention_counts_visible_keys():
    """Dense attention computes every pair; a causal document sees (T + 1) / 2 keys on average, a window fewer."""
    T, heads, width = 24, 4, 8
    cfg = config("3*attn", ffn="none")
    plan = lm.blueprint(cfg)

    def run(params):
        model = plan.merge(params)
        return model.logits(model.hidden(jnp.zeros((1, T), jnp.int32), impl="recurrent"))

    products = dot_flops(jax.make_jaxpr(run)(plan.shapes).jaxpr)
    unseen = 3 * 2 * heads * 2 * width * (T * T - T * (T + 1) / 2)
    assert cost(cfg, seq_len=T).flops_per_token * T == products - unseen
    window, sinks = 7, 2
    visible = [min(t + 1, window) + min(sinks, max(0, t + 1 - window)) for t in range(T)]
    row, options = mixers.row("swa"), mixers.get("swa").Config(**mixers.row("swa").tiny).fill(D)
    assert (options.window, options.sink_tokens) == (window, sinks)
    assert row.flops(options, T) == pytest.approx(2 * heads * 2 * width * np.mean(visible))


def test_totals_and_layers():
    cfg = config("2*(gdn,attn),swa")
    one, four = cost(cfg, seq_len=100), cost(cfg, seq_len=100, batch=4)
    assert [layer.mixer for layer in one.layers] == ["gdn", "attn", "gdn", "attn", "swa"]
    assert one.train_flops_per_token == 3 * one.flops_per_token
    assert (four.state_bytes, four.kv_bytes) == (4 * one.state_bytes, 4 * one.kv_bytes)
    assert four.flops_per_token == one.flops_per_token
    longer = cost(cfg, seq_len=1000)
    assert longer.state_bytes == one.state_bytes
    assert longer.kv_bytes > 9 * one.kv_bytes - one.layers[4].kv_bytes * 9
    assert sum(layer.parameters for layer in one.layers) + ROWS * D + D == one.parameters
    assert {layer.mixer: (layer.state_bytes > 0, layer.kv_bytes > 0) for layer in one.layers} == {
        "gdn": (True, False),
        "attn": (False, True),
        "swa": (False, True),
    }


@pytest.mark.parametrize(("key", "values"), [("seq_len", {"seq_len": 0}), ("batch", {"seq_len": 4, "batch": 0})])
def test_bad_sizes_are_refused(key: str, values: dict):
    with pytest.raises(ConfigError, match=f"{key} = 0: expected an integer >= 1"):
        cost(config("gla"), **values)
