"""Commands that run a model under a policy."""

import json

import pytest

from tests.launch.conftest import command_line, run


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "run"
    options = ["--config.model.pattern=gla,attn", "--config.model.mixers={'gla': {'heads': 2}, 'attn': {'heads': 2}}"]
    outcome = run("train", *command_line("train", config, folder, [*options, "--config.sample.tokens=0"]))
    assert outcome.code == 0, outcome.err
    return folder


def test_a_policy_that_keeps_all_samples_the_same_text(trained):
    args = [f"--workdir={trained}", "--prompt=a hybrid", "--tokens=5", "--temperature=0"]
    plain, under = run("sample", *args), run("sample", *args, "--policy=streaming:window=64,sink_tokens=2")
    assert under.code == 0, under.err
    assert under.out == plain.out


def test_what_a_policy_misses_is_a_suite(trained, tmp_path):
    suites = "policy:streaming;window=4;sink_tokens=1,policy:streaming;window=64"
    outcome = run("evaluate", f"--workdir={trained}", f"--suite={suites}", "--sequences=7", f"--out={tmp_path}")
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "evaluation.json").read_text())["runs"]["run"]
    few, everything = (found[name] for name in suites.split(","))
    assert 0.2 < few["recall"][0] < 1 and 0.2 < few["density"][0] < 0.8 and few["error"][0] > 1e-3
    assert everything["recall"] == pytest.approx([1.0]) and everything["density"] == pytest.approx([1.0])
    assert everything["loss"] == pytest.approx(everything["full_loss"])
    assert few["full_loss"] == pytest.approx(everything["full_loss"])
    for row in ("recall", "error", "density", "full_loss"):
        assert row in outcome.out


@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        ("sample", ["--policy=hip"], "error: policy = 'gla': expected a model with attn layers"),
        ("evaluate", ["--suite=policy:h2o"], "error: policy = 'h2o': expected one of accumulated, dhsa"),
        ("evaluate", ["--suite=policy:hip"], "error: policy = 'gla': expected a model with attn layers"),
    ],
)
def test_what_a_policy_cannot_serve_is_refused(finished, tmp_path, command, args, message):
    out = [f"--out={tmp_path}"] if command == "evaluate" else []
    outcome = run(command, f"--workdir={finished}", *args, *out)
    assert outcome.code == 2
    assert outcome.err.splitlines()[0].startswith(message)
