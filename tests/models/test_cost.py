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
from hydrax.models.mix import Mix
from hydrax.models.modes import Modes
from hydrax.models.spec import ModelConfig, sections

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


LORA = {"mixer": "attn", "shared": True, "lora_rank": 3, "lora_on": ["ffn"]}
WORKSPACE = {"slots": 6, "rank": 4, "chunk": 4}
PKM = {"rows": 8, "key_dim": 4, "top_k": 3, "value_dim": 16}


def test_active_parameters_leave_out_what_a_token_does_not_use():
    one = 3 * D * F  # expert
    moe = {"ffn": "moe", "moe": {"experts": 8, "top_k": 2, "shared": 1, "balance": 0.0}}
    for pattern, values, unused in [
        ("2*gla,attn", moe, 3 * 6 * one),
        ("4*gla", {"ffn_pattern": "fill((swiglu,moe))", **moe}, 2 * 6 * one),
        ("s,gla,s", {"blocks": {"s": {"mixer": "attn", "shared": True, **moe}}}, 6 * one),
        ("4*gla", {"memory": {"pkm": PKM, "every": 2}}, 2 * (8**2 - 3) * 16),
    ]:
        result = cost(config(pattern, **values), seq_len=8)
        assert result.parameters - result.active_parameters == unused, pattern


def test_common_weights_count_once_as_parameters_and_in_every_layer_as_flops():
    shared, own = (
        cost(config("s,gla,s,s", blocks={"s": {"mixer": "attn", "shared": shared}}), seq_len=8)
        for shared in (True, False)
    )
    assert shared.shared_parameters == ATTN + SWIGLU + 2 * D
    assert own.parameters - shared.parameters == 2 * shared.shared_parameters
    assert shared.flops_per_token == own.flops_per_token
    assert [layer.parameters for layer in shared.layers] == [0, GLA + SWIGLU + 2 * D, 0, 0]
    low_rank = cost(config("s,gla,s,s", blocks={"s": LORA}), seq_len=8)
    change = 3 * 3 * (D + F)  # to each of the three matrices of the FFN
    assert [layer.parameters for layer in low_rank.layers][2:] == [change, change]
    assert low_rank.flops_per_token - own.flops_per_token == 3 * 2 * change


