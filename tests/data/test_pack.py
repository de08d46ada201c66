import numpy as np
import pytest

from hydrax.data.corpus import RECORD, Corpus
from hydrax.data.pack import PackedRows
from hydrax.data.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def corpus_of(texts):
    bodies = [np.array([BYTES.bos, *text, BYTES.eos], np.uint16) for text in texts]
    offsets = np.cumsum([0] + [b.size for b in bodies])
    return Corpus(np.concatenate(bodies), offsets, np.zeros(len(texts), RECORD))


def packed(texts, seq_len, *, seed=0, documents=None, **options):
    documents = np.arange(len(texts)) if documents is None else documents
    return PackedRows(corpus_of(texts), documents, BYTES, seq_len, seed=seed, **{"partial": True, **options})


@pytest.fixture
def texts():
    """Documents of 0 to 59 bytes; every byte of one document is its number, so that a leak shows."""
    lengths = np.random.default_rng(0).integers(0, 60, 50)
    return [bytes([i]) * n for i, n in enumerate(lengths)]


def reference(texts, seq_len, seed, prefix=0, align=1):
    """The definition, a token at a time: (token, target, segment, position, weight) of every place of every row."""
    order = np.random.default_rng(seed).permutation(len(texts))
    bodies = {d: (*[None] * prefix, BYTES.bos, *texts[d], BYTES.eos) for d in order}
    stream = [(t, d) for d in order for t in (*bodies[d], *[BYTES.pad] * (-len(bodies[d]) % align))]
    rows, stride = [], seq_len - prefix
    for start in range(prefix, len(stream) - 1, stride):
        row, segment, current = [], 0, None
        for i in range(start, min(start + stride, len(stream) - 1)):
            (token, document), (target, next_document) = stream[i], stream[i + 1]
            if token is None:
                continue
            if document != current:
                segment, position, current = segment + 1, prefix, document
                row += [(BYTES.pad, BYTES.pad, segment, j, 0) for j in range(prefix - 1)]
                row += [(BYTES.pad, token, segment, prefix - 1, 0)] * (prefix > 0)
            target = BYTES.pad if target is None else target
            row.append((token, target, segment, position, int(document == next_document and target != BYTES.pad)))
            position += 1
        rows.append(row + [(BYTES.pad, BYTES.pad, 0, 0, 0)] * (seq_len - len(row)))
    return np.array(rows)


def assert_equal(rows, expected):
    assert len(rows) == len(expected)
    batch = rows.batch(np.arange(len(rows)))
    for i, key in enumerate(("tokens", "targets", "segment_ids", "positions", "weights")):
        np.testing.assert_array_equal(batch[key], expected[..., i], err_msg=key)
        assert batch[key].dtype == (np.float32 if key == "weights" else np.int32)
    np.testing.assert_array_equal(batch["bytes"], ((expected[..., 1] < 256) * expected[..., 4]).sum(1))
    assert batch["bytes"].dtype == np.float32


@pytest.mark.parametrize("seq_len", [1, 7, 64, 5000])
@pytest.mark.parametrize("seed", [0, 3])
def test_rows_are_what_the_definition_says(texts, seq_len, seed):
    assert_equal(packed(texts, seq_len, seed=seed), reference(texts, seq_len, seed))


@pytest.mark.parametrize(("seq_len", "align"), [(8, 8), (12, 4), (60, 5), (5000, 50)])
@pytest.mark.parametrize("seed", [0, 3])
def test_aligned_rows_are_what_the_definition_says(texts, seq_len, align, seed):
    rows = packed(texts, seq_len, seed=seed, align=align)
    assert_equal(rows, reference(texts, seq_len, seed, align=align))
    for row in rows:
        starts = np.flatnonzero((row["positions"] == 0) & (row["segment_ids"] > 0))
        assert starts.size and not (starts % align).any()


