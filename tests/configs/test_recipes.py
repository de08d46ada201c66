"""Every config that comes with hydrax: it builds, and its text says what it does."""

import re

import pytest

from hydrax.core.build import ConfigError, build
from hydrax.core.config import known, load_config, load_module
from hydrax.models.cost import cost
from hydrax.models.spec import resolve
from hydrax.train.config import RunConfig

RECIPES = [name for name in known() if name.startswith("recipes/")]
SYSTEMATIC = "recipes/systematic"
SIZED = [
    f"{name}:{size}"
    for name in RECIPES
    if name != SYSTEMATIC
    for size in list(getattr(load_module(name)[0], "SIZES", {}))[1:]
]
"""Every size but the first, which is the one without an argument."""

PUBLISHED = {
    "falcon_h1": (521_411_104, 2 * 112 * 1024),  # rows up to a multiple of 128
    "flux": (8_190_735_360, 36 * (4096 * 64 + 2 * 64 + 1)),  # Qwen3 8B; routers
    "gemma2": (2_614_341_888, 0),
    "griffin": (2_682_862_080, 0),
    "hymba": (1_522_797_824, 127 * 1600),  # rows
    "jamba": (51_570_323_328, 0),
    "kimi_linear": (49_122_675_072, 26 * 256),  # selection biases: there, they are no parameters
    "minimax_01": (456_089_655_296, 0),
    "nemotron_h": (8_100_852_736, 0),
    "olmo_hybrid": (7_430_870_688, 0),
    "qwen3_next": (79_674_391_296, 0),
    "samba": (421_793_280, 0),
    "samba:1b3": (1_330_207_488, 0),
    "smallthinker": (4_035_085_824, 0),
    "smallthinker:21b": (21_506_562_560, 0),
    "zamba2": (2_662_214_560, 9 * 2560 * 128),  # gate and up change by a narrow half of their own
}
"""Parameters of published models, by transformers where it has them or else the released code; what is ours beside."""


@pytest.mark.parametrize("name", known())
def test_configs_build_and_open_with_their_command(name: str) -> None:
    build(RunConfig, load_config(name).to_dict())
    text = load_module(name)[0].__doc__
    assert re.search(rf"python -m launch\.train --config=(configs/)?{name}\b", text)
    assert "Hardware: " in text or name == "lm"
    assert "Expected" in text or name == "lm"


@pytest.mark.parametrize("name", SIZED)
def test_every_size_builds_and_is_in_the_text(name: str) -> None:
    cfg = build(RunConfig, load_config(name).to_dict()).model
    assert cfg.num_layers in (None, len(resolve(cfg)))
    assert re.search(rf"\b{name.partition(':')[2]}\b", load_module(name)[0].__doc__)


@pytest.mark.parametrize("name", RECIPES + [f"recipes/{name}" for name in PUBLISHED if ":" in name])
def test_recipes_have_the_parameters_that_they_claim_and_that_were_published(name: str) -> None:
    parameters = cost(load_config(name).model, seq_len=1).parameters
    if ":" not in name:
        assert round(parameters / 1e6) == int(re.search(r"(\d+)M\s+parameters", load_module(name)[0].__doc__)[1])
    published, ours = PUBLISHED.get(name.removeprefix("recipes/"), (parameters, 0))
    assert parameters == published + ours


def test_the_table_of_published_models_has_recipes() -> None:
    assert {f"recipes/{name}" for name in PUBLISHED} <= {*RECIPES, *SIZED}


@pytest.mark.parametrize(
    ("arg", "full"),
    [
        ("mixer=gdn,ratio=3", [3, 7, 11, 15, 19, 23]),
        ("mixer=hgrn,ratio=6", [6, 13, 20]),
        ("mixer=gla,ratio=24,size=1b3", [23]),
        ("mixer=hgrn2,ratio=12", [12]),
        ("mixer=retention", []),
        ("mixer=attn", list(range(24))),
    ],
)
def test_the_systematic_study_places_attention(arg: str, full: list[int]) -> None:
    layers = resolve(build(RunConfig, load_config(f"{SYSTEMATIC}:{arg}").to_dict()).model)
    assert [i for i, layer in enumerate(layers) if layer.mixer == "attn"] == full
    assert len(layers) == 24


@pytest.mark.parametrize("arg", ["mixer=mamba2", "ratio=5", "size=7b", "ratios=3"])
def test_the_systematic_study_refuses_what_it_did_not_study(arg: str) -> None:
    with pytest.raises(ConfigError, match=r"expected one of|unknown argument"):
        load_config(f"{SYSTEMATIC}:{arg}")


def test_only_the_first_layer_of_tnl_has_positions() -> None:
    layers = resolve(build(RunConfig, load_config("recipes/tnl_385m").to_dict()).model)
    assert [layer.options.position for layer in layers] == ["lrpe"] + ["none"] * 23
    assert {layer.options.heads for layer in layers} == {8}
