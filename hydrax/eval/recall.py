"""Recall-intensive completion (arXiv 2402.18668): a document, the name of a fact in it, and the model says the fact.

Zero-shot and greedy, at most 48 tokens to the end of the line; right if the text contains the value, in whatever case.
Data are local files of JSON Lines, an object per example. Fields by kind, all text:

  fda, swde     text, which ends in the name of a fact and a colon; value; and, to be read twice, key, that name
  squad         text, the beginning of a sentence; value; and, to be read twice, context and question

These are the fields of the published sets based-fda, based-swde-v2 and based-squad. The kinds with `_twice` let the
model read the document after it knows what will be asked (arXiv 2407.05483): fda and swde as
"Information about Key. document\\ndocument Key:", squad as "question context\\ntext".

A prompt that is longer than the model's context loses its beginning, often the answer with it: the share of prompts so
cut is part of the result.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hydrax.core.build import ConfigError
from hydrax.data.landmarks import Landmarks
from hydrax.data.tokenizer import Tokenizer
from hydrax.eval.completion import complete
from hydrax.eval.scoring import Advance
from hydrax.models.lm import LM

NEW_TOKENS = 48
STOP = "\n"

Fields = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Kind:
    fields: tuple[str, ...]  # besides text and value
    prompt: Callable[[Fields], str]  # raises ValueError: what is wrong with the fields


def once(example: Fields) -> str:
    """The document as it is."""
    return example["text"].strip()


def fact_twice(example: Fields) -> str:
    """The document twice, behind what is asked for (arXiv 2407.05483).

    Raises:
      ValueError: the document does not end in the name of the fact.
    """
    text, key = once(example), example["key"].strip()
    name = text[-len(key) - 1 : -1]
    if not key or name.lower() != key.lower() or text[-1] != ":":
        raise ValueError(f"text does not end in {key + ':'!r}")
    document = text[: -len(key) - 1].strip()
    return f"Information about {name}. {document}\n{document} {name}:"


def sentence_twice(example: Fields) -> str:
    """The question, the whole document, and the document up to the answer."""
    return f"{example['question'].strip()} {example['context'].strip()}\n{once(example)}"


KINDS = {
    "fda": Kind((), once),
    "swde": Kind((), once),
    "squad": Kind((), once),
    "fda_twice": Kind(("key",), fact_twice),
    "swde_twice": Kind(("key",), fact_twice),
    "squad_twice": Kind(("question", "context"), sentence_twice),
}


@dataclasses.dataclass(frozen=True)
class Example:
    prompt: str
    value: str


def read(kind: str, path: str, limit: int | None = None) -> list[Example]:
    """The examples of a file, or the first `limit` of them.

    Raises:
      ConfigError: an unknown kind, no such file, or a line that is not such an example.
    """
    key = f"recall:{kind}"
    if kind not in KINDS:
        raise ConfigError("suite", key, f"expected recall:<kind>=<file>, <kind> one of {', '.join(KINDS)}")
    try:
        lines = pathlib.Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(key, path, f"expected a file of JSON Lines ({reason})") from None
    examples: list[Example] = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and (limit is None or len(examples) < limit):
            try:
                examples.append(_example(KINDS[kind], line))
            except ValueError as error:
                raise ConfigError(key, path, f"line {number}: {error}") from None
    if not examples:
        raise ConfigError(key, path, "expected at least one example")
    return examples


def evaluate(
    model: LM,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    context: int,
    *,
    tokens_at_once: int = 2**14,
    advance: Advance | None = None,
    landmarks: Landmarks | None = None,
) -> dict[str, Any]:
    """The share of examples whose completion contains the value, and those shares that limit it.

    Args:
      context: tokens the model reads and writes at most.

    Raises:
      ConfigError: a context that leaves no room for a prompt.
    """
    room = context - NEW_TOKENS
    if room < 1:
        raise ConfigError("context", context, f"expected more than the {NEW_TOKENS} tokens of an answer")
    prompts = [tokenizer.encode(example.prompt) for example in examples]
    texts = complete(
        model,
        tokenizer,
        [prompt[-room:] for prompt in prompts],
        max_new_tokens=NEW_TOKENS,
        stops=(STOP,),
        tokens_at_once=tokens_at_once,
        advance=advance,
        landmarks=landmarks,
    )
    right = [contains(text, example.value) for text, example in zip(texts, examples, strict=True)]
    n = len(examples)
    return {
        "contains": float(np.mean(right)),
        "stderr": float(np.std(right, ddof=1) / np.sqrt(n)) if n > 1 else None,
        "examples": n,
        "truncated": float(np.mean([len(prompt) > room for prompt in prompts])),
        "too_long": float(np.mean([len(tokenizer.encode(e.value)) > NEW_TOKENS for e in examples])),
        "context": context,
        "completions": texts,
    }


def contains(text: str, value: str) -> bool:
    return value.lower() in text.lower()


def _example(kind: Kind, line: str) -> Example:
    names = ("text", "value", *kind.fields)
    try:
        fields = json.loads(line)
        good = all(isinstance(fields[name], str) and fields[name].strip() for name in names)
    except (ValueError, TypeError, KeyError):
        good = False
    if not good:
        raise ValueError(f"expected an object with the fields {', '.join(names)}, text that is not empty")
    return Example(kind.prompt(fields), fields["value"].strip())
