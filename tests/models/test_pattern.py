"""The grammar of hybrids: what every line of it stands for, and what a mistake in it is told."""

import time

import pytest

from hydrax.core.build import ConfigError
from hydrax.models.pattern import MAX_LAYERS, Part, Stretch, composition, expand, stretches

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
        ("every(3,gdn,attn)", 8, "ddda" * 2),
        ("every(3,gdn,attn)", 9, "ddda" * 2 + "d"),
        ("every(3,gdn,attn,phase=0)", 8, "addd" * 2),
        ("every(3,gdn,attn,1)", 6, "dadddad"[:6]),
        ("every(7,mamba2,attn)", 4, "mmma"),  # none falls on the phase: the last layer
        ("bookend(1,attn,gdn)", 5, "addda"),
        ("bookend(3,attn,gdn)", 4, "aaaa"),
        ("bookend(0,attn,gdn)", 2, "dd"),
        ("select([],attn,gla)", 2, "gg"),
        ("select([1],(attn,swa),gla)", 2, "gas"),  # what stands for a layer may be several
        ("fill((swa,attn),5)", None, "sasas"),
        ("fill((attn,3*swa))", 6, "asssas"),
        ("gdn,every(1,gla,swa)", 3, "dgsg"),  # a helper takes the depth of the model, also inside a longer pattern
    ],
)
def test_patterns(pattern: str, depth: int | None, letters: str):
    assert expand(pattern, depth) == names(letters)


