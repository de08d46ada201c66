"""Length extrapolation: both ways of reading score every position once, and the verdict sees what a mean would hide."""

import numpy as np
import pytest

from hydrax.core.build import ConfigError
from hydrax.data.loader import DataConfig
from hydrax.data.tokenizer import ByteTokenizer
from hydrax.eval import length
from hydrax.eval.scoring import Scorer
from hydrax.eval.texts import open_texts
from tests.eval import small


@pytest.mark.parametrize(("total", "width"), [(64, 16), (50, 16), (10, 16), (29, 7), (8, 1)])
def test_windows_cover_every_place_once(total, width):
    spans = length.windows(total, width)
    assert [n for _, new, end in spans for n in range(new, end)] == list(range(total))
    for start, new, end in spans[1:]:
        assert end - start == width and new - start >= width // 2


def test_a_window_is_read_alone(tmp_path):
    model = small.model(pattern="gla")
    scorer, tokens = Scorer(model), np.random.default_rng(0).integers(0, 256, 65).astype(np.int32)
    whole, local = length.losses(scorer, [tokens, tokens[::-1].copy()], 16)
    assert whole.shape == local.shape == (2, 64)
    np.testing.assert_allclose(whole[:, :16], local[:, :16], atol=1e-4)
    (third,) = scorer.texts([tokens[16:33]])  # places 24 to 31 are new in the window from 16
    np.testing.assert_allclose(local[0, 24:32], third.nll[8:], atol=1e-4)
    assert np.abs(whole - local)[:, 16:].max() > 1e-2


def test_long_sequences_come_from_documents_twice_as_long(tmp_path):
    path = small.write(tmp_path, ["c" * 127 + "a" * 300, "b" * 200])
    texts = open_texts(DataConfig(), ByteTokenizer(), path=str(path))
    found = length.long_sequences(texts, 256, 16, 8, 100)
    assert [len(s) for s in found] == [129, 129] and all((s[1:] == ord("a")).all() for s in found)
    with pytest.raises(ConfigError, match=r"factor = 16: expected --data with a document of 513 tokens .* 429\)"):
        length.long_sequences(texts, 256, 16, 16, 100)
    assert len(length.long_sequences(texts, 256, 16, 8, 1)) == 1


def test_bins_double_from_the_training_length_both_ways():
    assert length.edges(64, 512) == [16, 32, 64, 128, 256, 512]
    assert length.edges(100, 800) == [25, 50, 100, 200, 400, 800]
    assert length.edges(8, 20) == [8, 16, 20]


@pytest.mark.parametrize(("late", "verdict"), [(1.01, True), (1.04, False)])
def test_the_verdict_compares_with_the_end_of_the_training_length(late, verdict):
    curve = np.full((3, 128), 5.0)  # what is early and hard does not count
    curve[:, 16:32], curve[:, 32:] = 1.0, late
    found = length.extrapolation(curve, np.ones((3, 128)), 32)
    assert found["extrapolates"] is verdict
    assert (found["inside"], found["beyond"], found["beyond_in_windows"]) == (1.0, pytest.approx(late), 1.0)
    assert found["positions"] == [16, 32, 64, 128]
    np.testing.assert_allclose(found["one_pass"]["loss"], [5.0, 1.0, late, late])
    assert found["one_pass"]["stderr"] == pytest.approx([0] * 4)


def test_the_figure_is_a_picture(tmp_path):
    rng = np.random.default_rng(0)
    results = {n: length.extrapolation(*rng.random((2, 3, 128)), 32) for n in ("one", "two")}
    length.draw(results, tmp_path / "new" / "figure.png")
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
