"""What an existing run folder means."""

import dataclasses
import json
import shlex
import sys

import pytest

from hydrax.core.build import ConfigError
from hydrax.train import folder
from tests.train import tiny


@pytest.fixture
def run(tmp_path):
    cfg = tiny.config(tmp_path / "text")
    folder.describe(tmp_path / "run", cfg)
    return tmp_path / "run", cfg


def changed(cfg, section, **values):
    return dataclasses.replace(cfg, **{section: dataclasses.replace(getattr(cfg, section), **values)})


def test_absent_and_empty_folders_are_fresh(tmp_path):
    cfg = tiny.config(tmp_path)
    assert folder.enter(tmp_path / "new", cfg) == "fresh"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json.tmp").write_text('{"mod', encoding="utf-8")  # killed at its first write
    assert folder.enter(tmp_path / "empty", cfg) == "fresh"


def test_the_same_config_resumes_until_there_is_a_summary(run):
    workdir, cfg = run
    assert folder.enter(workdir, cfg) == "resume"
    assert folder.enter(workdir, changed(cfg, "mesh", fsdp=1, replica=-1)) == "resume"
    (workdir / "summary.json").write_text("{}", encoding="utf-8")
    assert folder.enter(workdir, cfg) == "complete"


def test_another_config_is_refused_naming_the_keys(run):
    workdir, cfg = run
    other = changed(changed(cfg, "train", steps=99), "optim", lr=0.5)
    with pytest.raises(ConfigError, match=r"train\.steps: 4 -> 99; optim\.lr: 0\.001 -> 0\.5") as error:
        folder.enter(workdir, other)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_an_unreadable_config_is_one_line(run, content):
    workdir, cfg = run
    (workdir / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="workdir = "):
        folder.enter(workdir, cfg)


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        folder.enter(tmp_path, tiny.config(tmp_path))
    with pytest.raises(ConfigError, match="expected a folder"):
        folder.enter(tmp_path / "thesis.tex", tiny.config(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_descriptions_can_be_read_back(run):
    workdir, cfg = run
    assert folder.parse(folder.read_config(workdir), workdir) == cfg
    layers = json.loads((workdir / "layers.json").read_text(encoding="utf-8"))
    assert [layer["mixer"] for layer in layers] == ["attn", "attn"]
    environment = json.loads((workdir / "environment.json").read_text(encoding="utf-8"))
    assert environment["packages"]["jax"]
    assert sum(environment["devices"].values()) == 8
    assert environment["command"] == shlex.join(sys.orig_argv)
