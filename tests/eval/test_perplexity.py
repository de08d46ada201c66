"""Scores do not depend on batches and buckets; text is scored once; hits are those of a loop over n-grams."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core.build import ConfigError
from hydrax.data.loader import DataConfig
from hydrax.data.tokenizer import ByteTokenizer
from hydrax.eval import perplexity as p, scoring
from hydrax.eval.scoring import Score, Scorer, bucket
from hydrax.eval.texts import open_texts
from tests.eval import small

TOKENIZER = ByteTokenizer()
LENGTHS = (2, 16, 17, 18, 33, 3, 40)


@pytest.fixture(scope="module")
def model():
    return small.model()


@pytest.fixture(scope="module")
def sequences():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, n).astype(np.int32) for n in LENGTHS]


@pytest.fixture(scope="module")
def direct(model, sequences):
    """The definition: of each sequence alone, without padding."""
    forward = jax.jit(lambda row: jax.nn.log_softmax(model(row[None])[0]))
    longest = max(LENGTHS)
    logs = [np.asarray(forward(jnp.asarray(np.resize(s, longest))))[: len(s) - 1] for s in sequences]
    return [
        Score(-log[np.arange(len(log)), s[1:]], log.argmax(1) == s[1:]) for log, s in zip(logs, sequences, strict=True)
    ]


@pytest.mark.parametrize("tokens_at_once", [16, 128])
def test_scores_are_those_of_each_sequence_alone(model, sequences, direct, tokens_at_once):
    done = []
    found = Scorer(model, tokens_at_once).texts(sequences, done.append)
    for score, expected in zip(found, direct, strict=True):
        np.testing.assert_allclose(score.nll, expected.nll, atol=1e-4)
        np.testing.assert_array_equal(score.right, expected.right)
    assert sum(done) == len(sequences)


def test_the_buckets_do_not_matter(model, sequences, direct, monkeypatch):
    monkeypatch.setattr(scoring, "SHORTEST", 64)
    for score, expected in zip(Scorer(model, 256).texts(sequences), direct, strict=True):
        np.testing.assert_allclose(score.nll, expected.nll, atol=1e-4)


def test_a_prefix_of_meta_tokens_is_read_first(sequences):
    model = small.model(pattern="gla", prefix={"meta_tokens": 3})
    tokens = sequences[2]
    logs = np.asarray(jax.jit(lambda row: jax.nn.log_softmax(model(row[None])[0]))(tokens[:-1]))
    (score,) = Scorer(model).texts([tokens])
    np.testing.assert_allclose(score.nll, -logs[np.arange(16), tokens[1:]], atol=1e-4)


def test_widths_are_powers_of_two():
    assert [bucket(n) for n in (1, 16, 17, 32, 33)] == [16, 16, 32, 32, 64]


def test_every_token_is_a_target_once(tmp_path):
    texts = ["abc" * 20, "x", "some other text, " * 5]
    found = open_texts(DataConfig(), TOKENIZER, path=str(small.write(tmp_path, texts)))
    pieces = found.cut(16, 1000)
    assert {len(s) for s in pieces[:-1]} <= set(range(2, 18))
    targets = b"".join(bytes(s[1:][s[1:] < 256].astype(np.uint8)) for s in pieces)
    assert targets.decode() == "".join(texts)
    assert sum(len(s) - 1 for s in pieces) == sum(len(text) + 1 for text in texts)
    assert [s[0] for s in pieces].count(TOKENIZER.bos) == 3
    few = found.cut(16, 4)
    assert len(few) == 4 and len({bytes(s) for s in few}) == 4
    assert all(any(np.array_equal(s, whole) for whole in pieces) for s in few)
    assert {len(s) for s in found.cut(16, 1000, shortest=40)} == {17, 62 % 16, 87 % 16}


def test_splits_share_no_document_and_leave_none_out(tmp_path):
    texts = [f"document {i}" for i in range(20)]
    cfg = DataConfig(path=str(small.write(tmp_path, texts)), val_fraction=0.4)
    splits = [
        {bytes(d[1:-1].astype(np.uint8)).decode() for d in open_texts(cfg, TOKENIZER, s)} for s in ("train", "val")
    ]
    assert splits[0] | splits[1] == set(texts) and not splits[0] & splits[1] and min(map(len, splits)) > 3


def test_a_place_without_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^data = '.*none': no such file or folder"):
        open_texts(DataConfig(), TOKENIZER, path=str(tmp_path / "none"))


def test_perplexity_is_the_mean_over_targets(sequences, direct):
    found = p.perplexity(sequences, direct, TOKENIZER)
    nll = np.concatenate([s.nll for s in direct])
    assert found["tokens"] == found["bytes"] == len(nll) == sum(LENGTHS) - len(LENGTHS)
    np.testing.assert_allclose(found["loss"], nll.mean(), rtol=1e-6)
    np.testing.assert_allclose(math.log(found["perplexity"]), found["loss"])
    np.testing.assert_allclose(found["bits_per_byte"], nll.mean() / math.log(2), rtol=1e-6)
    equal = [Score(np.full(4, x), np.zeros(4, bool)) for x in (1.0, 2.0, 3.0)]
    assert p.perplexity([np.zeros(5, int)] * 3, equal, TOKENIZER)["stderr"] == pytest.approx(1 / math.sqrt(3))


def hits(sequence, counts, order):
    """The definition."""
    seen, found = set(), []
    for t in range(1, len(sequence)):
        gram = tuple(sequence[max(t - order + 1, 0) : t + 1].tolist())
        found.append(len(gram) == order and gram in seen and counts[gram] <= p.RARE)
        seen.add(gram)
    return found


@pytest.mark.parametrize("order", [2, 4])
def test_hits_are_what_the_text_has_shown_and_training_has_not(order, monkeypatch):
    monkeypatch.setattr(p, "RARE", 36)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 4, n) for n in (50, 3, 80)]
    training = [rng.integers(0, 4, n) for n in (1000, 1, 2000 * order)]
    counts = collections.Counter(tuple(d[i : i + order].tolist()) for d in training for i in range(len(d) - order + 1))
    scores = [Score(rng.normal(size=len(s) - 1), rng.random(len(s) - 1) < 0.5) for s in sequences]
    expected = np.concatenate([hits(s, counts, order) for s in sequences])
    if order == 4:  # every bigram is frequent
        assert expected.any()
    found = p.recall_slices(sequences, scores, training, order)
    nll = np.concatenate([s.nll for s in scores])
    for name, members in (("hits", expected), ("others", ~expected)):
        assert found[name]["targets"] == members.sum()
        assert found[name]["share"] == members.mean()
        if members.any():
            np.testing.assert_allclose(found[name]["loss"], nll[members].mean())
    monkeypatch.setattr(p, "RARE", 10**9)
    assert p.recall_slices(sequences, scores, training, order)["hits"]["targets"] > expected.sum()