def dot_flops(jaxpr) -> float:
    """FLOPs of all matrix products of a program, the bodies of scans as often as they run."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
        if eqn.primitive.name == "ragged_dot_general":
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * eqn.invars[0].aval.shape[-1]
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        total += sum(times * dot_flops(inner) for inner in jax.extend.core.jaxprs_in_params(eqn.params))
    return total


def products(cfg: ModelConfig, T: int) -> float:
    """FLOPs of the matrix products of the forward pass over T tokens."""
    plan = lm.blueprint(cfg)

    def run(params):
        model = plan.merge(params)
        return model.logits(model.hidden(jnp.zeros((1, T), jnp.int32), impl="recurrent"))

    return dot_flops(jax.make_jaxpr(run)(plan.shapes).jaxpr)


def hidden_from_products(mix: Mix, T: int) -> float:
    """What T tokens cost beyond the products of the mixing itself.

    The recurrence reads its state by a product (2KV) and writes it without one (2KV). Dense attention computes every
    pair of tokens; a causal document sees (T + 1) / 2 keys on average.
    """
    total = sum(hidden_from_products(part, T) for part in mix.members)
    if isinstance(mix, Modes):
        heads, key_dim, value_dim = mix.heads()
    elif mix.label == "lightning":
        return T * 2 * mix.options.heads * mix.options.key_dim * mix.options.value_dim
    elif mix.label == "attn":
        heads, key_dim, value_dim = mix.options.heads, mix.options.key_dim, mix.options.value_dim
    else:
        return total
    return total - 2 * heads * (key_dim + value_dim) * (T * T - T * (T + 1) / 2)


FED = {"c": {"mixer": "attn", "shared": True}, "f": {"mixer": "lightning", "feed": "c"}}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("pattern", "values"),
    [
        *[("6*lightning", {"ffn": ffn, "tie": tie}) for ffn in ("swiglu", "mlp", "none") for tie in (True, False)],
        ("lightning,attn", {"ffn_pattern": "none,geglu"}),
        ("3*attn", {"ffn": "none"}),
        ("lightning,loop(3,lightning,attn)", {}),
        ("2*(lightning,attn)", {"loop": {"n": 2}}),
        ("2*heads(2*attn,2*lightning)", {"mixers": {}}),
        ("heads(attn,lightning)", {"mixers": {"attn": {"kv_heads": 1}}, "norm_place": "sandwich"}),
        ("2*parallel(attn,lightning)", {}),
        ("p", {"blocks": {"p": {"mixer": "parallel(attn,lightning)", "options": {"fusion": "softmax_gate"}}}}),
        ("2*modes(lightning)", {}),
        ("route(attn,lightning)", {"mixers": {"lightning": {"heads": 4}}}),
        ("attn,lightning,attn", {"share": {"kv": [[0, 2]]}}),
        ("s,lightning,s", {"blocks": {"s": {"mixer": "attn", "shared": True}}}),
        ("lightning,f,f", {"blocks": FED}),
        ("f,lightning,f", {"blocks": {**FED, "f": {**FED["f"], "shared": True}}}),
        ("2*lightning", {"ffn": "moe", "moe": {"experts": 8, "top_k": 3, "shared": 2, "shared_gate": True}}),
        ("2*lightning", {"ffn": "moe", "moe": {"kind": "relu2", "router_at": "pre_attn"}}),
        ("2*(lightning,attn)", {"memory": {"pkm": PKM, "every": 2}}),
        ("2*(lightning,attn)", {"prefix": {"meta_tokens": 5}}),
    ],
)
def test_flops_are_those_of_the_matrix_products(pattern: str, values: dict):
    T = 24
    cfg = config(pattern, **values)
    length = T + cfg.prefix.meta_tokens
    expected = products(cfg, T)
    for section in sections(cfg):
        for layer in section.layers:
            mixes = [layer.mix] + ([layer.feed.mix] if layer.feed else [])
            expected += section.loops * sum(hidden_from_products(mix, length) for mix in mixes)
    assert cost(cfg, seq_len=T).flops_per_token * T == pytest.approx(expected, rel=1e-12)


def test_workspace_reads_count_and_writes_do_not():
    without, with_it = (cost(config("2*gla", memory={"workspace": w}), seq_len=8) for w in (None, WORKSPACE))
    M, R = WORKSPACE["slots"], WORKSPACE["rank"]
    added = 2 * (4 * D * R + 2 * D) + 4 * M * D  # query, key, value, project, gate; scores and read
    assert with_it.flops_per_token - without.flops_per_token == 2 * added


def test_tied_parts_of_a_route_compute_once_what_they_share():
    tied, apart = (
        cost(config("r", mixers={}, blocks={"r": {"mixer": "route(attn,swa)", "options": {"tie": tie}}}), seq_len=8)
        for tie in (True, False)
    )
    assert apart.flops_per_token - tied.flops_per_token == 2 * 3 * D * D  # q, k and v


def test_passes_with_options_of_their_own_cost_what_these_do():
    windows = [7, 3, 3]
    loops = {"n": 3, "per_loop": [{"swa": {"window": w}} for w in windows]}
    alone = [cost(config("swa", mixers={"swa": {"window": w}}), seq_len=50) for w in windows]
    looped = cost(config("swa", mixers={"swa": {"window": windows[0]}}, loop=loops), seq_len=50)
    assert looped.layers[0].flops == sum(one.layers[0].flops for one in alone)
    assert looped.parameters == alone[0].parameters
    assert [layer.passes for layer in looped.layers] == [3]


def test_softmax_attention_counts_visible_keys():
    T, heads, width = 24, 4, 8
    window, sinks = 7, 2
    visible = [min(t + 1, window) + min(sinks, max(0, t + 1 - window)) for t in range(T)]
    row, options = mixers.row("swa"), mixers.get("swa").Config(**mixers.row("swa").tiny).fill(D)
    assert (options.window, options.sink_tokens) == (window, sinks)
    assert row.flops(options, T) == pytest.approx(2 * heads * 2 * width * np.mean(visible))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("pattern", "values"),
    [
        pytest.param(",".join(mixers.names()), {}, marks=pytest.mark.slow),  # each alone is in the contract
        ("4*heads(2*attn,2*gla)", {"mixers": {}}),
        ("h,h,gla", {"mixers": {}, "blocks": {"h": {"mixer": "heads(attn[0,2],mamba2)", "options": {"total": 4}}}}),
        ("2*(parallel(attn,swa),gla)", {}),
        ("modes(gdn),modes(mamba2),modes(gla)", {}),
        ("2*route(attn,swa),route(parallel(swa,attn),attn)", {}),
        ("gla,loop(3,gdn,attn),swa", {}),
        ("2*(gla,attn)", {"loop": {"n": 2, "block_gate": 2, "gate": "channel"}}),
        ("2*(gla,attn),attn,swa,swa", {"share": {"kv": [[1, 3, 4], [5, 6]]}}),
        ("loop(2,gla,attn,attn)", {"share": {"kv": [[1, 2]]}}),
        ("swa,gla", {"loop": {"n": 3, "per_loop": [{"swa": {"window": w}} for w in (7, 3, 16)]}}),
        ("gla,attn,swa,modes(gdn)", {"prefix": {"meta_tokens": 5}}),
        ("4*(gla,attn)", {"memory": {"workspace": WORKSPACE, "pkm": PKM, "every": 2}}),
        ("2*(gla,attn)", {"ffn": "moe", "moe": {"granularity": "chunk"}}),
        ("2*(gla,attn)", {"ffn_pattern": "fill((swiglu,moe))"}),
        ("s,gla,s", {"blocks": {"s": {"mixer": "attn", **LORA, "ffn": "moe", "moe": {"granularity": "chunk"}}}}),
        (
            "loop(2,gla,f),f",
            {
                "blocks": {
                    "c": {"mixer": "route(attn,swa)", "shared": True},
                    "f": {"mixer": "modes(gdn)", "feed": "c", "ffn": "moe", "moe": {"granularity": "chunk"}},
                },
                "prefix": {"meta_tokens": 3},
            },
        ),
    ],
)
def test_bytes_are_those_of_the_cache(pattern: str, values: dict):
    cfg = config(pattern, **values)
    plan = lm.blueprint(cfg)
    for length, dtype in ((3, jnp.float32), (19, jnp.bfloat16)):
        cache = jax.eval_shape(
            lambda params, n=length, dtype=dtype: plan.merge(plan.cast(params, dtype)).init_cache(2, n, dtype),
            plan.shapes,
        )
        result = cost(cfg, seq_len=length, batch=2, itemsize=jnp.dtype(dtype).itemsize)
        assert result.cache_bytes == tree.nbytes((cache.layers, cache.final))


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
