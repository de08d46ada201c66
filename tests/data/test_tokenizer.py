import json
import sys

import numpy as np
import pytest

from hydrax.core.build import ConfigError
from hydrax.data.loader import DataConfig, open_data
from hydrax.data.prepare import prepare
from hydrax.data.tokenizer import ByteTokenizer, TextStream, open_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n\n  def f(x):\treturn x\n",
    "naïve café — 日本語のテキスト, emoji 🙂🏳️‍🌈, Ω≈ç√",
    "</s> and <s> are just text here",
    " \n leading and trailing space ",
    "\x00\x7f controls",
]


def trained(path, kind):
    """A small tokenizer file trained on the texts (and only a part of their characters)."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.BPE(byte_fallback=kind == "sentencepiece")
    backend = tokenizers.Tokenizer(model)
    options = {"vocab_size": 300, "special_tokens": ["<s>", "</s>"], "show_progress": False}
    if kind == "byte-level":
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        options["initial_alphabet"] = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        fuse = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
        backend.decoder = tokenizers.decoders.Sequence(fuse)
        options["special_tokens"] += [f"<0x{b:02X}>" for b in range(256)]
    backend.train_from_iterator(TEXTS[:1] * 5, tokenizers.trainers.BpeTrainer(**options))
    if kind == "sentencepiece":  # the trainer's special tokens are ordinary ones of the vocabulary here
        backend = without_added_bytes(backend)
    backend.add_tokens([tokenizers.AddedToken("日本", special=False)])
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(path))
    return open_tokenizer(str(path))


def without_added_bytes(backend):
    description = json.loads(backend.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if not t["content"].startswith("<0x")]
    return type(backend).from_str(json.dumps(description))


def test_byte_tokenizer():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos, tokenizer.pad) == (259, 256, 257, 258)
    np.testing.assert_array_equal(tokenizer.token_bytes, [1] * 256 + [0] * 3)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert bytes(ids.tolist()) == text.encode()
        assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos, tokenizer.pad]) == text
    assert tokenizer.decode(tokenizer.encode(b"ok \xff")) == "ok �"


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_add_up_to_the_text(tmp_path, kind, text):
    tokenizer = trained(tmp_path / "tokenizer.json", kind)
    ids = tokenizer.encode(text)
    assert len(ids) > 3, "truncation stored in the file must be off"
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.pieces[i] for i in ids) == text.encode()
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert not {tokenizer.bos, tokenizer.eos, tokenizer.pad} & set(ids.tolist())


def test_special_tokens_are_found_or_added(tmp_path):
    tokenizer = trained(tmp_path / "tokenizer.json", "byte-level")
    assert (tokenizer.bos, tokenizer.eos) == (0, 1)
    assert tokenizer.pad == tokenizer.vocab_size - 1 == len(tokenizer.token_bytes) - 1
    assert tokenizer.token_bytes[[tokenizer.bos, tokenizer.eos, tokenizer.pad]].sum() == 0
    ids = tokenizer.encode("text")
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos, tokenizer.pad]) == "text"


def test_fingerprint_follows_the_file(tmp_path):
    first = trained(tmp_path / "a.json", "byte-level")
    assert first.fingerprint == open_tokenizer(str(tmp_path / "a.json")).fingerprint
    assert first.fingerprint != trained(tmp_path / "b.json", "sentencepiece").fingerprint != ByteTokenizer().fingerprint


def test_stream_prints_only_whole_characters():
    tokenizer = ByteTokenizer()
    for text in TEXTS:
        stream = TextStream(tokenizer)
        parts = [stream.push(i) for i in [tokenizer.bos, *tokenizer.encode(text)]]
        assert "".join(parts) == text
        assert "�" not in "".join(parts)
    stream = TextStream(tokenizer)
    assert [stream.push(b) for b in "é!".encode()] == ["", "é", "!"]
    assert [stream.push(b) for b in b"\xff\xc3a"] == ["�", "", "�a"]  # noise does not hold the rest back


def test_stream_joins_characters_cut_between_tokens(tmp_path):
    tokenizer = trained(tmp_path / "tokenizer.json", "byte-level")
    ids, stream = tokenizer.encode(TEXTS[1]), TextStream(tokenizer)
    assert "�" in "".join(tokenizer.decode([i]) for i in ids), "no character is cut: the test would prove nothing"
    assert "".join(stream.push(i) for i in ids) == TEXTS[1]


def test_data_with_a_tokenizer_file(tmp_path):
    tokenizer = trained(tmp_path / "tokenizer.json", "byte-level")
    (tmp_path / "text").mkdir()
    for i, text in enumerate(TEXTS * 4):
        (tmp_path / "text" / f"{i}.txt").write_text(text)
    cfg = DataConfig(str(tmp_path / "text"), tokenizer.name, seq_len=8, val_fraction=0.5)
    data = open_data(cfg)
    assert sum(batch["bytes"].sum() for batch in data.val_batches(4)) == data.val.bytes

    prepare(str(tmp_path / "text"), str(tmp_path / "tokens"), tokenizer=tokenizer.name)
    with pytest.raises(ConfigError, match="another tokenizer"):
        open_data(DataConfig(str(tmp_path / "tokens"), seq_len=8))


@pytest.mark.parametrize("content", [None, b"{}", b"not json", b"\xff\xfe", "folder"])
def test_bad_file_is_one_line(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        open_tokenizer(str(path))
    assert caught.value.key == "data.tokenizer"
    assert "\n" not in str(caught.value)


def test_missing_extra_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install hydrax\[hf\]"):
        open_tokenizer(str(tmp_path / "tokenizer.json"))
