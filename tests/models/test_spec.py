"""From the pattern to the list of layers, and from that list to what is scanned."""

import time

import pytest

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.mixers import get
from hydrax.models.spec import MAX_LAYERS, ModelConfig, expand, group, resolve

LETTERS = {"a": "attn", "d": "gdn", "l": "lightning", "m": "mamba2", "s": "swa", "g": "gla"}


def names(letters: str) -> list[str]:
    return [LETTERS[letter] for letter in letters]


@pytest.mark.parametrize(
    ("pattern", "depth", "letters"),
    [
        ("attn", None, "a"),
        ("3*gdn, attn", None, "ddda"),
        ("2*(3*gdn,attn)", None, "ddda" * 2),
        ("gla,2*(gdn,2*(swa,attn)),gla", None, "g" + "dsasa" * 2 + "g"),
        ("8*(3*gdn,attn)", None, "ddda" * 8),  # Olmo Hybrid
        ("10*(7*lightning,attn)", None, "llllllla" * 10),  # MiniMax-01
        ("every(3,gdn,attn)", 8, "ddda" * 2),
        ("every(3,gdn,attn)", 9, "ddda" * 2 + "d"),
        ("every(3,gdn,attn,phase=0)", 8, "addd" * 2),
        ("every(7,mamba2,attn)", 4, "mmma"),  # none falls on the phase: the last layer
        ("bookend(1,attn,gdn)", 5, "addda"),
        ("bookend(3,attn,gdn)", 4, "aaaa"),
        ("select([0,15,31],attn,mamba2)", 32, "a" + "m" * 14 + "a" + "m" * 15 + "a"),  # Hymba
        ("select([],attn,gla)", 2, "gg"),
        ("fill((swa,attn),5)", None, "sasas"),
        ("fill((attn,3*swa))", 6, "asssas"),  # SmallThinker
        ("gdn,every(1,gla,swa)", 3, "dgsg"),  # a helper takes the depth of the model, also inside a longer pattern
    ],
)
def test_patterns(pattern: str, depth: int | None, letters: str):
    assert expand(pattern, depth) == names(letters)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pattern": "3*(gdn,attn"}, "pattern = '3*(gdn,attn': '(' was never closed"),
        ({"pattern": ""}, "pattern = ''"),
        ({"pattern": "0*gdn"}, "pattern = '0*gdn': cannot read"),
        ({"pattern": "gdn*2"}, "cannot read 'gdn * 2'"),
        ({"pattern": "2*attn,gdm"}, f"'gdm' is neither a mixer nor a block; allowed: {', '.join(mixers.names())}"),
        ({"pattern": "every(3,gdn,attn)"}, "a helper without a count needs num_layers"),
        ({"pattern": "every(3,gdn)", "num_layers": 4}, "expected every(r, lin, full, phase=r)"),
        ({"pattern": "select([4],attn,gdn)", "num_layers": 4}, "layer 4 does not exist among 4 layers"),
        ({"pattern": "3*gdn,attn", "num_layers": 5}, "num_layers = 5: the pattern '3*gdn,attn' has 4 layers"),
        ({"pattern": "9999*9999*gdn"}, "cannot read"),
        ({"pattern": "9999*(9999*gdn)"}, f"more than {MAX_LAYERS} layers"),
        ({"pattern": "__import__('os')"}, "cannot read"),
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
    ],
)
def test_mistakes_end_in_one_line(values: dict, message: str):
    began = time.monotonic()
    with pytest.raises(ConfigError) as error:
        resolve(build(ModelConfig, {"d_model": 32, **values}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert time.monotonic() - began < 1


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
