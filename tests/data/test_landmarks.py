"""Landmarks in packed rows: where they stand, that no target is lost or given twice, and what goes with them."""

import numpy as np
import pytest

from hydrax.core.build import ConfigError, build
from hydrax.data.landmarks import Landmarks, tokens_per_row, with_landmarks
from hydrax.data.loader import DataConfig, open_data
from hydrax.train.config import RunConfig
from hydrax.train.source import open_source

LANDMARK, PAD = 99, 98


def packed(*lengths: int, width: int) -> dict[str, np.ndarray]:
    """A row of documents: token = 10 · document + position, target = token + 1; the last of each has no target."""
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    last = np.cumsum(lengths) - 1
    weights = np.ones(len(ids), np.float32)
    weights[last] = 0
    row = {"tokens": 10 * ids + positions, "targets": 10 * ids + positions + 1, "segment_ids": ids}
    row = {name: x.astype(np.int32) for name, x in {**row, "positions": positions}.items()} | {"weights": weights}
    fill = {"tokens": PAD, "targets": PAD}
    return {k: np.pad(x, (0, width - len(x)), constant_values=fill.get(k, 0))[None] for k, x in row.items()}


def test_a_landmark_stands_behind_every_three_tokens() -> None:
    row = with_landmarks(packed(7, 2, 3, width=13), 3, landmark=LANDMARK, pad=PAD, length=17)
    L, _ = LANDMARK, PAD
    want = {
        "tokens": [10, 11, 12, L, 13, 14, 15, L, 16, 20, 21, 30, 31, 32, L, _, _],
        "targets": [11, 12, 13, _, 14, 15, 16, _, 17, 21, 22, 31, 32, 33, _, _, _],
        "segment_ids": [1] * 9 + [2] * 2 + [3] * 4 + [0] * 2,
        "positions": [*range(9), 0, 1, *range(4), 0, 0],
        "weights": [1, 1, 1, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0],
    }
    for name, values in want.items():
        np.testing.assert_array_equal(row[name][0], values, err_msg=name)
        assert row[name].dtype == packed(3, width=3)[name].dtype


@pytest.mark.parametrize("every", [1, 3, 7])
def test_starts_of_documents_are_laid_as_rows_are(every: int) -> None:
    """But for the landmark behind the last token, which comes with the next one."""
    laid, n = Landmarks(every, LANDMARK), 12
    row = packed(n, width=n)
    whole = with_landmarks(row, every, landmark=LANDMARK, pad=PAD, length=n + n // every)["tokens"]
    assert np.array_equal(laid.lay(row["tokens"]), whole[:, :-1] if n % every == 0 else whole)
    np.testing.assert_array_equal(laid.due(np.arange(whole.size)), whole[0] == LANDMARK)


@pytest.mark.parametrize("every", [1, 3, 7, 50])
@pytest.mark.parametrize("length", [8, 16, 31])
def test_a_row_holds_all_its_tokens(length: int, every: int) -> None:
    """One document that fills the row is the worst case: nothing but a landmark behind the last token is cut off."""
    n = tokens_per_row(length, every)
    row = with_landmarks(packed(n, width=n), every, landmark=LANDMARK, pad=PAD, length=length)
    assert row["tokens"].shape == (1, length) and row["weights"].sum() == n - 1
    assert np.sum(row["tokens"] != LANDMARK) == n and not np.any(row["segment_ids"] == 0)
    np.testing.assert_array_equal(row["positions"][0], np.arange(length))
    np.testing.assert_array_equal(row["tokens"][0] == LANDMARK, np.arange(length) % (every + 1) == every)


def test_data_with_landmarks_is_the_data_without(tmp_path) -> None:
    """Tokens and counted targets in their order, and the vocabulary has one id more."""
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " * (i + 3))
    options = {"path": str(tmp_path), "val_fraction": 0.3, "threads": 1}
    plain = open_data(build(DataConfig, {**options, "seq_len": tokens_per_row(24, 4)}))
    marked = open_data(build(DataConfig, {**options, "seq_len": 24, "landmark_every": 4}))
    assert marked.vocabulary == plain.vocabulary + 1
    for a, b in zip(plain.val_batches(2), marked.val_batches(2), strict=True):
        for name in ("tokens", "targets"):
            counted = [x[name][x["weights"] > 0] for x in (a, b)]
            np.testing.assert_array_equal(*counted)
        assert np.all((b["tokens"] == plain.vocabulary) == ((b["positions"] % 5 == 4) & (b["segment_ids"] != 0)))
        np.testing.assert_array_equal(a["bytes"], b["bytes"])


def test_tasks_with_landmarks_are_the_tasks_without() -> None:
    """mqar of 12 tokens in rows of 15: tokens and what is asked in their order."""
    tasks = [
        {
            "task": "mqar",
            "task_options": {"vocabulary": 16, "pairs": [2]},
            "threads": 1,
            "seq_len": n,
            "landmark_every": e,
        }
        for n, e in ((12, 0), (15, 3))
    ]
    plain, marked = (open_source(build(RunConfig, {"data": data, "model": {"pattern": "attn"}})) for data in tasks)
    assert marked.vocabulary == plain.vocabulary + 1 == 17
    for make in (lambda data: next(data.train_batches(4, 0)), lambda data: next(data.val_batches(4, 4))):
        a, b = make(plain), make(marked)
        place = np.arange(12) + np.arange(12) // 3
        np.testing.assert_array_equal(b["tokens"][:, place], a["tokens"])
        assert b["tokens"].shape == (4, 15) and np.sum(b["tokens"] == 16) == 4 * 3
        np.testing.assert_array_equal(b["asked"], place[a["asked"]])
        for name in ("targets", "weights"):
            np.testing.assert_array_equal(b[name], a[name])


def test_rows_of_tasks_do_not_end_with_landmarks() -> None:
    with pytest.raises(ConfigError, match=r"data.seq_len = 16: expected 15, the length of the rows of mqar"):
        open_source(
            build(
                RunConfig,
                {"data": {"task": "mqar", "task_options": {"pairs": [2]}, "seq_len": 16, "landmark_every": 3}},
            )
        )


def test_landmarks_have_no_prefix() -> None:
    with pytest.raises(ConfigError, match=r"data.landmark_every = 4: expected 0 with model.prefix.meta_tokens = 2"):
        open_data(build(DataConfig, {"landmark_every": 4}), prefix=2)


@pytest.mark.parametrize(("every", "given"), [(0, {}), (3, {"landmark_every": 3})])
def test_landmark_layers_and_data_agree(every: int, given: dict[str, int]) -> None:
    model = {"d_model": 16, "pattern": "attn,landmark", "mixers": {"landmark": {"section": 4}}}
    with pytest.raises(
        ConfigError, match=rf"data.landmark_every = {every}: expected 4, the section of landmark layers"
    ):
        open_source(build(RunConfig, {"model": model, "data": given}))
