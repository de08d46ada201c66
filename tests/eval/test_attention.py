"""What the benchmark of attention reports: right and wrong results, times, and what cannot run here."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest

from hydrax.core.build import ConfigError, build
from hydrax.eval import attention_report, contest, report
from hydrax.eval.attention import SUBJECTS, Op, Settings, Subject, bench
from hydrax.ops.softmax import attention as softmax_attention
from hydrax.ops.sparse.span_scores import Choice

PASSES = {"forward", "forward_backward"}


def settings(**options) -> Settings:
    values = {"subjects": ["documents"], "seq_lens": [32, 16], "widths": [8], "heads": 2, "check": 16}
    return build(Settings, {**values, "repeats": 1, "seconds": 0.01, "threads": 2, **options})


@pytest.fixture(autouse=True)
def cached(monkeypatch):
    monkeypatch.setattr(contest, "uncached", contextlib.nullcontext)


def test_right_results_are_timed_at_every_length():
    (rows,) = bench(settings())
    assert [(row.seq_len, row.verdict, row.error) for row in rows] == [(16, "right", None), (32, "right", None)]
    assert all(set(row.results) == PASSES and set(row.errors) == {"o", "dq", "dk", "dv"} for row in rows)
    assert all(r.seconds.median > 0 and r.memory.total > 0 for row in rows for r in row.results.values())


def test_wrong_results_are_named(monkeypatch):
    def op(q, k, v, *, impl):
        return softmax_attention(q, k, v, window=None if impl == "recurrent" else 3, impl=impl)

    monkeypatch.setitem(SUBJECTS, "documents", Subject(op))
    ((row,),) = bench(settings(seq_lens=[16]))
    assert row.verdict == "wrong: o, dk, dq, dv" and set(row.results) == PASSES


def test_what_fails_is_a_row_in_file_and_picture(tmp_path):
    options = settings(subjects=["cudnn", "sink_tokens"], seq_lens=[16], check=0)
    rows = [row for rows in bench(options) for row in rows]
    assert not rows[0].results and "runs on NVIDIA GPUs only" in rows[0].error
    assert (rows[1].verdict, rows[1].error) == ("not checked", None)
    written = report.Report(tmp_path / "x.json", "command", {}, settings(), attention_report.draw)
    written.add(rows)
    written.draw()
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == [dataclasses.asdict(row) for row in rows]
    assert (tmp_path / "x.png").exists()
    assert [line.split(":")[0] for line in map(attention_report.line, rows)] == [
        "cudnn, K = 8, 16 tokens",
        "sink_tokens, K = 8, 16 tokens",
    ]
    assert attention_report.table(rows).row_count == 3


def test_blocks_that_spans_choose_are_right(monkeypatch):
    small = Choice(4, 4, 2, first=1, local=1, count=4)
    subject = dataclasses.replace(SUBJECTS["infllm2"], arguments=lambda tokens, heads: {"choice": small})
    monkeypatch.setitem(SUBJECTS, "infllm2", subject)
    ((row,),) = bench(settings(subjects=["infllm2"], seq_lens=[48], check=48))
    assert (row.verdict, row.error) == ("right", None) and set(row.errors) == {"o", "dq", "dk", "dv"}
    op = Op(subject, 2, 8, None)
    x, facts = (op.inputs(1, 48)[name] for name in ("x", "facts"))
    o, whole = op(None, x, facts), softmax_attention(**x)
    same = np.isclose(np.asarray(o, np.float32), np.asarray(whole, np.float32), atol=0.03).all((0, 2, 3))
    assert same[:16].all() and not same[16:].all()  # the first queries have no more blocks than they read


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_subject_has_a_definition(name):
    op = Op(SUBJECTS[name], 4, 8, "recurrent")
    inputs = jax.eval_shape(lambda: op.inputs(1, 64))
    assert jax.eval_shape(op, None, inputs["x"], inputs["facts"]).shape == (1, 64, 4, 8)


def test_chosen_blocks_are_of_the_past_and_hold_the_own_one():
    idx = SUBJECTS["blocks"].arguments(1000, 2)["idx"]
    own = np.arange(1000)[:, None] // 64
    assert idx.shape == (1, 1000, 2, 16) and (idx <= own[..., None]).all() and (idx >= 0).all()
    assert (idx == own[..., None]).any(-1).all() and (idx == 0).any(-1).all()


def test_unknown_subjects_are_refused():
    with pytest.raises(ConfigError, match="subjects = 'mla': expected all, or some of cudnn, plain"):
        settings(subjects=["mla"])
