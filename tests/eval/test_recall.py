"""Completions are step-by-step greedy decoding up to a stop; recall counts what contains the value."""

import json

import numpy as np
import pytest

import hydrax
from hydrax.core.build import ConfigError
from hydrax.data.tokenizer import ByteTokenizer
from hydrax.eval import completion, recall
from hydrax.eval.completion import complete, until
from tests.eval import small

TOKENIZER = ByteTokenizer()
FACT = {"text": "The device is called Alpha. It is blue.\nName:", "value": "Alpha", "key": "name"}
SENTENCE = {"text": "The capital is", "value": "Oslo", "context": "Oslo is large.", "question": "Which city?"}


@pytest.fixture(scope="module")
def model():
    return small.model(pattern="gla")


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(97, 123, n).astype(np.int32) for n in (5, 20, 1, 16)]


@pytest.fixture(scope="module")
def alone(model, prompts):
    """The definition: each prompt by itself, token by token."""
    return [hydrax.generate(model, p[None], max_new_tokens=8, temperature=0)[0].tolist() for p in prompts]


@pytest.mark.parametrize("tokens_at_once", [32, 64])
def test_completions_are_step_by_step_decoding(model, prompts, alone, tokens_at_once):
    done = []
    texts = complete(model, TOKENIZER, prompts, max_new_tokens=8, tokens_at_once=tokens_at_once, advance=done.append)
    ends = [ids.index(TOKENIZER.eos) if TOKENIZER.eos in ids else 8 for ids in alone]
    assert texts == [TOKENIZER.decode(ids[:end]) for ids, end in zip(alone, ends, strict=True)]
    assert len(set(texts)) > 2 and sum(done) == len(prompts)


def saying(monkeypatch, *texts):
    """Makes the model say these texts, one per row, and counts the tokens that were asked of it."""
    asked = []

    def stream(model, tokens, *, max_new_tokens, lengths, **settings):
        rows = [list(text.encode()) + [TOKENIZER.eos] * max_new_tokens for text in texts]
        rows += [[0] * max_new_tokens] * (len(tokens) - len(rows))
        for step in range(max_new_tokens):
            asked.append(step)
            yield np.array([row[step] for row in rows])

    monkeypatch.setattr(completion, "stream", stream)
    return asked


def test_a_row_ends_at_its_first_stop_or_the_end_of_the_document(monkeypatch):
    asked = saying(monkeypatch, "one; two. three", "four. five; six", "seven")
    prompts = [np.array([97])] * 3
    assert complete(None, TOKENIZER, prompts, max_new_tokens=40, stops=("; ", ". ")) == ["one", "four", "seven"]
    assert len(asked) == 6  # "four. " has six bytes, and no other row needs more


def test_without_stops_the_tokens_run_out(monkeypatch):
    saying(monkeypatch, "one; two", "three")
    assert complete(None, TOKENIZER, [np.array([97])] * 2, max_new_tokens=5) == ["one; ", "three"]


def test_the_first_stop_counts():
    assert until("a b\nc", ("\n", " ")) == "a"
    assert until("a b", ()) == until("a b", ("c",)) == "a b"
    assert until("\na", ("\n",)) == ""


def test_prompts():
    assert recall.KINDS["fda"].prompt(FACT) == FACT["text"]
    document = "The device is called Alpha. It is blue."
    assert recall.KINDS["swde_twice"].prompt(FACT) == f"Information about Name. {document}\n{document} Name:"
    assert recall.KINDS["squad_twice"].prompt(SENTENCE) == "Which city? Oslo is large.\nThe capital is"


def write(path, *examples):
    path.write_text("\n".join(json.dumps(e) if isinstance(e, dict) else e for e in examples) + "\n")
    return str(path)


def test_answers_that_contain_the_value_are_right(monkeypatch, tmp_path):
    examples = recall.read("fda", write(tmp_path / "fda.jsonl", FACT, FACT, "", {**FACT, "value": "x" * 50}))
    assert len(examples) == 3
    saying(monkeypatch, " it is ALPHA, no\nmore", " beta\nalpha", "x" * 60)
    found = recall.evaluate(None, TOKENIZER, examples, 90)
    assert (found["contains"], found["examples"]) == (pytest.approx(1 / 3), 3)
    assert found["completions"] == [" it is ALPHA, no", " beta", "x" * 48]
    assert (found["truncated"], found["too_long"]) == (1.0, pytest.approx(1 / 3))
    assert recall.read("fda", str(tmp_path / "fda.jsonl"), 1) == examples[:1]


def test_what_does_not_fit_is_cut_from_the_left(monkeypatch, tmp_path):
    read = []
    monkeypatch.setattr(recall, "complete", lambda model, tokenizer, prompts, **_: read.extend(prompts) or ["", ""])
    examples = [recall.Example("0123456789", "x"), recall.Example("abc", "x")]
    found = recall.evaluate(None, TOKENIZER, examples, recall.NEW_TOKENS + 4)
    assert [bytes(p.astype(np.uint8)) for p in read] == [b"6789", b"abc"]
    assert found["truncated"] == 0.5
    with pytest.raises(ConfigError, match="context = 48: expected more than the 48 tokens of an answer"):
        recall.evaluate(None, TOKENIZER, examples, recall.NEW_TOKENS)


def test_a_model_answers_from_a_file(model, tmp_path):
    examples = recall.read("squad", write(tmp_path / "squad.jsonl", SENTENCE, FACT))
    found = recall.evaluate(model, TOKENIZER, examples, 128, tokens_at_once=64)
    assert 0 <= found["contains"] <= 1 and found["truncated"] == 0
    direct = hydrax.generate(model, TOKENIZER.encode(SENTENCE["text"])[None], max_new_tokens=48, temperature=0)[0]
    end = next((i for i, t in enumerate(direct) if t in (TOKENIZER.eos, ord("\n"))), 48)
    assert found["completions"][0] == TOKENIZER.decode(direct[:end])


@pytest.mark.parametrize(
    ("kind", "lines", "message"),
    [
        ("fad", [FACT], r"suite = 'recall:fad': expected recall:<kind>=<file>, <kind> one of fda, "),
        ("fda", [FACT, "{text"], r"recall:fda = '.*': line 2: expected an object with the fields text, value, text"),
        ("fda", [[]], r"line 1: expected an object"),
        ("fda_twice", [{"text": "a:", "value": "b"}], r"line 1: expected an object with the fields text, value, key"),
        ("swde_twice", [{**FACT, "key": "colour"}], r"line 1: text does not end in 'colour:'"),
        ("squad", [{"text": "a", "value": " "}], r"text that is not empty"),
        ("squad", [""], r"expected at least one example"),
    ],
)
def test_files_that_are_no_examples_are_refused(kind, lines, message, tmp_path):
    path = write(tmp_path / "x.jsonl", *(str(x) if isinstance(x, list) else x for x in lines))
    with pytest.raises(ConfigError, match=message):
        recall.read(kind, path)
    with pytest.raises(ConfigError, match=r"expected a file of JSON Lines \(No such file"):
        recall.read("fda", str(tmp_path / "none"))