@pytest.mark.parametrize("prefix", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("spare", [1, 2, 3, 13, 40, 5000])
@pytest.mark.parametrize("seed", [0, 3])
def test_rows_with_a_prefix_are_what_the_definition_says(texts, prefix, spare, seed):
    seq_len = prefix + spare
    assert_equal(packed(texts, seq_len, seed=seed, prefix=prefix), reference(texts, seq_len, seed, prefix))


@pytest.mark.parametrize("seed", range(20))
def test_every_segment_is_one_whole_prefix_and_tokens_of_one_document(texts, seed):
    rng = np.random.default_rng(seed)
    prefix = int(rng.integers(1, 9))
    batch = packed(texts, 2 * prefix + int(rng.integers(1, 30)), seed=seed, prefix=prefix).batch(np.arange(20))
    for tokens, segments, positions, weights in zip(
        *(batch[key] for key in ("tokens", "segment_ids", "positions", "weights")), strict=True
    ):
        assert (np.diff(np.flatnonzero(segments)) == 1).all()  # padding is on the right
        for segment in set(segments) - {0}:
            own = segments == segment
            np.testing.assert_array_equal(positions[own], np.arange(own.sum()))
            assert own.sum() > prefix
            assert (tokens[own][:prefix] == BYTES.pad).all() and not weights[own][:prefix].any()
            assert (tokens[own][prefix:] != BYTES.pad).all()
            assert len(set(tokens[own][prefix:]) - {BYTES.bos, BYTES.eos}) <= 1


def test_a_prefix_does_not_double_where_a_document_meets_the_edge_of_a_row():
    """Two documents of 6 tokens behind 2 places each: place 8 of the stream is where the second and row 1 begin."""
    rows = packed([bytes(4), bytes(4)], 8, prefix=2)
    assert [row["segment_ids"].tolist() for row in rows] == [[1] * 8, [1] * 6 + [0] * 2, [1] * 3 + [0] * 5]
    assert rows[1]["tokens"][:3].tolist() == [BYTES.pad, BYTES.pad, BYTES.bos]


@pytest.mark.parametrize("seed", range(4))
def test_a_prefix_may_be_longer_than_the_corpus(seed):
    texts = [b"", b"a", b"bc"]
    assert_equal(packed(texts, 60, seed=seed, prefix=16), reference(texts, 60, seed, 16))


@pytest.mark.parametrize(("seq_len", "options"), [
    (13, {}), (13, {"prefix": 3}), (29, {"prefix": 8}), (5, {"prefix": 4}), (12, {"align": 4}),
])  # fmt: skip
def test_every_token_is_predicted_exactly_once(texts, seq_len, options):
    rows = packed(texts, seq_len, **options)
    batch = rows.batch(np.arange(len(rows)))
    predicted = np.bincount(batch["targets"][batch["weights"] > 0], minlength=BYTES.vocab_size)
    expected = np.bincount(np.frombuffer(b"".join(texts), np.uint8), minlength=BYTES.vocab_size)
    expected[BYTES.eos] = len(texts)  # the end of every document is predicted, its beginning never
    np.testing.assert_array_equal(predicted, expected)
    assert batch["bytes"].sum() == sum(map(len, texts))


def test_no_segment_holds_two_documents(texts):
    batch = packed(texts, 29).batch(np.arange(len(packed(texts, 29))))
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
        for segment in set(segments) - {0}:
            assert len(set(tokens[segments == segment]) - {BYTES.bos, BYTES.eos}) <= 1


def test_training_drops_the_partial_row(texts):
    whole, kept = packed(texts, 32, partial=False), packed(texts, 32)
    assert len(whole) == len(kept) - 1
    for row in range(len(whole)):
        assert (whole[row]["segment_ids"] > 0).all()
        np.testing.assert_array_equal(whole[row]["tokens"], kept[row]["tokens"])


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("spare", [0, 1])
def test_row_count_at_the_boundary(spare, prefix):
    """A prefix and T + 1 tokens make one row of T predictions, T tokens make none that is full."""
    text = bytes(8 - 1 + spare)  # with BOS and EOS: 9 + spare tokens
    assert len(packed([text], 9 + prefix, partial=False, prefix=prefix)) == spare
    assert len(packed([text], 9 + prefix, partial=True, prefix=prefix)) == 1


def test_single_row_equals_its_place_in_a_batch(texts):
    rows = packed(texts, 21)
    batch = rows.batch(np.array([5, 2, 5]))
    for key, value in rows[5].items():
        np.testing.assert_array_equal(value, batch[key][0])
        np.testing.assert_array_equal(value, batch[key][2])
    for outside in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows[outside]


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_rows_past_the_end_are_padding(extra, prefix):
    rows = packed([bytes(range(6 + extra))], 4, prefix=prefix)
    batch = rows.batch(np.array([len(rows), len(rows) + 1, len(rows) + 100]))
    assert (batch["tokens"] == BYTES.pad).all()
    assert (batch["targets"] == BYTES.pad).all()
    assert not any(batch[key].any() for key in ("segment_ids", "positions", "weights", "bytes"))


def test_only_documents_of_the_split_appear(texts):
    chosen = np.array([3, 8, 20, 41])
    rows = packed(texts, 16, documents=chosen)
    seen = rows.batch(np.arange(len(rows)))["tokens"]
    assert set(seen[seen < 256]) == {d for d in chosen if texts[d]}


def test_seed_decides_the_order(texts):
    first = [packed(texts, 50, seed=s).batch(np.arange(3))["tokens"].tolist() for s in (0, 0, 1)]
    assert first[0] == first[1] != first[2]


def test_edit_of_one_document_leaves_the_others(texts):
    def other_documents(texts, edited):
        row = packed(texts, 10**4)[0]
        parts = [row["tokens"][row["segment_ids"] == s].tolist() for s in range(1, len(texts) + 1)]
        return [part for part in parts if edited not in part]

    edited = next(d for d in range(10, 50) if texts[d])
    after = other_documents([*texts[:edited], bytes([edited]) * 200, *texts[edited + 1 :]], edited)
    assert len(after) == len(texts) - 1
    assert after == other_documents(texts, edited)


def test_memory_map_is_read_only_where_asked(tmp_path, texts):
    corpus = corpus_of(texts)
    np.save(tmp_path / "tokens.npy", corpus.tokens)
    tokens = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    mapped = Corpus(tokens, corpus.offsets, corpus.records)
    rows = PackedRows(mapped, np.arange(len(texts)), BYTES, 16, seed=0, partial=True)
    assert rows.tokens is tokens
    for key, value in rows[3].items():
        np.testing.assert_array_equal(value, packed(texts, 16)[3][key])


@pytest.mark.parametrize("width", [1, 7, 32, 5000])
def test_joined_rows_are_the_stream(texts, width):
    rows = PackedRows(corpus_of(texts), np.arange(len(texts)), BYTES, width, seed=3, partial=True, joined=True)
    order = np.random.default_rng(3).permutation(len(texts))
    stream = np.array([t for d in order for t in (BYTES.bos, *texts[d], BYTES.eos)])
    batch, real = rows.batch(np.arange(len(rows))), np.arange(len(rows) * width).reshape(-1, width) < stream.size - 1
    np.testing.assert_array_equal(batch["tokens"][real], stream[:-1])
    np.testing.assert_array_equal(batch["targets"][real], stream[1:])
    np.testing.assert_array_equal(batch["segment_ids"], real)
    np.testing.assert_array_equal(batch["weights"], real)
    np.testing.assert_array_equal(batch["positions"], np.arange(width) * real)
    np.testing.assert_array_equal(batch["bytes"], ((batch["targets"] < 256) & real).sum(1))
    for i in range(0, len(rows), 1 + len(rows) // 20):
        for key, value in rows[i].items():
            np.testing.assert_array_equal(value, batch[key][i])
    assert not rows.batch(np.array([len(rows)]))["segment_ids"].any()
