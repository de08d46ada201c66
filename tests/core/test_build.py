"""From mappings to dataclasses: what is converted, what is refused, and what the refusal says."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import pytest

from hydrax.core.build import (
    ConfigError,
    Fraction,
    Positive,
    Raw,
    build,
    differences,
    override,
    plain,
)


@dataclasses.dataclass(frozen=True)
class Inner:
    size: Positive = 2
    name: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if self.size == 13:
            raise ConfigError("size", self.size, "expected a lucky number")


@dataclasses.dataclass(frozen=True)
class Outer:
    required: int
    inner: Inner = Inner()
    share: Fraction = 0.5
    maybe: Positive | None = None
    flag: bool = False
    text: str = ""
    pair: tuple[int, int] = (1, 2)
    many: tuple[float, ...] = ()
    free: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def make(**values: Any) -> Outer:
    return build(Outer, {"required": 1, **values})


def test_a_default_lives_in_the_dataclass():
    assert make() == Outer(required=1)
    assert make(inner={"size": 3}).inner == Inner(size=3)


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("required", "7", 7),
        ("share", "1", 1.0),
        ("share", "2.5e-1", 0.25),
        ("maybe", "none", None),
        ("maybe", "3", 3),
        ("flag", "True", True),
        ("flag", "0", False),
        ("text", "12", "12"),
        ("pair", "(3, 4)", (3, 4)),
        ("many", "[1, 2.5]", (1.0, 2.5)),
        ("free", "{'a': 1}", {"a": 1}),
    ],
)
def test_text_becomes_the_declared_type(field, text, value):
    result = getattr(make(**{field: Raw(text)}), field)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"requird": 1}, r"^requird = 1: unknown key; did you mean 'required'\? allowed: required, inner, "),
        ({"inner": {"sise": 1}}, r"^inner\.sise = 1: unknown key; did you mean 'size'\? allowed: size, name$"),
        ({"inner": 3}, r"^inner = 3: expected a mapping with the keys size, name$"),
        ({"inner": {"size": 0}}, r"^inner\.size = 0: expected an integer >= 1$"),
        ({"inner": {"size": 13}}, r"^inner\.size = 13: expected a lucky number$"),
        ({"inner": {"name": "c"}}, r"^inner\.name = 'c': expected one of a, b$"),
        ({"inner": {"name": Raw("c")}}, r"^inner\.name = 'c': expected one of a, b$"),
        ({"required": "1"}, r"^required = '1': expected an integer$"),
        ({"required": 1.0}, r"^required = 1\.0: expected an integer$"),
        ({"required": True}, r"^required = True: expected an integer$"),
        ({"required": None}, r"^required = None: expected an integer$"),
        ({"required": Raw("1.5")}, r"^required = '1\.5': expected an integer$"),
        ({"share": 1.5}, r"^share = 1\.5: expected a number from 0 to 1$"),
        ({"share": float("nan")}, r"^share = nan: expected a finite number$"),
        ({"many": (1, float("-inf"))}, r"^many\[1\] = -inf: expected a finite number$"),
        ({"required": -(2**31)}, r"^required = -2147483648: expected an integer of at most 1073741824$"),
        ({"maybe": 0}, r"^maybe = 0: expected an integer >= 1$"),
        ({"flag": Raw("maybe")}, r"^flag = 'maybe': expected true or false$"),
        ({"flag": 1}, r"^flag = 1: expected true or false$"),
        ({"text": 3}, r"^text = 3: expected text$"),
        ({"pair": (1, 2, 3)}, r"^pair = \(1, 2, 3\): expected 2 values$"),
        ({"pair": (1, "x")}, r"^pair\[1\] = 'x': expected an integer$"),
        ({"free": 3}, r"^free = 3: expected a mapping$"),
    ],
)
def test_everything_wrong_names_key_value_and_what_is_allowed(values, message):
    with pytest.raises(ConfigError, match=message):
        make(**values)


def test_a_missing_value_is_named():
    with pytest.raises(ConfigError, match="required"):
        build(Outer, {})


def test_the_path_leads_to_the_key():
    with pytest.raises(ConfigError, match=r"^run\.inner\.size = 13: expected a lucky number$"):
        build(Outer, {"required": 1, "inner": {"size": 13}}, "run")


def test_a_message_is_one_line():
    assert "\n" not in str(ConfigError("key", "a\nb", "two\nlines"))


def test_override_makes_parents_and_refuses_to_descend_into_values():
    values: dict[str, Any] = {"a": {"b": 1}}
    override(values, "a.c.d", 2)
    assert values == {"a": {"b": 1, "c": {"d": 2}}}
    with pytest.raises(ConfigError, match=r"^a\.b\.c = 3: a\.b is a single value and has no keys$"):
        override(values, "a.b.c", 3)


def test_differences_name_every_leaf():
    old, new = {"a": {"x": 1, "y": (1, 2)}, "b": 3}, {"a": {"x": 2, "y": [1, 2]}, "c": 4}
    assert differences(old, new) == ["a.x: 1 -> 2", "b: 3 -> '(absent)'", "c: '(absent)' -> 4"]
    assert plain({"a": (1, {"b": 2})}) == {"a": [1, {"b": 2}]}
