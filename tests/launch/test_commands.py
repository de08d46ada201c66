"""The commands do what their help says."""

import json
import re

import pytest

from hydrax import mixers
from hydrax.infer.policy import POLICIES
from launch.help import comments
from tests.launch.conftest import MAINS, command_line, run


def test_training_fills_the_run_folder(finished):
    assert {p.name for p in finished.iterdir()} >= {
        "config.json",
        "layers.json",
        "environment.json",
        "program.json",
        "lock",
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
    assert reported.code == 0 and all(layer["mixer"] in reported.out for layer in layers), reported.err


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


def rows_of(out: str) -> list[list[str]]:
    """The cells of a table."""
    lines = (re.split("[│┃]", line)[1:-1] for line in out.splitlines() if line.startswith(("│", "┃")))
    return [[cell.strip() for cell in line] for line in lines]


def test_cost_compares_arms(config, tmp_path):
    changed = "attn; model.ffn_dim=64"
    args = [f"--config={config}", "--config.model.logit_softcap=5", "--seq_len=100", "--batch=2", "--compare=2*attn"]
    outcome = run("cost", *args, f"--compare={changed}", f"--compare={config}", f"--json={tmp_path / 'x.json'}")
    assert (outcome.code, outcome.err) == (0, "")
    head, *rows = rows_of(outcome.out)
    assert head == ["arm", "parameters", "active", "FLOPs/token", "state", "KV", "parameters vs first"]
    assert [row[0] for row in rows] == ["gla", "2*attn", changed, config]
    assert rows[3][1:] == rows[0][1:]
    saved = json.loads((tmp_path / "x.json").read_text())
    assert (saved["match"], [arm["name"] for arm in saved["arms"]]) == ("none", [row[0] for row in rows])
    assert [arm["model"]["pattern"] for arm in saved["arms"]] == ["gla", "2*attn", "attn", "gla"]
    assert [arm["model"]["ffn_dim"] for arm in saved["arms"]] == [None, None, 64, None]
    assert [arm["model"]["logit_softcap"] for arm in saved["arms"]] == [5, 5, 5, None]
    for row, arm in zip(rows, saved["arms"], strict=True):
        keys = ("parameters", "active_parameters", "flops_per_token", "state_bytes", "kv_bytes")
        for cell, key in zip(row[1:], keys, strict=False):
            number, *unit = cell.removesuffix("B").split()
            scale = {"": 1, "k": 1e3, "M": 1e6}["".join(unit)]
            assert float(number) * scale == pytest.approx(arm["cost"][key], rel=1e-3), (row, key)
        assert row[-1] == f"{arm['cost']['parameters'] / saved['arms'][0]['cost']['parameters'] - 1:+.2%}"


def test_cost_matches_arms(config, tmp_path):
    args = [f"--config={config}", "--config.model.ffn_dim=256", "--compare=attn", "--match=flops", "--seq_len=64"]
    outcome = run("cost", *args, f"--json={tmp_path / 'x.json'}")
    assert (outcome.code, outcome.err) == (0, "")
    head, first, arm = rows_of(outcome.out)
    assert head[-2:] == ["knob", "flops vs first"]
    saved = json.loads((tmp_path / "x.json").read_text())["arms"]
    assert first[-2:] == ["", "+0.00%"]
    assert arm[-2:] == [f"ffn_dim = {saved[1]['value']}", f"{saved[1]['difference']:+.2%}"]
    assert saved[1]["model"]["ffn_dim"] == saved[1]["value"] != 256
    assert abs(saved[1]["difference"]) <= 0.02
    # the model in the file is one to train
    again = run(
        "cost", f"--config={config}", "--config.model.pattern=attn", f"--config.model.ffn_dim={saved[1]['value']}"
    )
    assert f"{saved[1]['cost']['parameters']:,}" in again.out


def test_cost_tells_what_is_common_active_and_looped(config):
    options = ["--config.model.pattern=loop(3,c,gla),c", "--config.model.ffn=moe"]
    blocks = "--config.model.blocks={'c': {'mixer': 'attn', 'shared': True, 'ffn': 'mlp'}}"
    outcome = run("cost", f"--config={config}", *options, blocks)
    assert (outcome.code, outcome.err) == (0, "")
    rows = {(row[0], row[1]): row[2:] for row in rows_of(outcome.out)}
    assert list(rows)[1:4] == [("1 x 3", "c"), ("1 x 3", "gla"), ("1", "c")]
    parameters = {label: int(cells[0].replace(",", "")) for (_, label), cells in rows.items() if cells[0][:1].isdigit()}
    assert parameters["c"] == 0
    summed = parameters["gla"] + parameters["weights in common"] + parameters["embedding, logits"] + 16
    assert summed == parameters["forward"] > parameters["active"]


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
    if command == "train":
        assert re.search(r"--workdir +required", outcome.out)
        assert re.search(r"--processes +None", outcome.out)
        assert re.search(r"spacing +0 +padding behind every letter, with the answer at the last of it", outcome.out)
    if command == "sample":
        assert re.search(r"--policy +None", outcome.out)
        assert all(f"  {name}: {policy.ABOUT}\n" in outcome.out for name, policy in POLICIES.items())


def test_comments_are_read_with_those_of_base_classes():
    found = comments(mixers.get("swa").Config)
    assert found["window"] == "visible keys, the query's own included"
    assert found["kv_heads"] == "a divisor of heads; heads if None"
