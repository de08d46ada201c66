"""`launch.prepare`, and training from what it made."""

import itertools
import json

from hydrax.data.loader import open_data
from launch import cli
from tests.launch.conftest import command_line, run


def test_a_prepared_folder_continues_the_run_of_its_text(config, finished, tmp_path):
    """The documents, so the data, are the same."""
    text = cli.run_config(config, {}).data
    outcome = run("prepare", f"--source={text.path}", f"--out={tmp_path / 'out'}", "--processes=1")
    assert (outcome.code, outcome.err) == (0, "")
    assert "12 documents" in outcome.out and "encoding" in outcome.out
    prepared = cli.run_config(config, {"data.path": cli.Raw(str(tmp_path / "out"))}).data
    batches = [itertools.islice(open_data(cfg).train_batches(8, seed=0), 5) for cfg in (text, prepared)]
    assert all((a["tokens"] == b["tokens"]).all() for a, b in zip(*batches, strict=True))
    assert open_data(prepared).sha256 == json.loads((finished / "summary.json").read_text())["data_sha256"]


def test_bad_records_are_announced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\nbroken\n')
    outcome = run("prepare", f"--source={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'out'}", "--processes=1")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"1 bad records left out, listed in {tmp_path / 'out'}/bad_records.jsonl" in outcome.out


def test_training_mixes_prepared_sources(config, tmp_path):
    text = cli.run_config(config, {}).data.path
    assert run("prepare", f"--source={text}", f"--out={tmp_path / 'out'}", "--processes=1").code == 0
    extra = [
        "--config.data.path=none",
        f"--config.data.sources.a={{'path': '{tmp_path / 'out'}', 'weight': 2}}",
        f"--config.data.sources.b.path={text}",
        "--config.sample.tokens=0",
    ]
    outcome = run("train", *command_line("train", config, tmp_path / "run", extra))
    assert outcome.code == 0, outcome.err
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["data"]["sources"]["a"] == {"path": str(tmp_path / "out"), "weight": 2}
    again = run("train", *command_line("train", config, tmp_path / "run", extra))
    assert "already complete" in again.out, again.err
