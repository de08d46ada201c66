"""Arms of one budget: the knob is turned to the closest value there is, with few evaluations, or the user hears why."""

import copy
import dataclasses
from typing import Any

import pytest

from hydrax.core.build import ConfigError, build, override
from hydrax.models import budget
from hydrax.models.budget import MEASURES, arms, default_knob, match
from hydrax.models.cost import Cost, cost
from hydrax.models.spec import ModelConfig

pytestmark = pytest.mark.thorough

MODEL = {
    "d_model": 48,
    "pattern": "every(3,gla,attn)",
    "num_layers": 8,
    "vocab_size": 100,
    "ffn_dim": 96,
    "mixers": {"gla": {"heads": 6}, "attn": {"heads": 6, "kv_heads": 3}, "swa": {"heads": 6, "window": 40}},
}
LENGTH = 64


def config(changes: dict[str, Any] | None = None) -> ModelConfig:
    """The model with other values of dotted keys."""
    values = copy.deepcopy(MODEL)
    for key, value in (changes or {}).items():
        override(values, key, value)
    return build(ModelConfig, values, "model")


def costs(changes: dict[str, Any] | None = None) -> Cost:
    return cost(config(changes), seq_len=LENGTH)


@pytest.mark.parametrize(
    ("what", "knob", "step"), [(w, "ffn_dim", 8) for w in MEASURES if w != "cache"] + [("cache", "d_model", 24)]
)
def test_no_other_value_is_closer(what: str, knob: str, step: int):
    arm, target = match(config({"pattern": "8*gla"}), costs(), what, knob, tolerance=1.0), MEASURES[what](costs())
    measure = lambda n: MEASURES[what](costs({"pattern": "8*gla", knob: n}))  # noqa: E731
    assert (arm.knob, getattr(arm.config, knob), arm.value % step) == (knob, arm.value, 0)
    assert arm.cost == cost(arm.config, seq_len=LENGTH)
    assert arm.difference == measure(arm.value) / target - 1
    assert all(abs(measure(arm.value + by) - target) > abs(measure(arm.value) - target) for by in (-step, step))


@pytest.mark.parametrize(
    ("knob", "value", "start"),
    [
        ("ffn_dim", 96, {"ffn_dim": 8}),
        ("ffn_dim", 96, {"ffn_dim": 4096}),
        ("ffn_dim", 96, {"ffn_dim": None}),
        ("model.d_model", 48, {"d_model": 480}),
        ("num_layers", 8, {"num_layers": 3}),
        ("mixers.attn.kv_heads", 3, {"mixers.attn.kv_heads": None}),
    ],
)
def test_a_model_is_made_itself_again(knob: str, value: int, start: dict):
    arm = match(config(start), costs(), "parameters", knob)
    assert (arm.knob, arm.value, arm.difference) == (knob.removeprefix("model."), value, 0.0)
    assert arm.config == config()


@pytest.mark.parametrize(
    ("changes", "knob", "value"),
    [
        # The model keeps 6 x 768 bytes in states, and 2 x 64 x 104 in keys and values.
        # half as many layers with twice the heads; what divides no six heads is passed over
        ({"pattern": "every(7,gla,attn)"}, "mixers.attn.kv_heads", 6),
        # 200 bytes per token with all heads; a window beyond the row changes nothing, so the search turns round
        ({"pattern": "every(3,gla,swa)", "mixers.swa.window": 1000}, "mixers.swa.window", 33),
        # 8 x 4608 bytes, divided by the heads: the measure falls
        ({"pattern": "8*gla", "mixers.gla.heads": 12}, "mixers.gla.heads", 2),
        # 8 x 2 x 4 x 24 bytes per key channel
        (
            {"pattern": "8*local", "blocks.local": {"mixer": "gla", "options": {"heads": 2}}},
            "blocks.local.options.key_dim",
            12,
        ),
    ],
)
def test_caches_are_matched_by_what_is_kept(changes: dict, knob: str, value: int):
    arm = match(config(changes), costs(), "cache", knob, tolerance=0.2)
    assert (arm.knob, arm.value) == (knob, value)


@pytest.mark.parametrize(
    ("pattern", "what", "knob"),
    [
        ("8*gla", "parameters", "ffn_dim"),
        ("8*gla", "flops", "ffn_dim"),
        ("8*gla", "cache", "mixers.gla.key_dim"),
        ("2*(3*gla,attn)", "cache", "mixers.attn.key_dim"),
        ("2*(3*gla,swa)", "cache", "mixers.swa.window"),
        ("8*parallel(attn,swa)", "cache", "mixers.attn.key_dim"),
        ("6*gla,gsa,gsa", "cache", "mixers.gsa.slots"),
        ("7*gla,hgrn", "cache", "mixers.gla.key_dim"),
        ("7*mlp,hgrn", "cache", "mixers.hgrn.value_dim"),
    ],
)
def test_default_knobs(pattern: str, what: str, knob: str):
    assert default_knob(config({"pattern": pattern}), what, 4096) == knob


