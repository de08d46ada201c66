"""Probes reach a language model as its own text would, and every validation reports them."""

import dataclasses
import json

import numpy as np
import pytest

from hydrax.core.build import ConfigError
from hydrax.data.tokenizer import ByteTokenizer
from hydrax.tasks import text
from hydrax.tasks.base import IGNORE
from hydrax.train import metrics
from hydrax.train.loop import train
from hydrax.train.probes import make_probe, open_probes
from tests.train import tiny

PASSKEY = {"passkey": {"length": 128}}


def test_rows_are_documents_of_bytes():
    probe, tokenizer = make_probe("passkey", {}, 256, "p"), ByteTokenizer()
    before, rows = (t.sample(np.random.default_rng(0), 4, "eval") for t in (probe.task, probe))
    assert rows["inputs"].shape == (4, 256) and rows["inputs"].max() < probe.vocabulary == tokenizer.vocab_size
    assert (rows["inputs"][:, 0] == tokenizer.bos).all()
    for old, new, targets in zip(before["inputs"], rows["inputs"], rows["targets"], strict=True):
        assert tokenizer.decode(new) == text.decode(old)
        answer = tokenizer.decode(targets[targets != IGNORE])
        assert answer.isdigit() and len(answer) == 5 and answer in tokenizer.decode(new)


def test_every_validation_reports_them(tmp_path):
    cfg = tiny.config(tiny.text(tmp_path / "text"), probes=PASSKEY, steps=2, eval_every=1)
    plain = tiny.config(tmp_path / "text", steps=2, eval_every=1)
    summary = train(cfg, tmp_path / "run")
    without = train(plain, tmp_path / "plain")
    records = [r for r in metrics.read(tmp_path / "run" / "metrics.jsonl") if "val_loss" in r]
    assert len(records) == 2
    for record in records:
        assert 0 <= record["probe_accuracy/passkey"] <= 1
        assert any(key.startswith("probe_accuracy/passkey/length=128,depth=") for key in record)
    assert summary["probes"]["passkey"] == records[-1]["probe_accuracy/passkey"]
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "probes" not in without
    for name in ("val_loss", "val_bits_per_byte"):
        assert summary[name] == without[name], "a probe changes nothing else"


@pytest.mark.parametrize(
    ("probes", "message"),
    [
        ({"passkee": {}}, r"train\.probes\.passkee = 'passkee': expected a task in bytes, one of .*passkey"),
        ({"mqar": {}}, r"train\.probes\.mqar = 'mqar': expected a task in bytes"),
        ({"passkey": 3}, r"train\.probes\.passkey = 3: expected the options of a task"),
        ({"passkey": {"lenght": 3}}, r"train\.probes\.passkey\.lenght = 3: unknown key"),
        ({"passkey": {}}, r"train\.probes\.passkey\.length = 16: expected at least \d+"),
    ],
)
def test_bad_probes_are_refused(probes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        open_probes(tiny.config(tmp_path, probes=probes))


def test_probes_need_text_in_bytes(tmp_path):
    cfg = tiny.config(tmp_path, probes=PASSKEY)
    other = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer="tokenizer.json"))
    with pytest.raises(ConfigError, match=r"train\.probes = .*: expected none but for text in bytes"):
        open_probes(other)
