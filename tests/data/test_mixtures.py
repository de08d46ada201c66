import dataclasses
import itertools

import numpy as np
import pytest

from configs import common
from hydrax.core.build import ConfigError, Raw, build
from hydrax.core.config import _override
from hydrax.data.loader import DataConfig, open_data
from hydrax.data.pack import Rows
from hydrax.data.prepare import prepare

WEIGHTS = {"digits": 3.0, "letters": 5.0, "signs": 2.0}
ALPHABETS = {"digits": b"0123456789", "letters": b"abcdefgh", "signs": b"+-*/=<>!"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sources of different sizes and alphabets; the second is a prepared folder."""
    place, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    for name, documents in {"letters": 30, "digits": 90, "signs": 12}.items():
        (place / name).mkdir()
        alphabet = np.frombuffer(ALPHABETS[name], np.uint8)
        for i in range(documents):
            (place / name / f"{i}.txt").write_bytes(rng.choice(alphabet, rng.integers(50, 300)).tobytes())
    prepare(str(place / "digits"), str(place / "digits_tokens"))
    return place


def config(folder, weights=WEIGHTS, **options):
    places = {name: folder / ("digits_tokens" if name == "digits" else name) for name in weights}
    sources = {name: {"path": str(place), "weight": weights[name]} for name, place in places.items()}
    return build(DataConfig, {"sources": sources, "seq_len": 16, "val_fraction": 0.3, **options})


@pytest.fixture(scope="module")
def data(folder):
    return open_data(config(folder))


def take(batches, count):
    return list(itertools.islice(batches, count))


def origin(tokens):
    """The source of each row of [B,T]."""
    alphabets = [np.isin(tokens, np.frombuffer(a, np.uint8)).any(-1) for a in ALPHABETS.values()]
    assert (np.sum(alphabets, 0) == 1).all(), "a row of several sources, or of none"
    return np.argmax(alphabets, 0)


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_tokens_keep_the_weights_within_one_percent(data):
    shares = np.array(list(WEIGHTS.values())) / 10
    batches = take(data.train_batches(40, seed=3), 100)
    rows = np.concatenate([origin(batch["tokens"]) for batch in batches])
    np.testing.assert_allclose(np.bincount(rows) / len(rows), shares, rtol=0.01)
    tokens = sum(batch["weights"].sum() for batch in batches)
    in_source = [sum(b["weights"][origin(b["tokens"]) == k].sum() for b in batches) for k in range(3)]
    np.testing.assert_allclose(np.array(in_source) / tokens, shares, rtol=0.01)
    # and not only on the whole
    early = np.concatenate([origin(batch["tokens"]) for batch in batches[50:60]])
    np.testing.assert_allclose(np.bincount(early) / len(early), shares, rtol=0.01)


class Numbers(Rows):
    """Rows that hold their numbers only."""

    def batch(self, rows):
        return {"tokens": rows}


@pytest.mark.parametrize("weights", [(1, 1.009, 1.009), (0.05, 0.65, 0.3), (1, 9, 10)])
def test_any_weights_are_kept_within_one_percent(data, weights):
    numbers = dataclasses.replace(data.train, rows=Numbers(data.train.rows.sources))
    data = dataclasses.replace(data, weights=weights, train=numbers, threads=1)
    rows = np.concatenate([batch["tokens"] for batch in take(data.train_batches(4000, seed=0), 1)])
    counts = np.histogram(rows, numbers.rows.first)[0]
    np.testing.assert_allclose(counts / len(rows), np.array(weights) / sum(weights), rtol=0.01)


def test_resume_from_any_step_continues_the_mixture(data):
    whole = take(data.train_batches(8, seed=5), 60)
    for start in (1, 7, 31, 59):
        assert_equal(take(data.train_batches(8, seed=5, start_step=start), 60 - start), whole[start:])
    far = take(data.train_batches(8, seed=5, start_step=10**12), 2)
    assert_equal(far[1:], take(data.train_batches(8, seed=5, start_step=10**12 + 1), 1))


def test_the_order_of_the_names_does_not_matter(folder, data):
    backwards = open_data(config(folder, dict(reversed(WEIGHTS.items()))))
    assert backwards.sha256 == data.sha256
    assert_equal(take(backwards.train_batches(8, seed=0), 3), take(data.train_batches(8, seed=0), 3))


def test_every_source_gives_all_its_rows_before_one_again(data):
    rows = np.concatenate([b["tokens"] for b in take(data.train_batches(50, seed=1), 60)])
    for k, source in enumerate(data.train.rows.sources):
        seen = [tokens.tobytes() for tokens in rows[origin(rows) == k]]
        assert len(seen) > 2 * len(source) or k == 0
        for epoch in itertools.batched(seen, len(source)) if hasattr(itertools, "batched") else [seen[: len(source)]]:
            assert len(set(epoch)) == len(epoch)


def test_four_processes_make_the_rows_of_one(data):
    whole = take(data.train_batches(8, seed=2), 20)
    parts = [take(data.train_batches(8, seed=2, part=slice(2 * p, 2 * p + 2)), 20) for p in range(4)]
    for batch, *of_processes in zip(whole, *parts, strict=True):
        for key, rows in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[key] for part in of_processes]), rows, err_msg=key)
    validation = list(data.val_batches(8, 20))
    parts = [list(data.val_batches(8, 20, slice(2 * p, 2 * p + 2))) for p in range(4)]
    for batch, *of_processes in zip(validation, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate([part["tokens"] for part in of_processes]), batch["tokens"])


def test_validation_keeps_the_weights_where_there_are_rows(data):
    rows = np.concatenate([batch["tokens"] for batch in data.val_batches(1, 20)])
    np.testing.assert_array_equal(np.bincount(origin(rows)), [6, 10, 4])
    assert len({tokens.tobytes() for tokens in rows}) == 20
    whole = list(data.val_batches(1))
    assert len(whole) == len(data.val.rows)
    assert sum(batch["bytes"].sum() for batch in whole) == data.val.bytes
    assert len(list(data.val_batches(1, 10**6))) == len(whole)


def test_one_source_is_the_same_as_a_path(folder):
    alone = open_data(config(folder, {"letters": 7.0}))
    path = open_data(DataConfig(path=str(folder / "letters"), seq_len=16, val_fraction=0.3))
    assert alone.sha256 == path.sha256
    assert_equal(take(alone.train_batches(4, seed=0), 10), take(path.train_batches(4, seed=0), 10))
    assert_equal(list(alone.val_batches(4, 9)), list(path.val_batches(4, 9)))


def test_contents_of_every_source_make_the_identity(folder, data):
    before = data.sha256
    (folder / "signs" / "new.txt").write_text("+-*/" * 20)
    try:
        assert open_data(config(folder)).sha256 != before
    finally:
        (folder / "signs" / "new.txt").unlink()
    assert open_data(config(folder)).sha256 == before


def test_sources_are_set_from_the_command_line():
    cfg = common.base()
    _override(cfg, "data.sources.web.path", Raw("/data/web"))
    _override(cfg, "data.sources.web.weight", Raw("3"))
    _override(cfg, "data.sources.code", Raw("{'path': '/data/code'}"))
    built = build(DataConfig, cfg.to_dict()["data"], "data")
    assert built.sources == {"web": {"path": "/data/web", "weight": 3}, "code": {"path": "/data/code"}}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"web": {"weight": 0}}, r"data\.sources\.web\.weight = 0\.0: expected a number > 0"),
        ({"web": {"wieght": 1}}, r"data\.sources\.web\.wieght = 1: unknown key; did you mean 'weight'\?"),
        ({"web": "/data/web"}, r"data\.sources\.web = '/data/web': expected a mapping"),
        ({"web": {"path": "/no/such/place"}}, r"data\.sources\.web\.path = '/no/such/place': no such file or folder"),
        ({"web": {"path": "{letters}"}, "tiny": {"path": "{tiny}"}}, r"data\.seq_len = 16: .*\(data\.sources\.tiny\)"),
        ({"web": {"path": "{one}"}}, r"data\.val_fraction = 0\.3: .*\(data\.sources\.web\)"),
    ],
)
def test_bad_sources_are_one_line(folder, tmp_path, sources, message):
    (tmp_path / "tiny").mkdir()
    for i in range(9):
        (tmp_path / "tiny" / f"{i}.txt").write_text("")
    (tmp_path / "tiny" / "a.jsonl").write_text('{"text": "a"}\n' * 4)
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n')
    places = {"{letters}": folder / "letters", "{tiny}": tmp_path / "tiny", "{one}": tmp_path / "one.jsonl"}
    values = {
        name: {k: str(places.get(v, v)) if k == "path" else v for k, v in source.items()}
        if isinstance(source, dict)
        else source
        for name, source in sources.items()
    }
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        open_data(build(DataConfig, {"sources": values, "seq_len": 16, "val_fraction": 0.3}, "data"))
    assert "\n" not in str(caught.value)


def test_either_a_path_or_sources(folder):
    with pytest.raises(ConfigError, match=r"^path = 'x': expected None with data\.sources"):
        DataConfig(path="x", sources={"web": {}})