@pytest.mark.parametrize(
    ("what", "knob", "start", "most"),
    [
        ("parameters", "ffn_dim", 8, 4),
        ("parameters", "ffn_dim", 8000, 4),
        ("parameters", "d_model", 480, 8),
        ("parameters", "d_model", 24, 4),
        ("cache", "mixers.swa.window", 30_000, 24),  # flat above 64 tokens: a line alone creeps down from there
    ],
)
def test_few_evaluations(what: str, knob: str, start: int, most: int, monkeypatch: pytest.MonkeyPatch):
    model = {"pattern": "8*swa", "mixers.swa.window": 63} if what == "cache" else {}
    target, real, calls = costs(model), budget.cost, []
    monkeypatch.setattr(budget, "cost", lambda *args, **kinds: calls.append(args) or real(*args, **kinds))
    assert match(config({**model, knob: start}), target, what, knob).difference == 0.0
    assert len(calls) <= most, len(calls)


def test_arms():
    models = [config(), config({"pattern": "8*gla"}), config({"pattern": "every(1,gla,attn)"})]
    first, *others = arms(models, seq_len=LENGTH, batch=2)
    assert (first.cost, first.difference) == (cost(models[0], seq_len=LENGTH, batch=2), 0.0)
    assert [arm.config for arm in (first, *others)] == models
    assert [arm.difference for arm in others] == [a.cost.parameters / first.cost.parameters - 1 for a in others]
    assert all(arm.knob is None for arm in others)
    assert others[0].difference > 0.02 or others[0].difference < -0.02
    again, *matched = arms(models, "flops", seq_len=LENGTH, batch=2)
    assert again == first
    assert {arm.knob for arm in matched} == {"ffn_dim"}
    for arm, given in zip(matched, models[1:], strict=True):
        assert dataclasses.replace(arm.config, ffn_dim=96) == given
        assert arm.difference == arm.cost.flops_per_token / first.cost.flops_per_token - 1
        assert abs(arm.difference) < 0.02


@pytest.mark.parametrize(
    ("changes", "what", "knob", "line"),
    [
        ({}, "memory", None, r"match = 'memory': expected one of parameters, active, flops, cache"),
        ({}, "flops", "ffn_dmi", r"model\.ffn_dmi = 1: unknown key; did you mean 'ffn_dim'\?"),
        ({}, "flops", "pattern", r"model\.pattern = 1: expected text"),
        ({}, "flops", "tie", r"model\.tie = 1: expected true or false"),
        ({}, "flops", "pattern.x", r"model\.pattern\.x = 1: model\.pattern is a single value and has no keys"),
        ({}, "flops", "mixers.attn.kv_head", r"model\.mixers\.attn\.kv_head = 1: unknown key"),
        ({}, "flops", "mixers.swa.window", r"model\.mixers\.swa\.window = 40: it changes nothing here"),
        ({}, "cache", "ffn_dim", r"model\.ffn_dim = 96: it changes nothing here; expected another knob"),
        (
            {"pattern": "loop(4,every(3,gla,attn))"},
            "flops",
            None,
            r"model\.ffn_dim = 8: the closest value, \+\d+\.\d% flops; expected one within 2%, or another knob",
        ),
        ({"pattern": "8*gla"}, "parameters", "mixers.gla.heads", r"model\.mixers\.gla\.heads = \d+: the closest value"),
    ],
)
def test_what_cannot_be_matched_is_refused(changes: dict, what: str, knob: str | None, line: str):
    with pytest.raises(ConfigError, match=f"^{line}"):
        match(config(changes), costs(), what, knob)


@pytest.mark.parametrize(
    ("models", "options", "line"),
    [
        (2, {"what": "memory"}, "match = 'memory': expected one of none, parameters, "),
        (1, {"what": "flops"}, "match = 'flops': expected another model"),
        (2, {"knob": "d_model"}, "knob = 'd_model': needs match = one of parameters, "),
    ],
)
def test_flags_that_would_do_nothing_are_refused(models: int, options: dict, line: str):
    with pytest.raises(ConfigError, match=f"^{line}"):
        arms([config()] * models, seq_len=LENGTH, **options)
