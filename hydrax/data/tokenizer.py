"""Text to token ids and back: raw bytes, or a `tokenizer.json` of the Hugging Face `tokenizers` library.

Every token knows the bytes it stands for (`pieces`), so that bits per byte compare across tokenizers: the pieces of
an encoded text add up to its UTF-8 length (exactly for bytes and byte-level BPE without a prefix space).
"""

import codecs
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hydrax.core.build import ConfigError


class Tokenizer(Protocol):
    """Text to ids and back: of bytes, or of a tokenizer.json."""

    name: str  # value of data.tokenizer that makes it
    fingerprint: str  # sha256 of everything that decides the ids
    bos: int
    eos: int
    pad: int
    pieces: list[bytes]  # bytes each id stands for; none for special tokens

    @property
    def vocab_size(self) -> int: ...
    @property
    def token_bytes(self) -> np.ndarray: ...
    def encode(self, text: str | bytes) -> np.ndarray: ...
    def decode(self, ids: Iterable[int]) -> str: ...


class _Pieces:
    """What follows from `pieces` alone."""

    pieces: list[bytes]

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab]: UTF-8 bytes of each token."""
        return np.array([len(p) for p in self.pieces], np.int32)


class ByteTokenizer(_Pieces):
    """A token per byte; 256 begins a document, 257 ends it, 258 pads."""

    name, bos, eos, pad = "byte", 256, 257, 258
    pieces = [bytes([b]) for b in range(256)] + [b""] * 3
    fingerprint = hashlib.sha256(b"byte: bos 256, eos 257, pad 258").hexdigest()

    def encode(self, text: str | bytes) -> np.ndarray:
        raw = text.encode(errors="replace") if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


@dataclasses.dataclass
class FileTokenizer(_Pieces):
    """A `tokenizer.json`. Special tokens it lacks follow its vocabulary; text never encodes to special tokens."""

    name: str
    backend: Any
    fingerprint: str
    bos: int
    eos: int
    pad: int
    pieces: list[bytes]

    def encode(self, text: str | bytes) -> np.ndarray:
        text = text if isinstance(text, str) else text.decode(errors="replace")
        return np.array(self.backend.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)  # leaves out ids it does not know


class TextStream:
    """Text of tokens as they arrive; the bytes of an unfinished character wait for the rest of it."""

    def __init__(self, tokenizer: Tokenizer):
        self.pieces = tokenizer.pieces
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self.decoder.decode(self.pieces[token])


# Names under which published vocabularies keep their special tokens, in order of preference.
SPECIAL = {
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "<|bos|>", "[BOS]", "[CLS]", "<|endoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "[SEP]", "<|endoftext|>"),
    "pad": ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|padding|>"),
}


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: "byte", or the path of a tokenizer.json.

    Raises:
      ConfigError: no such file, not a tokenizer, or the `tokenizers` library is missing.
    """
    if name == "byte":
        return ByteTokenizer()
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError("data.tokenizer", name, f'expected "byte" or a tokenizer.json file ({reason})') from None
    try:
        import tokenizers
    except ImportError:
        raise ConfigError("data.tokenizer", name, "a tokenizer file needs: pip install hydrax[hf]") from None
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise ConfigError("data.tokenizer", name, f"not a tokenizer.json: {error}") from None
    return _from_backend(name, backend, text)


def _from_backend(name: str, backend: Any, text: str) -> FileTokenizer:
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # "</s>" in a document is text, not the end of it
    vocab = backend.get_vocab(with_added_tokens=True)
    pieces = _token_pieces(backend, vocab, byte_level=_uses_byte_level(json.loads(text)))
    special = {}
    for role, names in SPECIAL.items():
        special[role] = next((vocab[n] for n in names if n in vocab), len(pieces))
        pieces += [b""] * (special[role] == len(pieces))
        pieces[special[role]] = b""
    return FileTokenizer(name, backend, hashlib.sha256(text.encode()).hexdigest(), pieces=pieces, **special)


def _uses_byte_level(description: dict) -> bool:
    parts = [description.get(part) or {} for part in ("pre_tokenizer", "decoder")]
    nested = [p for part in parts for p in part.get("pretokenizers", []) + part.get("decoders", [])]
    return any(part.get("type") == "ByteLevel" for part in parts + nested)


def _token_pieces(backend: Any, vocab: dict[str, int], byte_level: bool) -> list[bytes]:
    """The bytes of every id: through the byte alphabet, from <0xNN>, or what the token adds to decoded text."""
    added = backend.get_added_tokens_decoder()
    alphabet = _byte_alphabet()
    # A token's text depends on being first (a leading space is dropped), so each is decoded after another one.
    anchor = next((i for token, i in vocab.items() if i not in added and token.isalpha()), min(vocab.values()))
    before = len(backend.decode([anchor]))
    pieces = [b""] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        if i in added:
            pieces[i] = b"" if added[i].special else token.encode()
        elif byte_level and all(c in alphabet for c in token):
            pieces[i] = bytes(alphabet[c] for c in token)
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            pieces[i] = bytes([int(token[3:5], 16)])
        else:
            pieces[i] = backend.decode([anchor, i])[before:].encode()
    return pieces


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte: itself where printable, else the next character from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
