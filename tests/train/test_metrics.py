"""Records survive the death of their writer; optional writers say what they need; speed and figure."""

import json
import math
import sys

import pytest

from hydrax.core.build import ConfigError
from hydrax.train import metrics
from hydrax.train.figure import draw_loss
from hydrax.train.progress import Clock, Progress, mfu


def record(step, **values):
    return {"step": step, **values, "timing": {"seconds": 0.5 * step}}


def test_cut_back_removes_what_lies_after_the_step_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(record(step, loss=1 / step)) for step in (1, 2, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"step": 5, "lo', encoding="utf-8")
    kept = metrics.cut_back(path, 2)
    assert [r["step"] for r in kept] == [1, 2, 2]
    assert path.read_text(encoding="utf-8") == "\n".join(lines[:3]) + "\n"


def test_a_torn_line_goes_even_if_nothing_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(record(1)).encode() + b"\n" + '{"step": 2, "é'.encode()[:-1])
    assert metrics.cut_back(path, 9) == [record(1)]
    writer = metrics.JsonlWriter(path)
    writer.write(2, {"loss": 0.1}, {"seconds": 1.0})
    writer.close()
    assert metrics.read(path) == [record(1), {"step": 2, "loss": 0.1, "timing": {"seconds": 1.0}}]


def test_no_records_yet(tmp_path):
    assert metrics.cut_back(tmp_path / "metrics.jsonl", 0) == []
    assert not list(tmp_path.iterdir())


def test_records_are_valid_json_and_reach_the_file_at_once(tmp_path):
    writer = metrics.JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.1}, {"seconds": 1.0})
    line = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    writer.close()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    assert json.loads(line)["lr"] == 0.1


@pytest.mark.parametrize(
    ("options", "package", "key"),
    [({"tensorboard": True}, "tensorboardX", "train.tensorboard"), ({"wandb": "project"}, "wandb", "train.wandb")],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, options, package, key):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{key} = .*hydrax\[") as error:
        metrics.open_writers(tmp_path, 0, **({"tensorboard": False, "wandb": None} | options), config={})
    assert "\n" not in str(error.value)


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboardX")
    for writer in metrics.open_writers(tmp_path, 0, tensorboard=True, wandb=None, config={}):
        writer.write(1, {"loss": 2.0}, {"seconds": 1.0})
        writer.close()
    assert list((tmp_path / "tb").glob("events*"))
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 1


def test_mfu():
    assert mfu(1e6, 989e6, "NVIDIA H100 80GB HBM3", 2) == pytest.approx(0.5)
    assert mfu(1e6, 1e9, "cpu", 1) is None
    with pytest.raises(ValueError, match="wrong"):
        mfu(1e6, 1e9, "TPU v5 lite", 1)


def test_pauses_are_not_training_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Clock(before=7.0)
    now[0] += 2
    with clock.pause():
        now[0] += 50
    now[0] += 1
    assert (clock.lap, clock.total) == (3.0, 60.0)
    clock.restart()
    assert clock.lap == 0


def test_one_plain_line_per_record_without_a_terminal(capsys):
    with Progress(10, 0) as progress:
        values = {"loss": 1.5, "bits_per_byte": 2.25, "tokens_per_second": 12345.0}
        progress.update(5, values, 0.1, 0.123)
    line = capsys.readouterr().out
    assert line == "step 5/10  loss 1.5000  2.2500 bits/byte  12,345 tokens/s  MFU 12.3%  0:00:50 left\n"


def test_figure(tmp_path):
    records = [record(s, bits_per_byte=8 / s) for s in (1, 2, 3)] + [record(3, bits_per_byte=None)]
    path = tmp_path / "figures" / "loss.png"
    draw_loss([*records, record(3, val_bits_per_byte=2.7)], {"unigram": 4.2}, path)
    with_baseline = path.read_bytes()
    assert with_baseline.startswith(b"\x89PNG")
    draw_loss([], {}, path)
    assert path.read_bytes() != with_baseline
