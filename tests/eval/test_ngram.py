import collections
import dataclasses
import math

import numpy as np
import pytest

from hydrax.data.loader import DataConfig, open_data
from hydrax.eval import ngram


def write(folder, texts):
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_bytes(text)
    return open_data(DataConfig(path=str(folder), seq_len=16, val_fraction=0.3))


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    words = [b"alpha", b"beta ", b"gamma\n", b"delta, "]
    return write(tmp_path, [b"".join(words[i] for i in rng.integers(0, 4, 30)) for _ in range(40)])


def pieces(split):
    """The tokens (inputs and last target) of every document piece of every row."""
    for row in split.rows:
        for segment in range(1, row["segment_ids"].max() + 1):
            inside = row["segment_ids"] == segment
            last = row["targets"][inside][-1:] if row["weights"][inside][-1] else []
            yield [*row["tokens"][inside].tolist(), *last]


def slow_bits_per_byte(data):
    """The definition with dictionaries: Witten-Bell over contexts of 2, 1, 0 tokens, then uniform."""
    counts = collections.defaultdict(collections.Counter)
    for piece in pieces(data.train):
        for i in range(1, len(piece)):
            before = (None, *piece)[i - 1 : i + 1]
            for order in range(3):
                counts[before[2 - order :]][piece[i]] += 1

    def probability(context, token):
        if context is None:
            return 1 / data.tokenizer.vocab_size
        lower = probability(context[1:] if context else None, token)
        seen = counts.get(context)
        return lower if seen is None else (seen[token] + len(seen) * lower) / (seen.total() + len(seen))

    bits = 0.0
    for piece in pieces(data.val):
        for i in range(1, len(piece)):
            bits -= math.log2(probability((None, *piece)[i - 1 : i + 1], piece[i]))
    return bits / data.val.bytes


def test_equals_the_definition(data, monkeypatch):
    expected = slow_bits_per_byte(data)
    assert ngram.bits_per_byte(data, data.val_batches(4)) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(ngram, "CHUNK", 500)  # counted in many pieces
    assert ngram.bits_per_byte(data, data.val_batches(3)) == pytest.approx(expected, rel=1e-9)


def test_probabilities_sum_to_one(data):
    model = ngram.Trigram(data.train.rows, data.tokenizer)
    np.testing.assert_allclose(model.bigram.sum(-1), 1, rtol=1e-12)
    vocab = np.arange(model.vocab, dtype=np.int32)[None]
    for first, second in [(ord("a"), ord("l")), (ord("z"), ord("a")), (ord("z"), ord("z"))]:
        # One row "first second y" per y, of which only y counts.
        rows = {
            "tokens": np.repeat([[first, second]], model.vocab, 0).astype(np.int32),
            "targets": np.stack([np.full_like(vocab[0], second), vocab[0]], 1),
            "positions": np.repeat([[0, 1]], model.vocab, 0),
            "weights": np.repeat([[0.0, 1.0]], model.vocab, 0),
        }
        p = [2 ** -model.bits({k: v[y : y + 1] for k, v in rows.items()}) for y in range(model.vocab)]
        assert sum(p) == pytest.approx(1, rel=1e-9)


def test_learns_what_a_trigram_can(tmp_path, data):
    periodic = write(tmp_path, [b"abcabcabc" * 20] * 40)
    assert ngram.bits_per_byte(periodic, periodic.val_batches(4)) < 0.3
    rng = np.random.default_rng(1)
    noise = write(tmp_path, [rng.integers(0, 256, 2000, np.uint8).tobytes() for _ in range(40)])
    assert 7.9 < ngram.bits_per_byte(noise, noise.val_batches(4)) < 9


def test_other_tokenizers_have_none(data):
    other = dataclasses.replace(data, tokenizer=object())
    assert ngram.bits_per_byte(other, data.val_batches(4)) is None
