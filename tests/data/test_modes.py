import dataclasses
import itertools

import numpy as np
import pytest

from hydrax.core.build import ConfigError, build
from hydrax.data.loader import DataConfig, open_data
from hydrax.data.modes import ModesConfig, modes, prompt_modes, token_modes

SCHEDULES = ("attn", "linear", "bernoulli", "mixed", "last", "chunks")


def rows_of(*rows):
    """A batch whose rows hold documents of these lengths; padding fills the shorter rows."""
    width = max(map(sum, rows))
    batch = {"segment_ids": np.zeros((len(rows), width), np.int32), "positions": np.zeros((len(rows), width), np.int32)}
    for i, lengths in enumerate(rows):
        batch["segment_ids"][i, : sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
        batch["positions"][i, : sum(lengths)] = np.concatenate([np.arange(n) for n in lengths])
    return batch


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return rows_of(*(rng.integers(1, 60, rng.integers(1, 30)) for _ in range(12)))


def documents(batch, chosen):
    """The modes of every document."""
    return [chosen[b][ids == s] for b, ids in enumerate(batch["segment_ids"]) for s in range(1, ids.max() + 1)]


def draw(cfg, batch, first=0, seed=0):
    return modes(cfg, batch, first + np.arange(len(batch["positions"])), seed=seed)


def chunks(document, size):
    """The mode of every chunk of a document, which all its tokens must share."""
    parts = np.split(document, range(size, len(document), size))
    assert all((part == part[0]).all() for part in parts)
    return np.array([part[0] for part in parts])


def test_no_schedule_gives_no_modes(batch):
    assert draw(ModesConfig(), batch) is None
    assert prompt_modes(ModesConfig(), np.array([3]), 4) is None
    assert token_modes(ModesConfig(), np.array([3])) is None


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_modes_are_zero_or_one_and_zero_on_padding(batch, schedule):
    chosen = draw(ModesConfig(schedule, chunk=4, last=5), batch)
    assert chosen.shape == batch["positions"].shape and chosen.dtype == np.int32
    assert set(np.unique(chosen)) <= {0, 1}
    assert not chosen[batch["segment_ids"] == 0].any()


def test_pure_schedules(batch):
    np.testing.assert_array_equal(draw(ModesConfig("attn"), batch), batch["segment_ids"] > 0)
    assert not draw(ModesConfig("linear"), batch).any()


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.7, 1.0])
def test_bernoulli_draws_every_chunk_of_every_document_alone(fraction):
    batch = rows_of(*[[23, 40, 5, 32]] * 400)
    drawn = [chunks(d, 8) for d in documents(batch, draw(ModesConfig("bernoulli", fraction, chunk=8), batch))]
    whole, deviation = np.concatenate(drawn), np.sqrt(fraction * (1 - fraction) / 400)
    assert abs(whole.mean() - fraction) <= 4 * deviation / np.sqrt(13)
    # Neighbours know nothing of each other, within a document and across the edge of two.
    same = fraction**2 + (1 - fraction) ** 2
    rows = np.stack([np.concatenate(drawn[i : i + 4]) for i in range(0, len(drawn), 4)])
    assert rows.shape == (400, 13)
    for left, right in itertools.pairwise(rows.T):
        assert abs((left == right).mean() - same) <= 4 * np.sqrt(same * (1 - same) / 400)


@pytest.fixture(scope="module")
def mixed():
    """Modes of the chunks of documents: [rows, documents of a row, chunks]."""
    batch = rows_of(*[[200, 200]] * 1500)
    drawn = [chunks(d, 4) for d in documents(batch, draw(ModesConfig("mixed", chunk=4), batch))]
    return np.stack(drawn).reshape(1500, 2, 50)


