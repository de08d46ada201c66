"""The commands do what their help says."""

import json
import re

import pytest

from hydrax import mixers
from launch.help import comments
from tests.launch.conftest import MAINS, command_line, run


def test_training_fills_the_run_folder(finished):
    assert {p.name for p in finished.iterdir()} >= {
        "config.json",
        "layers.json",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "sample.txt",
        "summary.json",
    }
    summary = json.loads((finished / "summary.json").read_text())
    assert 0 < summary["val_bits_per_byte"] < 9
    assert summary["parameters"] > 0


def test_overrides_reach_the_run(config, tmp_path):
    extra = ["--config.train.steps=1", "--config.model.mixers.gla.heads", "1", "--config.sample.tokens=0"]
    outcome = run("train", *command_line("train", config, tmp_path / "run", extra))
    assert outcome.code == 0, outcome.err
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["train"]["steps"] == 1
    assert saved["model"]["mixers"]["gla"] == {"heads": 1}
    assert not (tmp_path / "run" / "sample.txt").exists()
    # A finished run is known again although the options of its mixers came as text.
    again = run("train", *command_line("train", config, tmp_path / "run", extra))
    assert (again.code, again.err) == (0, "")
    assert "already complete" in again.out


@pytest.mark.slow  # ten layers of six kinds take minutes to compile
def test_any_mixture_trains_samples_and_reports_cost(config, tmp_path):
    options = {name: mixers.row(name).tiny for name in mixers.names()}
    hybrid = [
        "--config.model.pattern=2*(2*mamba2,swa),gla,attn,gdn,lightning",
        f"--config.model.mixers={options}",
        "--config.model.ffn_dim=32",
        "--config.optim.name=muon",
    ]
    trained = run("train", *command_line("train", config, tmp_path / "run", hybrid))
    assert trained.code == 0, trained.err
    layers = json.loads((tmp_path / "run" / "layers.json").read_text())
    assert [layer["mixer"] for layer in layers] == ["mamba2", "mamba2", "swa"] * 2 + ["gla", "attn", "gdn", "lightning"]
    sampled = run("sample", f"--workdir={tmp_path / 'run'}", "--prompt=a hybrid", "--tokens=5")
    assert sampled.code == 0 and sampled.out.startswith("a hybrid"), sampled.err
    reported = run("cost", *command_line("cost", config, tmp_path, hybrid))
    assert reported.code == 0 and all(name in reported.out for name in mixers.names()), reported.err


def test_sampling_is_repeatable_and_continues_the_prompt(finished):
    args = [f"--workdir={finished}", "--prompt=a hybrid", "--tokens=5"]
    first, second, other = run("sample", *args), run("sample", *args), run("sample", *args, "--seed=1")
    assert first.code == 0, first.err
    assert first.out == second.out != other.out
    assert first.out.startswith("a hybrid")


def test_an_empty_prompt_starts_a_document(finished):
    assert run("sample", f"--workdir={finished}", "--tokens=3").code == 0


def test_cost_prints_sums_that_agree(config):
    outcome = run("cost", f"--config={config}", "--config.model.pattern=2*(gla,attn)", "--seq_len=100", "--batch=2")
    assert outcome.code == 0, outcome.err
    rows = [re.split("[│┃]", line)[1:-1] for line in outcome.out.splitlines() if line.startswith("│")]
    parameters = {kind.strip(): int(count.strip().replace(",", "") or 0) for _, kind, count, *_ in rows}
    assert (
        parameters["gla"] + parameters["attn"] + parameters["embedding, logits"] + 16 == parameters["forward"]
    )  # final norm


def test_bench_prints_and_saves_what_it_measured(tmp_path):
    small = ["--mixers=lightning", "--d_model=16", "--seq_lens=16,32", "--forward_only", "--repeats=1"]
    outcome = run("bench", *small, f"--out={tmp_path / 'x.json'}")
    assert (outcome.code, outcome.err) == (0, "")
    assert re.search(r"│ lightning +│ +32 +│ forward +│", outcome.out)
    saved = json.loads((tmp_path / "x.json").read_text())
    assert saved["command"] == f"python -m launch.bench {' '.join(small)}"
    assert [row["seq_len"] for row in saved["rows"]] == [16, 32]
    assert (tmp_path / "x.png").exists()


@pytest.mark.slow  # every sample is a process of its own
def test_compile_times_are_compared_and_saved(config, tmp_path):
    given = [f"--config={config}", "--patterns=gla; 4*gla", "--repeats=2"]
    outcome = run("compile_time", *given, f"--out={tmp_path / 'x.json'}", "--config.data.seq_len=8")
    assert (outcome.code, outcome.err) == (0, "")
    saved = json.loads((tmp_path / "x.json").read_text())
    assert saved["command"].endswith("--patterns=gla; 4*gla' --repeats=2 --config.data.seq_len=8")
    first, second = saved["rows"]
    assert (first["layers"], second["layers"]) == (1, 4)
    assert first["ratio"] == 1 and second["ratio"] == second["best"] / first["best"]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) == row["best"] > 0 for row in saved["rows"])


@pytest.mark.parametrize("command", MAINS)
def test_help(command):
    outcome = run(command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"python -m launch.{command} --" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 120
    if command in ("train", "cost"):
        assert re.search(r"model\.d_model +256 +width D of the residual stream; an integer >= 1", outcome.out)
        assert re.search(r"optim\.name +adamw +.*one of adamw, muon", outcome.out)
        for name in mixers.names():
            assert f"  {name}: {mixers.row(name).about}" in outcome.out


def test_comments_are_read_with_those_of_base_classes():
    found = comments(mixers.get("swa").Config)
    assert found["window"] == "visible keys, the query's own included"
    assert found["kv_heads"] == "a divisor of heads; heads if None"
