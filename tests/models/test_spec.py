"""From the pattern to the list of layers, and from that list to what is scanned."""

import time

import pytest

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.mixers import get
from hydrax.models.layers import group
from hydrax.models.pattern import MAX_LAYERS
from hydrax.models.spec import ModelConfig, resolve


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pattern": "3*(gdn,attn"}, "pattern = '3*(gdn,attn': '(' was never closed"),
        ({"pattern": "2*attn,gdm"}, f"'gdm' is neither a mixer nor a block; allowed: {', '.join(mixers.names())}"),
        ({"pattern": "every(3,gdn,attn)"}, "a helper without a count needs num_layers"),
        ({"pattern": "3*gdn,attn", "num_layers": 5}, "num_layers = 5: the pattern '3*gdn,attn' has 4 layers"),
        ({"pattern": "9999*(9999*gdn)"}, f"expected at most {MAX_LAYERS} layers"),
        (
            {"pattern": "x", "blocks": {"x": {"mixer": "gdm"}}},
            f"blocks.x.mixer = 'gdm': expected one of {', '.join(mixers.names())}",
        ),
        ({"pattern": "x", "blocks": {"x": {"mixer": "gla", "options": {"head": 2}}}}, "blocks.x.options.head = 2"),
        ({"pattern": "gla", "mixers": {"gla": {"heads": 5}}}, "mixers.gla.heads = 5: expected a divisor of d_model"),
        ({"pattern": "gla", "mixers": {"gla": {"preset": "x"}}}, "mixers.gla.preset = 'x': gla has no presets"),
        (
            {"pattern": "gla", "mixers": {"gdn": {"preset": "x"}}},
            "mixers.gdn.preset = 'x': expected one of olmo, qwen3next",
        ),
        ({"pattern": "gla", "mixers": {"gdn": {"preset": [1]}}}, "mixers.gdn.preset = [1]: expected one of olmo"),
        ({"pattern": "gla", "mixers": {"attn": {"heads": "4"}}}, "mixers.attn.heads = '4': expected an integer"),
        ({"pattern": "gla", "mixers": {"attm": {}}}, "mixers.attm = {}: expected one of aaren, abc, agent, attn,"),
        ({"pattern": "gla", "mixers": {"attn": 3}}, "mixers.attn = 3: expected a mapping of options"),
        ({"pattern": "x", "blocks": {"x": {}}}, "blocks.x = {}"),
        (
            {"pattern": "x", "blocks": {"x": {"mixer": "gla,attn"}}},
            "blocks.x.mixer = 'gla,attn': expected a name or one",
        ),
        ({"pattern": "gla", "blocks": {"x": {"mixer": "gdm"}}}, "blocks.x.mixer = 'gdm'"),  # used or not
        (
            {"pattern": "x", "blocks": {"x": {"mixer": "gla", "ffn": "swigl"}}},
            "blocks.x.ffn = 'swigl': expected one of",
        ),
        (
            {"pattern": "gla", "norm": "layer"},
            "norm = 'layer': expected one of rmsnorm, rmsnorm1p, srmsnorm, layernorm",
        ),
        ({"pattern": "gla", "norm_place": "mid"}, "norm_place = 'mid': expected one of pre, reordered, sandwich, post"),
        ({"pattern": "gla", "post_alpha": 0}, "post_alpha = 0.0: expected a number > 0"),
        ({"pattern": "2*gla", "ffn_pattern": "swiglu"}, "ffn_pattern = 'swiglu': it has 1 entries for 2 layers"),
        ({"pattern": "gla", "ffn_pattern": "swiglu,mlp"}, "ffn_pattern = 'swiglu,mlp': it has 2 entries for 1 layers"),
        (
            {"pattern": "2*gla", "ffn_pattern": "mlp,gelu"},
            "ffn_pattern = 'mlp,gelu': 'gelu': expected names of none, moe, swiglu, geglu, reglu, sglu, mlp, relu2",
        ),
        ({"pattern": "2*gla", "ffn_pattern": "heads(mlp)"}, "'heads(mlp)': expected names of none, moe, swiglu"),
        ({"pattern": "2*gla", "ffn_pattern": "fill(mlp"}, "ffn_pattern = 'fill(mlp': '(' was never closed"),
        (
            {"pattern": "x", "blocks": {"x": {"mixer": "gla", "moe": {"experts": 2}}}},
            "blocks.x.moe = {'experts': 2}: needs ffn = moe, and it is swiglu",
        ),
        (
            {"pattern": "x", "ffn": "moe", "blocks": {"x": {"mixer": "gla", "moe": {"expert": 2}}}},
            "blocks.x.moe.expert = 2: unknown key; did you mean 'experts'",
        ),
    ],
)
def test_mistakes_end_in_one_line(values: dict, message: str):
    began = time.process_time()
    with pytest.raises(ConfigError) as error:
        resolve(build(ModelConfig, {"d_model": 32, **values}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert time.process_time() - began < 1


def test_options_come_from_the_block_then_the_mixer_then_the_default():
    cfg = build(
        ModelConfig,
        {
            "d_model": 48,
            "pattern": "gla,wide,attn",
            "mixers": {"gla": {"heads": 2, "gate_rank": 3}},
            "blocks": {"wide": {"mixer": "gla", "options": {"gate_rank": 5}, "ffn": "mlp", "ffn_dim": 24}},
            "ffn": "swiglu",
        },
    )
    plain, wide, attn = resolve(cfg)
    assert (plain.options.heads, plain.options.gate_rank, plain.ffn, plain.ffn_dim) == (2, 3, "swiglu", 256)
    assert (wide.options.heads, wide.options.gate_rank, wide.ffn, wide.ffn_dim) == (2, 5, "mlp", 24)
    assert (plain.block, plain.mixer, wide.block, wide.mixer) == ("gla", "gla", "wide", "gla")
    assert attn.options == get("attn").Config(heads=4).fill(48)


def test_what_a_block_leaves_open_is_the_models():
    cfg = build(
        ModelConfig,
        {
            "d_model": 32,
            "pattern": "gla,own,routed,gla",
            "blocks": {
                "own": {"mixer": "gla", "norm": "srmsnorm", "norm_place": "post", "post_beta": 3.0, "ffn": "none"},
                "routed": {"mixer": "attn", "moe": {"top_k": 2}, "ffn_dim": 24},
            },
            "ffn_pattern": "fill((mlp,relu2,moe,moe))",
            "ffn_dim": 40,
            "moe": {"experts": 4, "kind": "mlp", "top_k": 3},
            "norm": "rmsnorm1p",
            "norm_place": "sandwich",
            "post_alpha": 2.0,
            "memory": {"pkm": {}, "every": 2},
        },
    )
    gla, own, routed, last = resolve(cfg)
    assert [(x.norm, x.norm_place, x.alpha, x.beta) for x in (gla, own)] == [
        ("rmsnorm1p", "sandwich", 2.0, 1.0),
        ("srmsnorm", "post", 2.0, 3.0),
    ]
    assert [(x.ffn, x.ffn_dim) for x in (gla, own, routed, last)] == [
        ("mlp", 40),
        ("none", None),
        ("moe", None),
        ("moe", None),
    ]
    assert (routed.moe.experts, routed.moe.top_k, routed.moe.kind, routed.moe.width) == (4, 2, "mlp", 24)
    assert (last.moe.experts, last.moe.top_k, last.moe.width) == (4, 3, 40)
    assert (gla.moe, own.moe) == (None, None)
    assert [x.memory for x in (gla, own, routed, last)] == [False, True, False, True]


def test_experts_are_as_wide_as_a_dense_network_unless_told():
    cfg = build(ModelConfig, {"d_model": 96, "pattern": "2*gla", "ffn_pattern": "moe,mlp", "moe": {"kind": "mlp"}})
    routed, dense = resolve(cfg)
    assert routed.moe.width == dense.ffn_dim == 512


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("24*(3*gdn,attn)", [(4, 24)]),
        ("48*attn", [(1, 48)]),
        ("swa,10*(7*lightning,attn),gla", [(1, 1), (8, 10), (1, 1)]),
        ("attn,10*(7*lightning,attn),gla", [(8, 10), (1, 1), (1, 1)]),  # from the left: attn, 7 lightning
        ("2*(gdn,gdn,attn),swa", [(3, 2), (1, 1)]),
        ("gdn,gdn,attn", [(1, 2), (1, 1)]),
        ("gdn,attn,gla", [(1, 1)] * 3),
        ("3*heads(2*attn,2*gdn),4*parallel(attn,gla)", [(1, 3), (1, 4)]),
        ("2*(heads(3*attn,gla),heads(attn,3*gla))", [(2, 2)]),
    ],
)
def test_layers_are_grouped_into_repeated_periods(pattern: str, expected: list[tuple[int, int]]):
    layers = resolve(build(ModelConfig, {"pattern": pattern}))
    groups = group(layers)
    assert [(len(g.period), g.repeats) for g in groups] == expected
    assert tuple(layer for g in groups for layer in g.period * g.repeats) == layers
    starts = [0]
    for g in groups:
        starts.append(starts[-1] + len(g.period) * g.repeats)
    assert [g.start for g in groups] == starts[:-1]