def test_mixed_draws_the_fraction_of_each_document(mixed):
    shares = mixed.mean(-1)
    pure = 1 / 3 + 1 / 3 / 51  # a uniform p gives 50 chunks of one mode with probability 1/51 each
    for share in (0, 1):
        assert abs((shares == share).mean() - pure) < 4 * np.sqrt(pure * (1 - pure) / shares.size)
    between = shares[(shares > 0) & (shares < 1)]
    counts = np.array([((low < between) & (between <= low + 0.2)).mean() for low in np.arange(5) / 5 + 0.01])
    assert np.abs(counts[:-1] - 10 / 49).max() < 4 * np.sqrt(0.2 * 0.8 / between.size)
    # The documents of a row draw apart: both by attention throughout by chance only.
    assert abs((shares == 1).all(1).mean() - pure**2) < 4 * np.sqrt(pure**2 / 1500)


def test_mixed_draws_chunks_apart_from_the_fraction(mixed):
    """The first chunk is by attention half of the time where the others say that p is about a half."""
    middle = mixed[..., 0][np.abs(mixed[..., 1:].mean(-1) - 0.5) < 0.2]
    assert abs(middle.mean() - 0.5) < 4 * 0.5 / np.sqrt(middle.size)


@pytest.mark.parametrize("last", [1, 7, 1000])
def test_last_tokens_of_every_document(batch, last):
    for document in documents(batch, draw(ModesConfig("last", last=last), batch)):
        assert document.tolist() == [int(len(document) - i <= last) for i in range(len(document))]


