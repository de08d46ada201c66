import dataclasses
import itertools

import numpy as np
import pytest

from hydrax.core.build import ConfigError, build
from hydrax.data.loader import DataConfig, open_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(40):
        (path / f"{i}.txt").write_bytes(rng.integers(32, 127, rng.integers(10, 200), np.uint8).tobytes())
    return path


@pytest.fixture(scope="module")
def data(folder):
    return open_data(DataConfig(path=str(folder), seq_len=16, val_fraction=0.2))


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def numbers(data, batches):
    """Which training row each row of the batches is."""
    index = {row["tokens"].tobytes(): i for i, row in enumerate(data.train.rows)}
    assert len(index) == len(data.train.rows)
    return [index[tokens.tobytes()] for batch in batches for tokens in batch["tokens"]]


def test_batches_have_the_promised_form(data):
    for batch in [*take(data.train_batches(3, seed=0), 2), *data.val_batches(3)]:
        assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
            "tokens": ((3, 16), "int32"),
            "targets": ((3, 16), "int32"),
            "segment_ids": ((3, 16), "int32"),
            "positions": ((3, 16), "int32"),
            "weights": ((3, 16), "float32"),
            "bytes": ((3,), "float32"),
        }


def test_resume_from_any_step_continues_the_stream(data):
    steps = 3 * len(data.train.rows) // 4  # batches of 4: three epochs
    whole = take(data.train_batches(4, seed=5), steps)
    for start in (1, 2, steps // 3, steps - 2):
        assert_equal(take(data.train_batches(4, seed=5, start_step=start), steps - start), whole[start:])


def test_a_batch_size_cuts_the_same_rows(data):
    rows = numbers(data, take(data.train_batches(1, seed=5), 60))
    assert (
        rows
        == numbers(data, take(data.train_batches(4, seed=5), 15))
        == numbers(data, take(data.train_batches(20, 5), 3))
    )


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_order_does_not_depend_on_threads(data, threads):
    other = dataclasses.replace(data, threads=threads)
    assert_equal(take(other.train_batches(4, seed=5), 50), take(data.train_batches(4, seed=5), 50))


def test_every_epoch_has_every_row_once_in_a_new_order(data):
    rows = len(data.train.rows)
    seen = numbers(data, take(data.train_batches(5, seed=1), 2 * rows))
    epochs = [seen[i : i + rows] for i in range(0, 10 * rows, rows)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10


def test_seeds_give_different_orders(data):
    orders = {tuple(numbers(data, take(data.train_batches(4, seed), 10))) for seed in range(4)}
    assert len(orders) == 4


def test_far_step_is_reached_at_once(data):
    far = take(data.train_batches(4, seed=0, start_step=10**12), 2)
    assert_equal(far[1:], take(data.train_batches(4, seed=0, start_step=10**12 + 1), 1))


def test_validation_covers_its_bytes_once_and_fills_the_last_batch(data):
    rows = len(data.val.rows)
    batch_size = next(b for b in (4, 5, 7) if rows % b)
    batches = list(data.val_batches(batch_size))
    assert len(batches) == -(-rows // batch_size)
    assert sum(b["bytes"].sum() for b in batches) == data.val.bytes
    assert sum(b["weights"].sum() for b in batches) == data.val.bytes + data.val.documents
    filling = batches[-1]["segment_ids"][rows % batch_size :]
    assert not filling.any()
    assert not batches[-1]["weights"][rows % batch_size :].any()


def test_validation_rows_are_fixed_and_spread_over_the_split(data):
    rows = data.val.rows
    first, second = list(data.val_batches(4, rows=6)), list(data.val_batches(2, rows=6))
    assert_equal(
        [{k: v[i] for k, v in b.items()} for b in first for i in range(4)][:6],
        [{k: v[i] for k, v in b.items()} for b in second for i in range(2)],
    )
    chosen = [i for i in range(len(rows)) if any((rows[i]["tokens"] == t).all() for b in first for t in b["tokens"])]
    assert len(chosen) == 6
    assert np.diff([*chosen, len(rows)]).max() <= len(rows) // 6 + 1
    assert_equal(list(data.val_batches(4, rows=10**6)), list(data.val_batches(4)))


def test_splits_are_disjoint_and_complete(data, folder):
    assert data.train.documents + data.val.documents == 40
    assert data.train.bytes + data.val.bytes == sum(f.stat().st_size for f in folder.iterdir())
    assert len({data.sha256, data.train.sha256, data.val.sha256}) == 3


def test_too_few_tokens_for_a_row(folder, data):
    tokens = data.train.rows.sources[0].stream_length
    cfg = DataConfig(path=str(folder), seq_len=tokens - 1, val_fraction=0.2)
    assert len(open_data(cfg).train.rows) == 1
    with pytest.raises(ConfigError) as caught:
        open_data(dataclasses.replace(cfg, seq_len=tokens))
    assert caught.value.key == "data.seq_len"
    assert caught.value.allowed == f"expected at most {tokens - 1}, the training split has only {tokens} tokens"


@pytest.mark.parametrize("prefix", [1, 5])
def test_prefix_stands_before_every_document(folder, data, prefix):
    cfg = DataConfig(path=str(folder), seq_len=16, val_fraction=0.2)
    longer = open_data(cfg, prefix)
    for batch in [*take(longer.train_batches(3, seed=0), 20), *longer.val_batches(3)]:
        assert batch["tokens"].shape == (3, 16)
        ahead = (batch["positions"] < prefix) | (batch["segment_ids"] == 0)
        np.testing.assert_array_equal(ahead, batch["tokens"] == longer.tokenizer.pad)
        assert not batch["weights"][ahead].any()
    batches = list(longer.val_batches(4))
    assert sum(b["bytes"].sum() for b in batches) == longer.val.bytes == data.val.bytes
    assert sum(b["weights"].sum() for b in batches) == data.val.bytes + data.val.documents
    with pytest.raises(ConfigError, match=r"^model\.prefix\.meta_tokens = 16: expected less than data\.seq_len = 16$"):
        open_data(cfg, 16)
    assert len(open_data(cfg, 15).train.rows)


@pytest.mark.parametrize(("fraction", "empty"), [(0.0, "validation"), (1.0, "training")])
def test_empty_split_says_which_fraction_would_do(folder, fraction, empty):
    with pytest.raises(ConfigError) as caught:
        open_data(DataConfig(path=str(folder), seq_len=16, val_fraction=fraction))
    assert caught.value.key == "data.val_fraction"
    assert empty in caught.value.allowed
    suggested = float(caught.value.allowed.split(",")[0].split()[-1])
    assert open_data(DataConfig(path=str(folder), seq_len=16, val_fraction=suggested)).train.documents in (1, 39)


def test_lone_text_holds_out_its_tail(tmp_path):
    lines = [f"line {i}" for i in range(200)]
    (tmp_path / "only.txt").write_text("\n".join(lines))
    data = open_data(DataConfig(path=str(tmp_path / "only.txt"), seq_len=16, val_fraction=0.25))
    batches = list(data.val_batches(1, None))
    tail = data.tokenizer.decode(np.concatenate([b["targets"][b["weights"] > 0] for b in batches]))
    held = tail.splitlines()
    assert held == lines[-len(held) :] and 45 <= len(held) <= 55
    assert data.train.documents == data.val.documents == 1
    assert data.train.bytes + data.val.bytes == len("\n".join(lines))


def test_lone_line_of_jsonl_cannot_be_split(tmp_path):
    (tmp_path / "only.jsonl").write_text('{"text": "a single document, a single document"}\n')
    with pytest.raises(ConfigError, match=r"data\.val_fraction = 0\.5: expected at least two documents"):
        open_data(DataConfig(path=str(tmp_path), seq_len=16, val_fraction=0.5))


def test_config_is_checked():
    for values in ({"seq_len": 0}, {"val_fraction": 1.5}, {"threads": 0}, {"paht": "x"}):
        with pytest.raises(ConfigError, match=r"^data\."):
            build(DataConfig, values, "data")


def test_joined_documents_are_one_to_the_model(folder, data):
    cfg = DataConfig(path=str(folder), seq_len=16, val_fraction=0.2, documents=False)
    joined = open_data(cfg)
    for batch, apart in zip(take(joined.train_batches(3, seed=0), 3), data.train_batches(3, seed=0), strict=False):
        assert set(apart) - set(batch) == {"segment_ids", "positions"}
        np.testing.assert_array_equal(batch["tokens"], apart["tokens"])
        assert batch["weights"].all()
    whole = take(joined.train_batches(4, seed=5), 9)
    assert_equal(take(joined.train_batches(4, seed=5, start_step=4), 5), whole[4:])
    validation = list(joined.val_batches(4))
    assert sum(batch["bytes"].sum() for batch in validation) == data.val.bytes
    np.testing.assert_array_equal(validation[-1]["segment_ids"], validation[-1]["weights"])
    with pytest.raises(
        ConfigError, match=r"^data\.documents = False: expected True with model\.prefix\.meta_tokens = 2$"
    ):
        open_data(cfg, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seq_len": 20}, "data.doc_align = 8: expected a divisor of data.seq_len = 20"),
        ({"documents": False}, "data.doc_align = 8: expected 1 with data.documents = False"),
        ({"landmark_every": 4}, "data.doc_align = 8: expected 1 with data.landmark_every = 4"),
        ({"task": "mqar"}, "data.doc_align = 8: expected 1 with data.task = mqar"),
    ],
)
def test_what_cannot_be_aligned_is_refused(values, message):
    with pytest.raises(ConfigError) as refused:
        build(DataConfig, {"seq_len": 16, "doc_align": 8, **values}, "data")
    assert str(refused.value) == message


def test_aligned_documents(folder):
    data = open_data(DataConfig(path=str(folder), seq_len=16, val_fraction=0.2, doc_align=8))
    rows = [np.where(b["segment_ids"], b["positions"], 1) for b in data.val_batches(2)]
    starts = [np.flatnonzero(row == 0) for row in np.concatenate(rows)]
    assert any(at.size > 1 for at in starts) and all(not (at % 8).any() for at in starts)
    with pytest.raises(ConfigError, match=r"data.doc_align = 8: expected 1 with model.prefix.meta_tokens = 2"):
        open_data(DataConfig(path=str(folder), seq_len=16, doc_align=8), prefix=2)
