"""The command that evaluates runs: what it writes, what it prints, and that its parts agree with training."""

import json
import shutil

import numpy as np
import pytest

from hydrax.eval import evaluate
from tests.eval import small
from tests.launch.conftest import run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return small.write(folder, [f"{n} says: " + "so it goes, " * 24 for n in ("one", "two")])


@pytest.fixture(scope="module")
def evaluated(finished, text, tmp_path_factory):
    """Two runs evaluated by all suites that need no further package."""
    place = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(finished, place / "other")
    (place / "fda.jsonl").write_text(json.dumps({"text": "Its name is Ada. Name:", "value": "Ada", "key": "name"}))
    suites = "perplexity,recall_slices:4,extrapolation,task:passkey;length=128"
    suites += f",recall:fda_twice={place}/fda.jsonl"
    args = [
        f"--suite={suites}",
        f"--data={text}",
        "--factor=4",
        "--context=64",
        "--sequences=32",
        f"--out={place / 'out'}",
    ]
    outcome = run("evaluate", f"--workdir={finished},{place / 'other'}", *args)
    assert outcome.code == 0, outcome.err
    return place / "out", outcome


def test_it_writes_what_its_help_says(evaluated):
    out, outcome = evaluated
    assert {p.name for p in out.iterdir()} == {
        "evaluation.json",
        "extrapolation.png",
        "recall_slices.png",
        "accuracy.png",
    }
    report = json.loads((out / "evaluation.json").read_text())
    assert report["settings"]["factor"] == 4 and {"command", "environment"} < set(report)
    assert list(report["runs"]) == ["finished", "other"]
    assert report["runs"]["finished"] == report["runs"]["other"]
    found = report["runs"]["finished"]
    suites = ["perplexity", "recall_slices:4", "extrapolation", "task:passkey;length=128", "recall:fda_twice"]
    assert list(found) == suites
    assert found["task:passkey;length=128"]["rows"] == 32
    assert found["recall:fda_twice"]["truncated"] == 1.0 and found["recall:fda_twice"]["examples"] == 1
    assert found["extrapolation"]["positions"][-1] == 64
    slices = found["recall_slices:4"]
    assert slices["hits"]["targets"] > 0 and slices["hits"]["share"] + slices["others"]["share"] == pytest.approx(1)
    for row in ("perplexity", "bits_per_byte", "extrapolates", "hits, loss", "truncated", "finished", "other"):
        assert row in outcome.out
    assert "wrote" in outcome.out and outcome.err == ""


def test_text_is_that_of_validation_unless_given(finished, tmp_path):
    outcome = run("evaluate", f"--workdir={finished}", f"--out={tmp_path}")
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "evaluation.json").read_text())["runs"]["finished"]["perplexity"]
    summary = json.loads((finished / "summary.json").read_text())
    # Training evaluates 8 of the rows, cut across documents.
    np.testing.assert_allclose(found["bits_per_byte"], summary["val_bits_per_byte"], rtol=0.05)


@pytest.mark.parametrize(("flag", "value"), [("out", "file/out"), ("out", "."), ("workdir", "{run},{place}")])
def test_what_cannot_end_well_does_not_begin(flag, value, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "open_run", lambda *args: pytest.fail("a run was opened"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "evaluation.json").mkdir()
    flags = {"workdir": str(finished), "out": str(tmp_path / "new")}
    given = value.format(run=finished, place=tmp_path) if "{" in value else str(tmp_path / value)
    outcome = run("evaluate", *(f"--{name}={text}" for name, text in {**flags, flag: given}.items()))
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith(f"error: {flag} = '") and "expected" in outcome.err
    assert not (tmp_path / "new").exists()


def test_documents_that_are_too_short_are_named(finished, text, tmp_path):
    outcome = run("evaluate", f"--workdir={finished}", "--suite=extrapolation", f"--data={text}", f"--out={tmp_path}")
    assert outcome.code == 0, outcome.err
    outcome = run(
        "evaluate",
        f"--workdir={finished}",
        "--suite=extrapolation",
        f"--data={text}",
        "--factor=32",
        f"--out={tmp_path}",
    )
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert outcome.err.startswith("error: factor = 32: expected --data with a document of 1025 tokens (the longest has")


def test_the_order_of_ngrams_is_a_number(finished, tmp_path):
    outcome = run("evaluate", f"--workdir={finished}", "--suite=recall_slices:one", f"--out={tmp_path}")
    assert (outcome.code, outcome.err.splitlines()) == (
        2,
        ["error: suite = 'recall_slices:one': expected recall_slices:<n of the n-grams, from 2>"],
    )


@pytest.mark.parametrize(
    ("suite", "line"),
    [
        ("task", "error: suite = 'task': expected a run that was trained on a task, or task:<name>"),
        ("task:mqar", "error: task:mqar = 'mqar': expected a task in bytes, one of "),
        ("task:passkey;length=10", "error: task:passkey.length = 10: expected at least "),
    ],
)
def test_a_model_of_bytes_has_tasks_in_bytes(suite, line, finished, tmp_path):
    outcome = run("evaluate", f"--workdir={finished}", f"--suite={suite}", f"--out={tmp_path}")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert outcome.err.startswith(line)


def test_a_run_of_a_task_is_evaluated_on_it(config, tmp_path):
    task = [
        "--config.data.task=mqar",
        "--config.data.path=none",
        "--config.sample.tokens=0",
        "--config.data.seq_len=64",
    ]
    options = ["--config.data.task_options.vocabulary=64", "--config.data.task_options.pairs=4"]
    trained = run("train", f"--config={config}", f"--workdir={tmp_path / 'run'}", *task, *options)
    assert trained.code == 0, trained.err
    outcome = run("evaluate", f"--workdir={tmp_path / 'run'}", "--suite=task", "--examples=8", f"--out={tmp_path}")
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "evaluation.json").read_text())["runs"]["run"]["task"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["rows"] == 8 and found["accuracy"] == pytest.approx(summary["val_accuracy"])
    refused = run("evaluate", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path}")
    assert refused.err.startswith("error: workdir = 'run': expected a run of text; it was trained on mqar")