MULTIPLE = [3, 7, 11, 15, 19, 23]
ZAMBA = [6, 12, 18, 24, 30, 36, 42, 47, 51]
BOTH = "parallel(attn,mamba2)"
SYSTEMS = {
    "hydrahead": ("28*heads(4*attn, 12*gdn)", None, {"heads(4*attn,12*gdn)": range(28)}),
    "hymba": (
        "select([0,15,31], parallel(attn, mamba), parallel(swa, mamba))",
        32,
        {"parallel(attn,mamba)": [0, 15, 31], "parallel(swa,mamba)": [*range(1, 15), *range(16, 31)]},
    ),
    "oryx": ("24*modes(gdn)", None, {"modes(gdn)": range(24)}),
    "lt2 linear": ("loop(4, 20*gdn)", None, {"gdn": range(20)}),
    "lt2 hybrid": ("every(4, gdn, attn)", 20, {"attn": [4, 9, 14, 19]}),
    "lt2 bookend": ("bookend(2, attn, gdn)", 20, {"attn": [0, 1, 18, 19], "gdn": range(2, 18)}),
    "ouro": ("loop(4, 24*attn)", None, {"attn": range(24)}),
    "olmo hybrid": ("8*(3*gdn, attn)", None, {"attn": [3, 7, 11, 15, 19, 23, 27, 31]}),
    "hypenet": ("select([2,3,6,8,9,21,25], attn, lightning)", 28, {"attn": [2, 3, 6, 8, 9, 21, 25]}),
    "minimax": ("10*(7*lightning, attn)", None, {"attn": [i for i in range(80) if i % 8 == 7]}),
    "hydra": ("every(3, mamba, parallel(mamba, swa))", 8, {"mamba": [0, 1, 2, 4, 5, 6], "parallel(mamba,swa)": [3, 7]}),
    "hydra ffn": ("fill((moe, none))", 8, {"moe": [0, 2, 4, 6], "none": [1, 3, 5, 7]}),
    "hybridna": ("every(7, mamba2, attn)", 24, {"attn": [7, 15, 23]}),
    "flux": ("32*route(attn, swa)", None, {"route(attn,swa)": range(32)}),
    "gemma 2": ("fill((swa, attn))", 26, {"swa": range(0, 26, 2), "attn": range(1, 26, 2)}),
    "smallthinker": ("fill((attn, 3*swa))", 32, {"attn": [0, 4, 8, 12, 16, 20, 24, 28]}),
    "systematic 3:1": ("every(3, gdn, attn)", 24, {"attn": MULTIPLE}),
    "systematic 6:1": ("every(6, gdn, attn)", 24, {"attn": [6, 13, 20]}),
    "systematic 12:1": ("every(12, gdn, attn)", 24, {"attn": [12]}),
    "systematic 24:1": ("every(24, gdn, attn)", 24, {"attn": [23]}),
    "jamba": ("fill((4*mamba, attn, 3*mamba))", 32, {"attn": [4, 12, 20, 28]}),
    "jamba ffn": ("fill((swiglu, moe))", 32, {"moe": range(1, 32, 2)}),
    "samba": ("fill((mamba, swa))", 4, {"mamba": [0, 2], "swa": [1, 3]}),
    "zamba2": (f"select({ZAMBA}, fed, mamba2)", 54, {"fed": ZAMBA}),
    "griffin": ("fill((2*rglru, swa))", 26, {"swa": [2, 5, 8, 11, 14, 17, 20, 23]}),
    "qwen3-next": ("12*(3*gdn, attn)", None, {"attn": [i for i in range(48) if (i + 1) % 4 == 0]}),
    "kimi-linear": ("6*(3*kda, mla), 2*kda, mla", None, {"mla": [3, 7, 11, 15, 19, 23, 26]}),
    "falcon-h1": (f"36*{BOTH}", None, {BOTH: range(36)}),
    "deconstructing even": ("every(1, taylor, attn)", 24, {"attn": range(1, 24, 2)}),
    "deconstructing odd": ("every(1, taylor, attn, phase=0)", 24, {"attn": range(0, 24, 2)}),
    "deconstructing top": ("12*attn, 12*taylor", 24, {"taylor": range(12, 24)}),
    "deconstructing middle": ("6*attn, 12*taylor, 6*attn", 24, {"taylor": range(6, 18)}),
    "deconstructing bottom": ("6*taylor, 18*attn", 24, {"taylor": range(6)}),
    "deconstructing quarter": ("every(3, taylor, attn)", 24, {"attn": MULTIPLE}),
    "deconstructing first": ("select([0], attn, taylor)", 24, {"attn": [0]}),
    "deconstructing last": ("select([23], attn, taylor)", 24, {"attn": [23]}),
    "deconstructing bilateral": ("bookend(1, attn, taylor)", 24, {"attn": [0, 23]}),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_layers_of_published_systems(system: str):
    """Their indices as the papers and codes have them, and every other layer of another kind."""
    pattern, depth, places = SYSTEMS[system]
    found = expand(pattern, depth)
    assert len(found) == depth or depth is None
    for name, indices in places.items():
        assert [i for i, n in enumerate(found) if n == name] == list(indices), name


# ------------------------------------------------------------------------------------------------------- compositions


@pytest.mark.parametrize(
    ("text", "kind", "parts"),
    [
        ("heads(2*attn, 6*gdn)", "heads", [Part("attn", count=2), Part("gdn", count=6)]),
        ("heads(attn[0,5], gdn)", "heads", [Part("attn", indices=(0, 5)), Part("gdn")]),
        ("heads(attn[3])", "heads", [Part("attn", indices=(3,))]),
        ("parallel(attn, mamba, gla)", "parallel", [Part("attn"), Part("mamba"), Part("gla")]),
        (" modes( gdn ) ", "modes", [Part("gdn")]),
        ("route(heads(2*attn, 2*gla), swa)", "route", [Part("heads(2*attn,2*gla)"), Part("swa")]),
    ],
)
def test_compositions(text: str, kind: str, parts: list[Part]):
    assert composition(text) == (kind, parts)


def test_a_name_is_no_composition():
    assert composition(" attn ") is None


def test_a_composition_is_one_layer_whose_name_is_its_text():
    assert expand("2*( heads(2*attn, 6*gdn),gla )") == ["heads(2*attn,6*gdn)", "gla"] * 2
    assert expand("heads( attn[0, 5],gdn)") == ["heads(attn[0,5],gdn)"]
    assert expand("every(1, gla, route(attn, parallel(swa,gla)))", 4) == ["gla", "route(attn,parallel(swa,gla))"] * 2


# -------------------------------------------------------------------------------------------------------------- loops


@pytest.mark.parametrize(
    ("pattern", "depth", "expected"),
    [
        ("2*gla", None, [Stretch(("gla", "gla"))]),
        ("gla,attn,gla", None, [Stretch(("gla", "attn", "gla"))]),
        ("loop(3,gla,attn)", None, [Stretch(("gla", "attn"), 3)]),
        ("loop(3,(gla,attn))", None, [Stretch(("gla", "attn"), 3)]),
        (
            "swa,loop(3,2*(gla,attn)),2*swa,gdn",
            None,
            [Stretch(("swa",)), Stretch(("gla", "attn") * 2, 3), Stretch(("swa", "swa", "gdn"))],
        ),
        (
            "loop(1,gla),loop(2,gla),loop(2,attn)",
            None,
            [Stretch((n,), k) for n, k in (("gla", 1), ("gla", 2), ("attn", 2))],
        ),
        ("loop(4,every(1,gdn,attn))", 4, [Stretch(("gdn", "attn") * 2, 4)]),
    ],
)
def test_loops_cut_the_layers_into_stretches(pattern: str, depth: int | None, expected: list[Stretch]):
    assert stretches(pattern, depth) == expected
    assert expand(pattern, depth) == [name for stretch in expected for name in stretch.names]


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("pattern", "depth", "message"),
    [
        ("3*(gdn,attn", None, "'(' was never closed"),
        ("", None, "pattern = ''"),
        ("()", None, "expected at least one layer"),
        ("loop(2)", None, "expected at least one layer"),
        ("0*gdn", None, "cannot read '0 * gdn'; expected names, n*(...), or every, bookend, select, fill, heads"),
        ("gdn*2", None, "cannot read 'gdn * 2'"),
        ("gdn+attn", None, "cannot read 'gdn + attn'"),
        ("'gdn'", None, "cannot read \"'gdn'\""),
        ("9999*9999*gdn", None, "cannot read '9999 * 9999 * gdn'"),
        ("9999*(9999*gdn)", None, f"expected at most {MAX_LAYERS} layers"),
        (f"{MAX_LAYERS}*gdn,gdn", None, f"expected at most {MAX_LAYERS} layers"),
        (f"loop(2,{MAX_LAYERS}*gdn),gdn", None, f"expected at most {MAX_LAYERS} layers"),
        ("__import__('os')", None, "cannot read"),
        ("-" * 5000 + "gdn", None, "recursion"),
        ("every(3,gdn,attn)", None, "a helper without a count needs num_layers"),
        ("every(3,gdn)", 4, "cannot read 'every(3, gdn)'; expected every(r, lin, full, phase=r)"),
        ("every(3,gdn,attn,shift=1)", 4, "cannot read 'every(3, gdn, attn, shift=1)'; expected every("),
        ("every(3,5,attn)", 4, "cannot read 'every(3, 5, attn)'; expected every("),
        ("every(gdn,gdn,attn)", 4, "cannot read 'every(gdn, gdn, attn)'; expected every("),
        ("bookend([1],attn,gdn)", 4, "cannot read 'bookend([1], attn, gdn)'; expected bookend(n, full, lin)"),
        ("select([4],attn,gdn)", 4, "layer 4 does not exist among 4 layers"),
        ("select([0],[1],gdn)", 4, "cannot read 'select([0], [1], gdn)'; expected select([i, ...], full, lin)"),
        ("select([0.5],attn,gdn)", 4, "cannot read '[0.5]'"),
        ("select([attn],attn,gdn)", 4, "cannot read '[attn]'"),
        ("fill((swa,attn),-3)", None, "cannot read '-3'"),
        ("fill([1],3)", None, "cannot read 'fill([1], 3)'; expected fill(pattern, L)"),
        ("fill(attn,3,**x)", None, "cannot read 'fill(attn, 3, **x)'; expected fill(pattern, L)"),
        ("heads()", None, "cannot read 'heads()'; expected heads(2*attn, 6*gdn)"),
        ("heads(2*attn,x=gdn)", None, "cannot read 'heads(2 * attn, x=gdn)'; expected heads("),
        ("heads(0*attn,gdn)", None, "cannot read the part '0 * attn'; expected name, n*name, name[i,...] or a layer"),
        ("heads(attn[-1],gdn)", None, "cannot read the part 'attn[-1]'"),
        ("heads(attn[0:2],gdn)", None, "cannot read the part 'attn[0:2]'"),
        ("heads(2*attn[0],gdn)", None, "cannot read the part '2 * attn[0]'"),
        ("parallel(2*(attn,gdn))", None, "cannot read the part '2 * (attn, gdn)'"),
        ("parallel(loop(2,attn),gdn)", None, "cannot read the part 'loop(2, attn)'"),
        ("parallel(every(1,attn,gdn),gdn)", 2, "cannot read the part 'every(1, attn, gdn)'"),
        ("loop(attn)", None, "cannot read 'loop(attn)'; expected loop(n, pattern) these layers n times"),
        ("loop(0,attn)", None, "cannot read 'loop(0, attn)'; expected loop(n, pattern)"),
        ("loop(2,attn,n=3)", None, "cannot read 'loop(2, attn, n=3)'; expected loop(n, pattern)"),
        ("2*(loop(2,attn))", None, "loop(...) stands beside other terms, not inside of them"),
        ("loop(2,loop(2,attn))", None, "loop(...) stands beside other terms, not inside of them"),
        ("fill(loop(2,attn),3)", None, "loop(...) stands beside other terms, not inside of them"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_end_in_one_line(pattern: str, depth: int | None, message: str):
    began = time.process_time()
    with pytest.raises(ConfigError) as error:
        stretches(pattern, depth)
    line = str(error.value)
    assert message in line and "\n" not in line
    assert line.startswith("pattern = ")
    assert time.process_time() - began < 1


def test_the_key_of_another_pattern_is_named():
    with pytest.raises(ConfigError, match=r"^ffn_pattern = 'moe\+mlp': cannot read 'moe \+ mlp'"):
        expand("moe+mlp", None, "ffn_pattern")


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("attn,gdn", "expected a name or one of heads(...), parallel(...), modes(...), route(...)"),
        ("every(1,attn,gdn)", "expected a name or one of heads(...)"),
        ("loop(2,attn)", "expected a name or one of heads(...)"),
        ("heads(attn", "'(' was never closed"),
        ("parallel(attn,)+1", "expected a name or one of heads(...)"),
        ("-" * 5000 + "a", "recursion"),
    ],
    ids=lambda value: value[:40],
)
def test_what_is_no_mixer_of_a_block(expression: str, message: str):
    with pytest.raises(ConfigError) as error:
        composition(expression)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("mixer = ")