@pytest.mark.parametrize(("chunk", "every"), [(1, 1), (1, 3), (8, 2), (5, 4)])
def test_every_nth_chunk_of_every_document(batch, chunk, every):
    for document in documents(batch, draw(ModesConfig("chunks", chunk=chunk, every=every), batch)):
        assert document.tolist() == [int((i // chunk + 1) % every == 0) for i in range(len(document))]


@pytest.mark.parametrize("schedule", ["bernoulli", "mixed"])
def test_a_row_is_a_function_of_seed_and_number(schedule):
    batch, cfg = rows_of(*[[50, 50]] * 40), ModesConfig(schedule, chunk=2)
    chosen = draw(cfg, batch)
    np.testing.assert_array_equal(draw(cfg, batch), chosen)
    np.testing.assert_array_equal(draw(cfg, batch, first=3)[:-3], chosen[3:])
    order = np.array([7, 0, 7, 39])
    np.testing.assert_array_equal(modes(cfg, {k: v[order] for k, v in batch.items()}, order), chosen[order])
    assert (draw(cfg, batch, seed=1) != chosen).any(1).sum() > 20
    assert len({row.tobytes() for row in chosen}) > 25
    far = draw(cfg, batch, first=10**15)
    assert (far != chosen).any(1).sum() > 20


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_prompts_are_documents_of_one_row_each(schedule):
    cfg, lengths = ModesConfig(schedule, chunk=3, every=2, last=4), np.array([5, 17, 1])
    expected = modes(cfg, rows_of(*[[n] for n in lengths]), np.arange(3), seed=6)
    np.testing.assert_array_equal(prompt_modes(cfg, lengths, 17, seed=6), expected)
    wider = prompt_modes(ModesConfig("attn"), lengths, 20)
    assert wider.sum(1).tolist() == lengths.tolist() and wider.shape == (3, 20)


@pytest.mark.parametrize("schedule", ["attn", "linear", "chunks"])
def test_generated_tokens_go_on_as_the_prompt_would(schedule):
    cfg = ModesConfig(schedule, chunk=3, every=2)
    whole = prompt_modes(cfg, np.array([40, 40]), 40)
    for at in range(0, 40, 7):
        chosen = token_modes(cfg, np.array([at, 39 - at]))
        assert chosen.tolist() == [[whole[0, at]], [whole[0, 39 - at]]] and chosen.dtype == np.int32


@pytest.mark.parametrize("schedule", ["bernoulli", "mixed", "last"])
def test_generated_tokens_need_a_schedule_of_positions(schedule):
    with pytest.raises(ConfigError, match=rf"^schedule = '{schedule}': expected none, attn, linear or chunks"):
        token_modes(ModesConfig(schedule), np.array([0]))


def test_config_is_checked():
    for values in ({"schedule": "spans"}, {"fraction": 1.5}, {"chunk": 0}, {"last": 0}, {"every": 0}):
        with pytest.raises(ConfigError, match=r"^data\.modes\."):
            build(DataConfig, {"modes": values}, "data")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(40):
        (path / f"{i}.txt").write_bytes(rng.integers(32, 127, rng.integers(10, 200), np.uint8).tobytes())
    return open_data(DataConfig(path=str(path), seq_len=32, val_fraction=0.3))


@pytest.fixture(scope="module")
def data(plain):
    return dataclasses.replace(plain, modes=ModesConfig("bernoulli", chunk=2))


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def rows(batches):
    """The rows of the batches, one after another."""
    return [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(len(batch["tokens"]))]


def test_config_reaches_the_batches(plain, tmp_path):
    (tmp_path / "text.txt").write_text("a text of some tokens\n" * 50)
    values = {"path": str(tmp_path), "seq_len": 16, "modes": {"schedule": "attn"}}
    data = open_data(build(DataConfig, values, "data"))
    for batch in [*take(data.train_batches(2, seed=0), 2), *data.val_batches(2)]:
        np.testing.assert_array_equal(batch["modes"], batch["segment_ids"] > 0)
    for batch in [*take(plain.train_batches(2, seed=0), 2), *plain.val_batches(2)]:
        assert "modes" not in batch


def test_a_joined_row_is_one_document_to_a_schedule(tmp_path):
    (tmp_path / "text.txt").write_text("a text of some tokens\n" * 50)
    schedule = {"schedule": "chunks", "chunk": 4, "every": 2}
    data = open_data(
        build(DataConfig, {"path": str(tmp_path), "seq_len": 16, "documents": False, "modes": schedule}, "data")
    )
    for batch in take(data.train_batches(2, seed=0), 2):
        np.testing.assert_array_equal(batch["modes"], np.tile(np.arange(16) // 4 % 2, (2, 1)))


def test_modes_are_all_that_a_schedule_adds(plain, data):
    without = take(plain.train_batches(4, seed=2), 9) + list(plain.val_batches(4))
    added = take(data.train_batches(4, seed=2), 9) + list(data.val_batches(4))
    assert all(batch["modes"].shape == (4, 32) and batch["modes"].dtype == np.int32 for batch in added)
    assert_equal([{k: v for k, v in batch.items() if k != "modes"} for batch in added], without)


def test_resume_from_any_step_continues_the_modes(data):
    steps = 3 * len(data.train.rows) // 4  # batches of 4: three epochs
    whole = take(data.train_batches(4, seed=5), steps)
    for start in (1, steps // 3, steps - 2):
        assert_equal(take(data.train_batches(4, seed=5, start_step=start), steps - start), whole[start:])


def test_modes_depend_on_neither_threads_nor_batch_size(data):
    whole = rows(take(data.train_batches(4, seed=5), 15))
    other = dataclasses.replace(data, threads=1)
    assert_equal(rows(take(other.train_batches(5, seed=5), 12)), whole)
    assert_equal(rows(data.val_batches(3))[: len(data.val.rows)], rows(data.val_batches(1)))


def test_modes_are_drawn_anew_in_every_epoch_and_seed(data):
    def by_row(seed, epochs):
        drawn = {}
        for row in rows(take(data.train_batches(1, seed), epochs * len(data.train.rows))):
            drawn.setdefault(row["tokens"].tobytes(), []).append(row["modes"].tobytes())
        return drawn

    three = by_row(0, 3)
    assert all(len(set(drawn)) == 3 for drawn in three.values())
    assert not any(drawn[0] in three[row] for row, drawn in by_row(1, 1).items())


def test_validation_draws_the_same_every_time(data):
    assert_equal(list(data.val_batches(4)), list(data.val_batches(4)))
    assert len({row["modes"].tobytes() for row in rows(data.val_batches(1))}) > 1
