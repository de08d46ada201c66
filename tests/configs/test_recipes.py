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


@pytest.mark.parametrize("name", known())
def test_configs_build_and_open_with_their_command(name: str) -> None:
    build(RunConfig, load_config(name).to_dict())
    text = load_module(name)[0].__doc__
    assert re.search(rf"python -m launch\.train --config=(configs/)?{name}\b", text)
    assert "Hardware: " in text or name == "lm"
    assert "Expected" in text or name == "lm"


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_parameters_they_claim(name: str) -> None:
    claimed = int(re.search(r"(\d+)M\s+parameters", load_module(name)[0].__doc__)[1])
    assert round(cost(load_config(name).model, seq_len=1).parameters / 1e6) == claimed


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
