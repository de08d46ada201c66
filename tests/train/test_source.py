"""Runs that learn a task instead of text."""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from hydrax.core.build import ConfigError, build
from hydrax.data.tokenizer import ByteTokenizer
from hydrax.tasks.base import BLOCK, block
from hydrax.train import loop, metrics, validation
from hydrax.train.checkpoint import load_run
from hydrax.train.config import RunConfig
from hydrax.train.source import _targets, open_source, vocabulary_of
from tests.train import tiny

OPTIONS = {"pairs": (2, 4), "vocabulary": 32}
DATA = {"task": "mqar", "seq_len": 16, "threads": 1, "task_options": OPTIONS}
TRAIN = {"steps": 4, "batch_size": 8, "eval_rows": 20, "log_every": 1, "save_every": 2, "eval_every": 2}


def config(**data):
    return build(RunConfig, {"model": tiny.MODEL, "data": DATA | data, "train": TRAIN, "optim": {"warmup": 2}})


@pytest.fixture(scope="module")
def data():
    return open_source(config())


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(some, others):
    for a, b in zip(some, others, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_batches_are_the_rows_of_the_blocks(data):
    size = 300
    batches = take(data.train_batches(size, 7), 8)  # into the third block
    blocks = [block(data.task, "mqar", seed=7, split="train", number=n) for n in range(3)]
    rows = np.concatenate([b["inputs"] for b in blocks])
    np.testing.assert_array_equal(np.concatenate([b["tokens"] for b in batches]), rows[: 8 * size])
    targets = np.concatenate([b["targets"] for b in blocks])[: 8 * size]
    asked, told, weights = (np.concatenate([b[k] for b in batches]) for k in ("asked", "targets", "weights"))
    assert asked.shape == (8 * size, 4)
    rebuilt = np.full_like(targets, -1)
    row, column = np.nonzero(weights)
    rebuilt[row, asked[row, column]] = told[row, column]
    np.testing.assert_array_equal(rebuilt, targets)


@pytest.mark.parametrize("size", [16, 300, 2000])
def test_batches_do_not_depend_on_where_one_begins_or_how_many_processes_make_them(data, size):
    whole = take(data.train_batches(size, 3), 5)
    assert_equal(take(data.train_batches(size, 3, 2), 3), whole[2:])
    halves = [take(data.train_batches(size, 3, 0, part), 5) for part in (slice(0, size // 2), slice(size // 2, size))]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves, strict=True)]
    assert_equal(joined, whole)
    val = list(data.val_batches(8, 20))
    parts = [list(data.val_batches(8, 20, part)) for part in (slice(0, 4), slice(4, 8))]
    assert_equal([{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)], val)


def test_seeds_and_splits_differ_and_rows_do_not_repeat():
    data = open_source(config(task_options={"vocabulary": 8192}))  # of few tokens, rows repeat by chance
    tokens = [take(data.train_batches(BLOCK, seed), 2) for seed in (0, 1)]
    rows = np.concatenate([b["tokens"] for batches in tokens for b in batches])
    val = np.concatenate([b["tokens"] for b in data.val_batches(8, 64)])
    assert len(np.unique(np.concatenate([rows, val]), axis=0)) == len(rows) + len(val)


def test_validation_asks_for_the_rows_that_count_alone(data):
    batches = list(data.val_batches(8, 20))
    assert [int((b["weights"].sum(1) > 0).sum()) for b in batches] == [8, 8, 4]
    assert all((b["slices"].sum(1) == 1).all() and b["slices"].shape == (8, 2) for b in batches)


def test_a_wrong_number_of_answers_is_an_error():
    targets = np.array([[0, -1, 3, -1]])
    assert _targets(targets, 3)["weights"].tolist() == [[1, 1, 0]]
    assert "asked" not in _targets(targets, None)
    with pytest.raises(ValueError, match="2 answers, its task said at most 1"):
        _targets(targets, 1)


def test_the_digest_tells_options_and_seeds_apart():
    digests = [open_source(cfg).sha256 for cfg in (config(), config(), config(task_options={"vocabulary": 32}))]
    assert digests[0] == digests[1] != digests[2]
    other = config()
    assert open_source(dataclasses.replace(other, train=dataclasses.replace(other.train, seed=1))).sha256 != digests[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"task": "mqra"}, r"data\.task = 'mqra': expected one of arithmetic"),
        ({"task_options": {"pair": 3}}, r"data\.task_options\.pair = 3: unknown key; did you mean 'pairs'"),
        ({"task_options": {"length": 64}}, r"data\.task_options\.length = 64: expected none; data\.seq_len"),
        ({"seq_len": 8}, r"data\.seq_len = 8: expected at least 16"),
        ({"path": "text"}, r"path = 'text': expected none with data\.task = mqar"),
        ({"task": None}, r"task_options = .*: expected none without data\.task"),
    ],
)
def test_what_does_not_fit_is_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        open_source(config(**data))


def test_vocabularies_are_known_without_data():
    assert vocabulary_of(config().data) == 32
    assert vocabulary_of(build(RunConfig, {}).data) == ByteTokenizer().vocab_size


def test_measures_of_counts():
    sums = {
        "nll": 6.0, "tokens": 4.0, "rows": 3.0, "right": 1.5, "sequences": 1.0,
        "slice_rows": np.array([2.0, 1.0, 0.0]), "slice_right": np.array([0.5, 1.0, 0.0]),
        "class_tokens": np.array([0.0, 3.0, 1.0]), "class_right": np.array([0.0, 0.0, 1.0]),
    }  # fmt: skip
    found = validation.measures(sums, ("a", "b", "c"))
    assert np.isnan(found.pop("val_accuracy/c"))
    assert found == {
        "val_loss": 1.5, "val_accuracy": 0.5, "val_sequence_accuracy": 1 / 3, "val_micro_accuracy": 0.25,
        "val_macro_accuracy": 0.5, "val_accuracy/a": 0.25, "val_accuracy/b": 1.0,
    }  # fmt: skip
    assert validation.summary({"step": 1, **found})["val_slices"] == {"a": 0.25, "b": 1.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return config(), workdir, loop.train(config(), workdir)


def test_a_run_writes_accuracies_and_no_bits_per_byte(run):
    _, workdir, summary = run
    records = metrics.read(workdir / "metrics.jsonl")
    assert not any("bits_per_byte" in name for record in records for name in record)
    last = [r for r in records if "val_loss" in r][-1]
    assert summary == json.loads((workdir / "summary.json").read_text())
    assert summary["val_slices"].keys() == {"pairs=2", "pairs=4"}
    for name in ("val_accuracy", "val_sequence_accuracy", "val_macro_accuracy"):
        assert 0 <= summary[name] == last[name] <= 1
    assert (workdir / "figures" / "loss.png").exists()


def test_a_resumed_run_ends_bit_equal(run, tmp_path, capsys):
    cfg, workdir, _ = run
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "4")
    loop.train(cfg, copy)
    assert f"continuing {copy} after step 2" in capsys.readouterr().out

    def records(folder):
        return [{k: x for k, x in r.items() if k != "timing"} for r in metrics.read(folder / "metrics.jsonl")]

    assert records(copy) == records(workdir)
    ended, expected = (nnx.to_pure_dict(nnx.state(load_run(w)[0])) for w in (copy, workdir))
    jax.tree.map(np.testing.assert_array_equal, ended, expected)
