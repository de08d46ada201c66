import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from hydrax.core.build import ConfigError
from hydrax.data import prepare as preparing, scan, shards
from hydrax.data.formats import Document, Part, read
from hydrax.data.loader import DataConfig, open_data
from hydrax.data.prepare import prepare
from hydrax.data.source import documents
from hydrax.data.tokenizer import ByteTokenizer
from tests.data.corpora import BAD, contents, texts, write_corpus

ROOT = pathlib.Path(__file__).parents[2]
SMALL = 2000  # bytes of sources per shard: two dozen shards


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(scan, "SHARD", SMALL)


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    """The corpus, prepared without any disturbance."""
    out = tmp_path_factory.mktemp("made") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "SHARD", SMALL)
        prepare(str(corpus), str(out))
    return out


def manifest(folder):
    return json.loads((folder / shards.MANIFEST).read_text())


def refused(function, *args, **options):
    with pytest.raises(ConfigError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read_prepared(path, **options):
    return open_data(DataConfig(path=str(path), **{"seq_len": 64, "val_fraction": 0.2} | options))


def test_documents_are_those_of_the_sources_in_their_order(corpus, made):
    expected = []
    for name in sorted(p.relative_to(corpus).as_posix() for p in corpus.rglob("*") if p.is_file()):
        found = [item for item in read(Part(name, str(corpus / name))) if isinstance(item, Document) and item.text]
        expected += [d.text for d in found if name != "latin.txt"]
    assert texts(made) == expected
    counts = manifest(made)
    assert counts["documents"] == len(expected) > 100
    assert counts["bytes"] == sum(map(len, expected))
    assert counts["tokens"] == counts["bytes"] + 2 * len(expected)
    assert counts["empty"] == 1
    assert len(counts["shards"]) > 10
    assert {s["file"]: s["size"] for s in counts["sources"]} == {
        p.relative_to(corpus).as_posix(): p.stat().st_size for p in corpus.rglob("*") if p.is_file()
    }
    for shard in counts["shards"]:
        assert shards.sha256(made / shard["file"]) == shard["sha256"]


def test_bad_records_are_counted_and_listed_with_their_place(made):
    listed = [json.loads(line) for line in (made / shards.BAD_RECORDS).read_text().splitlines()]
    assert manifest(made)["bad"] == len(listed) == len(BAD)
    for entry, (file, record, reason) in zip(listed, BAD, strict=True):
        assert entry["file"] == file
        assert record is None or entry["record"] == record
        assert entry["reason"].startswith(reason)
    [tail] = [entry for entry in listed if entry["file"] == "cut.jsonl.gz"]
    assert 30 < tail["record"] <= 60  # what was before the end of the file is there


def test_processes_do_not_matter(corpus, made, tmp_path, small):
    prepare(str(corpus), str(tmp_path / "out"), processes=3)
    assert contents(tmp_path / "out") == contents(made)


COMMAND = f"""
import sys
import time
from hydrax.data import prepare as preparing, scan
from launch import prepare

make = preparing._make

def slow(job):
    time.sleep(0.1)
    make(job)

if __name__ == "__main__":  # workers import this file, too
    scan.SHARD, preparing._make = {SMALL}, slow
    prepare.main(sys.argv)
"""


def run(corpus, out, script, after=None, how=signal.SIGKILL):
    """Runs the command, killed after that many seconds; its exit code."""
    script.write_text(COMMAND)
    line = [sys.executable, str(script), f"--source={corpus}", f"--out={out}", "--processes=2"]
    process = subprocess.Popen(line, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    if after is not None:
        deadline = time.monotonic() + 60
        while not after() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(how)
    return process.wait(timeout=120)


def test_killed_twice_the_same_command_ends_with_the_same_files(corpus, made, tmp_path):
    out = tmp_path / "out"
    work = out / shards.UNFINISHED

    def complete(count):
        return work.exists() and len([p for p in work.glob("0*") if p.suffix != ".tmp"]) >= count

    command = functools.partial(run, corpus, out, tmp_path / "command.py")
    assert command(after=lambda: complete(3)) == -signal.SIGKILL
    first = {p.name: p.stat().st_mtime_ns for p in work.glob("0*") if p.suffix != ".tmp"}
    assert command(after=lambda: complete(9), how=signal.SIGTERM) == -signal.SIGTERM
    assert first.items() <= {p.name: p.stat().st_mtime_ns for p in work.glob("0*")}.items()  # not made again
    assert "is not finished" in refused(read_prepared, out)
    assert command() == 0
    assert contents(out) == contents(made)


def test_killed_anywhere_the_same_call_ends_with_the_same_files(corpus, made, tmp_path, small, monkeypatch):
    """Every rename is a moment to die, before it and after it: nothing else changes what a later call sees."""

    class Killed(BaseException):
        pass

    moments = 0

    def dying(rename, at, early):
        def renamed(self, target):
            nonlocal moments
            moments += 1
            if moments == at and early:
                raise Killed
            done = rename(self, target)
            if moments == at:
                raise Killed
            return done

        return renamed

    rename, replace = pathlib.Path.rename, pathlib.Path.replace
    at, kills = 1, 0
    while True:
        early, moments = at % 2 == 0, 0
        monkeypatch.setattr(pathlib.Path, "rename", dying(rename, at, early))
        monkeypatch.setattr(pathlib.Path, "replace", dying(replace, at, early))
        try:
            prepare(str(corpus), str(tmp_path / "out"))
            break
        except Killed:
            kills, at = kills + 1, random.Random(kills).randrange(1, 6)
    assert kills >= 10
    assert contents(tmp_path / "out") == contents(made)


def test_a_file_that_was_begun_is_scanned_again(corpus, made, tmp_path, small):
    prepare(str(corpus), str(tmp_path / "whole"))
    work = tmp_path / "out" / shards.UNFINISHED
    work.mkdir(parents=True)
    files = {name: str(path) for name, path in preparing.find(str(corpus))}
    scan.scan(work / preparing.SCAN, files, lambda f, x, n: map(f, x), lambda *_: None)
    log = (work / preparing.SCAN).read_text()
    (work / preparing.SCAN).write_text(log[: len(log) // 2])
    prepare(str(corpus), str(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(made)


def test_prepared_is_read_as_the_text_is(tmp_path, small):
    folder = tmp_path / "text"
    write_corpus(folder)
    for bad in ("broken.jsonl", "cut.jsonl.gz", "latin.txt", "no.txt.gz"):
        (folder / bad).unlink()
    prepare(str(folder), str(tmp_path / "out"))
    text, tokens = read_prepared(folder), read_prepared(tmp_path / "out")
    assert isinstance(tokens.train.rows.sources[0].tokens, shards.ShardTokens)
    assert max(len(d.text) for d in documents(str(folder))) > 2 * shards.PIECE
    assert text.sha256 == tokens.sha256 == manifest(tmp_path / "out")["sha256"]
    for split in ("train", "val"):
        a, b = getattr(text, split), getattr(tokens, split)
        assert (a.documents, a.bytes, a.sha256, len(a.rows)) == (b.documents, b.bytes, b.sha256, len(b.rows))
        everything = np.arange(len(a.rows) + 1)
        for key, value in a.rows.batch(everything).items():
            np.testing.assert_array_equal(value, b.rows.batch(everything)[key])
    np.testing.assert_array_equal(*(next(d.train_batches(4, 7, start_step=9))["tokens"] for d in (text, tokens)))


def test_lone_text_holds_out_its_tail(tmp_path):
    (tmp_path / "only.txt").write_text("\n".join(f"line {i}" for i in range(200)))
    prepare(str(tmp_path / "only.txt"), str(tmp_path / "out"), val_fraction=0.25)
    text, tokens = (read_prepared(tmp_path / p, seq_len=16, val_fraction=0.25) for p in ("only.txt", "out"))
    assert (text.sha256, text.val.bytes) == (tokens.sha256, tokens.val.bytes)


def test_parquet_and_zst(tmp_path, small):
    arrow = pytest.importorskip("pyarrow", reason="the extra `data`")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `data`")
    folder = tmp_path / "text"
    folder.mkdir()
    rows = [f"row {i}, " * 20 for i in range(300)]
    table = arrow.table({"id": range(300), "text": [None if i == 7 else rows[i] for i in range(300)]})
    parquet.write_table(table, folder / "a.parquet", row_group_size=50, compression="none")
    invalid = arrow.StringArray.from_buffers(2, *arrow.array([b"good", b"\xff"]).buffers()[1:])
    parquet.write_table(arrow.table({"text": invalid}), folder / "b.parquet")
    (folder / "c.parquet").write_bytes(b"no such thing")
    parquet.write_table(arrow.table({"id": [1]}), folder / "d.parquet")
    for name, share in {"e": 1.0, "f": 0.5}.items():
        with arrow.output_stream(folder / "all.zst", compression="zstd") as out:
            out.write("\n".join(json.dumps({"text": row}) for row in rows).encode())
        packed = (folder / "all.zst").read_bytes()
        (folder / f"{name}.jsonl.zst").write_bytes(packed[: int(len(packed) * share)])
    (folder / "all.zst").unlink()
    counts = prepare(str(folder), str(tmp_path / "out"), processes=1)
    found = texts(tmp_path / "out")
    assert found[:300] == [row.encode() for i, row in enumerate(rows) if i != 7] + [b"good"]
    assert found[300:600] == [row.encode() for row in rows]
    assert len(counts["shards"]) >= 3
    listed = [json.loads(line) for line in (tmp_path / "out" / shards.BAD_RECORDS).read_text().splitlines()]
    assert [(e["file"], e["record"]) for e in listed[:4]] == [
        ("a.parquet", 8),
        ("b.parquet", 2),
        ("c.parquet", None),
        ("d.parquet", None),
    ]
    assert listed[3]["reason"] == 'has no column "text" of text; there are id (int64)'
    assert listed[4]["file"] == "f.jsonl.zst" and "Truncated" in listed[4]["reason"]


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install hydrax[data]" in refused(read_prepared, tmp_path / "a.parquet")
    assert "pip install hydrax[data]" in refused(prepare, str(tmp_path / "a.parquet"), str(tmp_path / "out"))


def test_the_field_is_chosen(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n{"content": "two"}\n')
    message = refused(prepare, str(tmp_path / "a.jsonl"), str(tmp_path / "out"))
    assert message.startswith("source = 'a.jsonl': expected text, there is no document; the first of 2 bad records")
    prepare(str(tmp_path / "a.jsonl"), str(tmp_path / "out"), field="content")
    assert texts(tmp_path / "out") == [b"one", b"two"]


def test_folders_of_something_else_are_left_alone(corpus, made, tmp_path, small):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "holds 'thesis.tex'" in refused(prepare, str(corpus), str(tmp_path))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.txt").write_text("x")
    message = refused(prepare, str(tmp_path / "more"), str(made))
    assert "the folder is complete with other sources or settings" in message
    assert "field: 'text' -> 'body'" in refused(prepare, str(corpus), str(made), field="body")
    assert "outside of the source" in refused(prepare, str(corpus), str(corpus / "out"))
    before = contents(made)
    prepare(str(corpus), str(made))
    assert contents(made) == before


def test_sources_that_changed_are_noticed(tmp_path, small, monkeypatch):
    folder, out = write_corpus(tmp_path / "text"), str(tmp_path / "out")

    def change(job):
        (folder / "part" / "0.txt").write_text("something else")
        return preparing_make(job)

    preparing_make = preparing._make
    monkeypatch.setattr(preparing, "_make", change)
    assert "part/0.txt changed while it was read" in refused(prepare, str(folder), out)
    monkeypatch.undo()
    assert re_begun(refused(prepare, str(folder), out))


def re_begun(message):
    return "the folder is begun with other sources" in message and "sources.part/0.txt" in message


def test_only_one_process_writes_a_folder(corpus, tmp_path):
    with preparing._only_one("out", tmp_path / "out" / shards.UNFINISHED):
        assert "another process is writing this folder" in refused(prepare, str(corpus), str(tmp_path / "out"))


def test_another_tokenizer_is_one_line(made):
    changed = manifest(made)
    changed["tokenizer"] = {"name": "mine.json", "fingerprint": "0"}
    text = (made / shards.MANIFEST).read_text()
    try:
        (made / shards.MANIFEST).write_text(json.dumps(changed))
        message = refused(read_prepared, made)
    finally:
        (made / shards.MANIFEST).write_text(text)
    assert message == f"data.tokenizer = 'byte': {made} was prepared with another tokenizer, 'mine.json'"


@pytest.fixture
def damaged(made, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in contents(made).items():
        (copy / name).write_bytes(content)
    return copy


@pytest.mark.parametrize("name", [shards.MANIFEST, shards.DOCUMENTS, "tokens-00000-of-*"])
@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_files_that_are_not_as_written_are_refused(damaged, name, damage):
    [path] = damaged.glob(name)
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    assert refused(read_prepared, damaged).startswith("data.path = ")


def test_flipped_bits_of_a_shard_are_one_line_that_names_it(damaged):
    """Wherever the bit is, the tokens are right or refused."""
    path = max(damaged.glob("tokens-*"), key=lambda p: p.stat().st_size)
    good, data = path.read_bytes(), read_prepared(damaged)
    everything = np.arange(len(data.train.rows))
    expected = data.train.rows.batch(everything)["tokens"]
    rng, refusals = random.Random(0), []
    for _ in range(12):
        spoilt = bytearray(good)
        spoilt[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        path.write_bytes(spoilt)
        try:
            np.testing.assert_array_equal(read_prepared(damaged).train.rows.batch(everything)["tokens"], expected)
        except ConfigError as error:
            refusals.append(str(error))
    assert refusals
    assert all(f"damaged: {path.name} has other contents than were written" in line for line in refusals)


def test_a_damaged_shard_ends_training_in_one_line(damaged):
    """The error passes through grain's threads."""
    for path in damaged.glob("tokens-*"):
        content = bytearray(path.read_bytes())
        content[64:1500] = bytes(1436)
        path.write_bytes(content)
    data = read_prepared(damaged)
    assert "is damaged: tokens-" in refused(lambda: next(data.train_batches(4, seed=0)))


def test_no_space_left_is_one_line(corpus, tmp_path, small, monkeypatch):
    def full(*args):
        raise RuntimeError("write() failed: No space left on device; writing x")

    monkeypatch.setattr(shards, "write_shard", full)
    message = refused(prepare, str(corpus), str(tmp_path / "out"))
    assert message.startswith("out = ") and "No space left on device" in message
    monkeypatch.undo()
    monkeypatch.setattr(scan, "SHARD", SMALL)
    prepare(str(corpus), str(tmp_path / "out"))
    assert manifest(tmp_path / "out")["bad"] == len(BAD)


def test_a_tokenizer_file(tmp_path, corpus):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "w1": 1}, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = str(tmp_path / "tokenizer.json")
    model.save(path)
    prepare(str(corpus), str(tmp_path / "out"), tokenizer=path)
    kwargs = {"tokenizer": path, "seq_len": 16}
    assert read_prepared(tmp_path / "out", **kwargs).tokenizer.vocab_size == 5
    assert "another tokenizer" in refused(read_prepared, tmp_path / "out")
    assert ByteTokenizer.fingerprint != manifest(tmp_path / "out")["tokenizer"]["fingerprint"]
    model.add_tokens(["new"])
    model.save(path)
    assert "another tokenizer" in refused(read_prepared, tmp_path / "out", **kwargs)
