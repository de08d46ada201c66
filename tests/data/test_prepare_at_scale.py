"""`launch.prepare` on 200 MB of Python, killed twice at random moments, beside an undisturbed run.

pytest -s -m slow tests/data/test_prepare_at_scale.py        # -s shows the times
"""

import gzip
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import sysconfig
import time

import pytest

from hydrax.data import shards
from tests.data.corpora import contents

ROOT = pathlib.Path(__file__).parents[2]
SIZE = 200_000_000
SEED = int(os.environ.get("KILL_SEED", time.time_ns()))


def sources():
    """Texts of Python files, of the standard library and of what is installed, over and over if they are few."""
    paths = sysconfig.get_paths()
    files = sorted({f for key in ("stdlib", "purelib") for f in pathlib.Path(paths[key]).rglob("*.py") if f.is_file()})
    while True:
        yield from (file.read_bytes().decode(errors="replace") for file in files)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Half in JSON Lines, a quarter of it compressed, half in files; with a bad record now and then."""
    folder, texts, size = tmp_path_factory.mktemp("corpus"), sources(), 0
    for number in range(10):
        lines, part = [], 0
        while part < SIZE // 20:
            lines.append(json.dumps({"text": next(texts)}))
            part += len(lines[-1]) + 1
        raw = "\n".join([*lines, '{"text":']).encode()
        name = f"{number}.jsonl.gz" if number % 2 else f"{number}.jsonl"
        (folder / name).write_bytes(gzip.compress(raw, 1, mtime=0) if number % 2 else raw)
        size += len(raw)
    for number, text in enumerate(texts):
        if size >= SIZE:
            break
        path = folder / f"{number // 1000}" / f"{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(raw := text.encode() if number % 500 else b"\xff" + text.encode())
        size += len(raw)
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator((next(texts) for texts in [sources()] for _ in range(300)), trainer)
    path = corpus.parent / "tokenizer.json"
    model.save(str(path))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "files"), [("byte", ""), ("bpe", "[0-3].jsonl*")])  # BPE: a fifth, it is slow
def test_killed_twice_the_files_are_those_of_an_undisturbed_run(corpus, tmp_path, kind, files, request):
    name = kind if kind == "byte" else str(request.getfixturevalue("tokenizer"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

    def prepare(out, processes, kill_after=None):
        began = time.monotonic()
        line = [
            sys.executable,
            "-m",
            "launch.prepare",
            f"--source={corpus / files}",
            f"--out={out}",
            f"--tokenizer={name}",
        ]
        process = subprocess.Popen([*line, f"--processes={processes}"], env=environment, stdout=subprocess.DEVNULL)
        try:
            code = process.wait(timeout=kill_after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            code = process.wait()
        return code, time.monotonic() - began

    code, seconds = prepare(tmp_path / "undisturbed", 2)
    assert code == 0
    rng, killed = random.Random(SEED), []
    for _ in range(2):
        code, after = prepare(tmp_path / "killed", 2, kill_after=rng.uniform(0.35, 0.6) * seconds)
        assert code == -signal.SIGKILL
        done = len([p for p in (tmp_path / "killed" / shards.UNFINISHED).glob("[0-9]*") if p.suffix != ".tmp"])
        killed.append(f"{after:.1f} s ({done} shards)")
    code, rest = prepare(tmp_path / "killed", 1)  # and another number of processes
    assert code == 0
    whole = contents(tmp_path / "undisturbed")
    assert contents(tmp_path / "killed") == whole
    facts = json.loads(whole[shards.MANIFEST])
    print(
        f"\n{kind}: {facts['bytes']:,} bytes in {facts['documents']:,} documents, {facts['tokens']:,} tokens, "
        f"{facts['bad']} bad records, {len(facts['shards'])} shards; undisturbed {seconds:.1f} s with 2 processes; "
        f"killed after {' and '.join(killed)}, then {rest:.1f} s with 1 process; seed {SEED}"
    )
    assert facts["bad"] >= 4 and len(facts["shards"]) >= 4
