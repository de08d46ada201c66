import numpy as np
import pytest

from hydrax.core.build import ConfigError
from hydrax.tasks import haystack, words
from hydrax.tasks.text import BOS, PAD, SEP, Example, decode, pack, score


def test_a_row_is_context_question_and_answer():
    sample = pack([Example(b"ab", b"c?", b"xyz", (b"x", b"z")), Example(b"", b"", b"q", (b"q",))], 10)
    assert sample["inputs"].tolist() == [
        [BOS, *b"ab", SEP, *b"c?", *b"xyz", PAD],
        [BOS, SEP, *b"q"] + [PAD] * 7,
    ]
    assert sample["targets"].tolist() == [[-1] * 5 + [*b"xyz", -1, -1], [-1, *b"q"] + [-1] * 8]
    assert sample["meta"]["prompt_length"].tolist() == [6, 2]
    assert sample["meta"]["answer"].tolist() == [b"xyz", b"q"]
    assert sample["meta"]["references"].tolist() == [[b"x", b"z"], [b"q", b""]]
    assert decode(sample["inputs"][0]) == "ab\nc?xyz"


def test_the_last_byte_of_an_answer_is_not_read():
    example = Example(b"ab", b"c?", b"xyz", (b"xyz",))
    sample = pack([example], example.tokens)
    assert sample["inputs"][0].tolist() == [BOS, *b"ab", SEP, *b"c?xy"] and sample["targets"][0, -1] == ord("z")


def test_scores_are_fractions_of_the_references_found():
    assert score("the Red and BLUE one", [b"red", b"blue", b"green", b""]) == 2 / 3
    assert score("the Red one", [b"red", b"blue"], any_of=True) == 1
    assert score("", [b"red", b"blue"], any_of=True) == score("", [b"red"]) == 0


def test_names_and_keys_are_different():
    for table in (words.FIRST_NAMES, words.LAST_NAMES):
        assert len(table) == len(set(table)) == 200
    for table in (words.ADJECTIVES, words.NOUNS):
        assert len(table) == len(set(table)) == 100
    rng = np.random.default_rng(0)
    assert len(set(words.keys(rng, 10_000))) == 10_000
    coined = words.coined(rng, 5000)
    assert len(set(coined)) == 5000 and {len(word) for word in coined} == {6}


def test_needles_stand_where_they_should_in_as_much_hay_as_fits():
    rng = np.random.default_rng(0)
    hay = haystack.Haystack([b"One one.", b"Two.", b"Three, three.", b"Four."], 400)
    for room in range(60, 400, 7):
        depths = np.sort(rng.random(2))
        text, found = hay.around(rng, [b"N1.", b"N2."], depths, room)
        parts = text.decode().replace(". ", ".|").split("|")
        rest = [part for part in parts if part[0] != "N"]
        order = ["One one.", "Two.", "Three, three.", "Four."]
        start = order.index(rest[0])
        assert rest == [order[(start + i) % 4] for i in range(len(rest))]
        assert room - len("Three, three. ") < len(text) <= room
        places = [parts.index("N1."), parts.index("N2.") - 1]
        assert (found * len(rest)).round(6).tolist() == places
        assert abs(found - depths).max() <= 0.5 / len(rest) + 1e-9


def test_essays_are_files_or_documentation(tmp_path):
    text = "A first sentence of this file.\nIt ends\nin a second one. no capital here at all. Few. 'Quoted' is none.\n"
    (tmp_path / "essay.txt").write_text(text)
    assert haystack.sentences(text) == [b"A first sentence of this file.", b"It ends in a second one."]
    hay = haystack.essay((str(tmp_path / "essay.txt"),), 100)
    assert hay.sentences == 2 and hay.text.startswith(
        b"A first sentence of this file. It ends in a second one. A first"
    )
    assert haystack.essay((), 100).sentences > 500


def test_a_bad_essay_is_one_line(tmp_path):
    (tmp_path / "empty.txt").write_text("nothing that counts")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name in ("missing.txt", "empty.txt", "latin.txt"):
        with pytest.raises(ConfigError, match=f"^essay = .*{name}") as error:
            haystack.essay((str(tmp_path / name),), 100)
        assert "\n" not in str(error.value)
