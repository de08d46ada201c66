import json
import os
import sysconfig

import numpy as np
import pytest

from hydrax.core.build import ConfigError
from hydrax.data import formats
from hydrax.data.loader import DataConfig, open_data
from hydrax.data.source import documents, open_corpus
from hydrax.data.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def names(path):
    return [d.name.decode() for d in documents(path)]


def texts(corpus):
    bounds = zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)
    return [bytes(corpus.tokens[a + 1 : b - 1].astype(np.uint8)) for a, b in bounds]


def refused(path, **options):
    with pytest.raises(ConfigError) as caught:
        open_data(DataConfig(path=str(path), **{"seq_len": 4, "val_fraction": 0.5} | options))
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def folder(tmp_path):
    """Twenty small files, some of which a folder does not offer."""
    for i in range(20):
        (tmp_path / f"part{i % 3}").mkdir(exist_ok=True)
        (tmp_path / f"part{i % 3}" / f"{i}.txt").write_text(f"file {i}: " + "é" * i)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.txt").write_text("")
    for hidden in (".git", "__pycache__"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / "x.txt").write_text("not a document")
    return tmp_path


def test_folder_documents_are_its_text_files_sorted_by_relative_path(folder):
    expected = sorted(f"part{i % 3}/{i}.txt" for i in range(20))
    assert names(str(folder)) == expected
    assert texts(open_corpus(str(folder), BYTES)) == [(folder / name).read_bytes() for name in expected]


def test_glob_names_files_as_their_folder_does(folder):
    assert names(str(folder / "part*" / "*.txt")) == names(str(folder))
    assert names(str(folder / "**" / "1*.txt")) == [n for n in names(str(folder)) if "/1" in n]
    assert names(str(folder / "part1" / "1*.txt")) == ["1.txt", "10.txt", "13.txt", "16.txt", "19.txt"]
    assert names(str(folder / "part?" / "[12].txt")) == ["part1/1.txt", "part2/2.txt"]


def test_named_file_is_read_whatever_its_suffix(folder):
    assert names(str(folder / "picture.png")) == ["picture.png"]


def test_bytes_that_are_not_utf8_survive(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\x00\xff")
    assert texts(open_corpus(str(tmp_path), BYTES)) == [b"caf\xe9\x00\xff"]


def test_documents_begin_with_bos_and_end_with_eos(folder):
    corpus = open_corpus(str(folder), BYTES)
    assert (corpus.tokens[corpus.offsets[:-1]] == BYTES.bos).all()
    assert (corpus.tokens[corpus.offsets[1:] - 1] == BYTES.eos).all()
    assert corpus.records["bytes"].sum() + 2 * len(corpus.records) == corpus.tokens.size


def test_jsonl_has_a_document_per_line(tmp_path):
    lines = ['{"text": "one é"}', "", '{"id": 3, "text": "three\\nlines"}', '{"text": ""}', '{"text": "\\ud800"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = list(documents(str(tmp_path)))
    assert [(d.file, d.record, d.text) for d in found] == [
        ("a.jsonl", 1, "one é".encode()),
        ("a.jsonl", 3, b"three\nlines"),
        ("a.jsonl", 5, b"?"),
    ]
    assert len({d.name for d in found}) == 3


@pytest.mark.parametrize("line", ['{"body": "x"}', '{"text": 3}', "[1]", "{", '"text"', "null"])
def test_jsonl_line_without_text_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    error = refused(tmp_path)
    assert error.key == "data.path"
    assert "line 2 of a.jsonl" in error.allowed


def test_split_of_a_document_ignores_the_others(folder):
    def held_out():
        corpus = open_corpus(str(folder), BYTES)
        return {text: bool(place < 0.5) for text, place in zip(texts(corpus), corpus.records["place"], strict=True)}

    before = held_out()
    (folder / "part0" / "0.txt").unlink()
    (folder / "new.txt").write_text("another")
    after = held_out()
    assert 0 < sum(before.values()) < 20
    assert {t: s for t, s in after.items() if t != b"another"} == {t: s for t, s in before.items() if t in after}


def test_split_follows_the_fraction(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": str(i)}) for i in range(4000)))
    places = open_corpus(str(tmp_path), BYTES).records["place"]
    assert abs((places < 0.2).mean() - 0.2) < 0.03


def test_summary_changes_with_names_and_contents(folder):
    def digest():
        return open_data(DataConfig(path=str(folder), seq_len=4, val_fraction=0.5)).sha256

    first = digest()
    assert first == digest()
    (folder / "part0" / "0.txt").write_text("file 0; ")  # same length
    second = digest()
    (folder / "part0" / "0.txt").rename(folder / "part0" / "00.txt")
    assert len({first, second, digest()}) == 3


def test_nothing_to_read_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "x.png").write_bytes(b"x")
    (tmp_path / "blank.txt").write_text("")
    for path, why in {
        tmp_path / "missing": "no such file",
        tmp_path / "empty": "no text files",
        tmp_path / "binary": "no text files",
        tmp_path / "*.md": "no file matches",
        tmp_path / "blank.txt": "expected text",
        "": "no such file",
    }.items():
        error = refused(path)
        assert error.key == "data.path"
        assert error.value == str(path)
        assert why in error.allowed


def test_unreadable_files_are_named_not_skipped(tmp_path, monkeypatch):
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text("readable text")
    (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
    assert "link.txt" in refused(tmp_path).allowed
    (tmp_path / "link.txt").unlink()
    os.mkfifo(tmp_path / "pipe.txt")  # reading it would block for ever
    assert "pipe.txt" in refused(tmp_path).allowed
    (tmp_path / "pipe.txt").unlink()

    def denied(path):  # tests may run as root, whom no permission stops
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setitem(formats._OPEN, "", denied)
    error = refused(tmp_path)
    assert error.key == "data.path"
    assert error.allowed == "0.txt cannot be read: Permission denied; expected files of text"


def test_unreadable_folder_is_named_not_skipped(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "open.txt").write_text("readable")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert "closed cannot be read: Permission denied" in refused(tmp_path).allowed


def test_standard_library_is_the_default():
    data = open_data(DataConfig())
    found = {name.decode() for name in (d.name for d in documents(None))}
    assert "json/decoder.py" in found
    assert all(name.endswith(".py") for name in found)
    assert not any(part in name for name in found for part in ("site-packages", "dist-packages", "__pycache__"))
    assert data.train.documents + data.val.documents == len(found)
    assert data.train.bytes > 10 * data.val.bytes > 1e6
    with open(os.path.join(sysconfig.get_paths()["stdlib"], "this.py"), "rb") as this:
        assert this.read() in texts(open_corpus(None, BYTES))
