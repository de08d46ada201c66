"""The lock pins every dependency that pyproject.toml names, within its range, and nothing local."""

import pathlib
import re
import tomllib

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line.strip()]
LOCKED_EXTRAS = ("data", "dev", "eval", "hf", "notebooks", "slurm", "tensorboard")
WANTED = PROJECT["dependencies"] + [r for extra in LOCKED_EXTRAS for r in PROJECT["optional-dependencies"][extra]]


def canonical(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


@pytest.mark.parametrize("wanted", [Requirement(r) for r in WANTED], ids=str)
def test_dependencies_are_pinned_within_their_range(wanted):
    pins = [r for r in map(Requirement, LINES) if canonical(r.name) == canonical(wanted.name)]
    assert pins, "not locked; run `make lock`"
    for pin in pins:
        version = str(pin.specifier).removeprefix("==")
        assert wanted.specifier.contains(version), f"{pin} is outside of {wanted}; run `make lock`"


def test_every_line_is_an_exact_pin():
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+( ;.*)?", line) for line in LINES), "no paths, no index, no ranges"


def test_required_dependencies_stay_few():
    assert len(PROJECT["dependencies"]) <= 12
