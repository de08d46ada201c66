"""The adapter's log-likelihoods are sums of a direct pass, its generation is decoding, and local tasks run offline."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hydrax
from hydrax.core.build import ConfigError
from hydrax.data.tokenizer import ByteTokenizer
from hydrax.eval import completion
from tests.eval import small

harness = pytest.importorskip("hydrax.eval.harness", reason="needs the extra eval", exc_type=ImportError)

TOKENIZER = ByteTokenizer()
LONGEST = 32


def asked(*args):
    return types.SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def model():
    return small.model(pattern="gla")


@pytest.fixture(scope="module")
def log_p(model):
    """log p of the next token after every token of a text."""
    forward = jax.jit(lambda row: jax.nn.log_softmax(model(row[None])[0]))
    return lambda ids: np.asarray(forward(jnp.asarray([*ids, *[0] * (96 - len(ids))])))[: len(ids)]


def adapter(model, tokens_at_once=64, **options):
    return harness.HydraxLM(model, TOKENIZER, max_length=LONGEST, tokens_at_once=tokens_at_once, **options)


def random_text(rng, length):
    return bytes(rng.integers(97, 123, length).astype(np.uint8)).decode()


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    sizes = [(3, 1), (10, 7), (1, 20), (25, 20), (0, 5), (40, 12)]
    return [(random_text(rng, a), random_text(rng, b)) for a, b in sizes]


def test_log_likelihoods_are_those_of_a_direct_pass(model, log_p, pairs):
    found = adapter(model).loglikelihood([asked(*pair) for pair in pairs])
    for (context, rest), (value, greedy) in zip(pairs, found, strict=True):
        before, after = list(context.encode()) or [TOKENIZER.bos], list(rest.encode())
        kept = (before + after)[-(LONGEST + 1) :]
        log = log_p(kept[:-1])[-len(after) :]
        np.testing.assert_allclose(value, log[np.arange(len(after)), after].sum(), atol=1e-4)
        assert greedy == (log.argmax(1) == after).all()


def test_a_greedy_continuation_is_known_as_one(model):
    context = "a hybrid"
    made = hydrax.generate(model, TOKENIZER.encode(context)[None], max_new_tokens=4, temperature=0)[0].tolist()
    other = [*made[:-1], (made[-1] + 1) % 256]
    found = adapter(model)._loglikelihood_tokens([(None, list(context.encode()), ids) for ids in (made, other)])
    assert [greedy for _, greedy in found] == [True, False]


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(model):
    lm = adapter(model)
    (moved,), (given,) = (lm.loglikelihood([asked(*pair)]) for pair in (("one ", "two"), ("one", " two")))
    assert moved == given


@pytest.mark.parametrize("tokens_at_once", [16, 512])
def test_batches_and_buckets_do_not_matter(model, pairs, tokens_at_once, monkeypatch):
    requests = [asked(*pair) for pair in pairs]
    expected = adapter(model).loglikelihood(requests)
    monkeypatch.setattr("hydrax.eval.scoring.SHORTEST", 16 if tokens_at_once == 16 else 64)
    found = adapter(model, tokens_at_once).loglikelihood(requests[::-1])[::-1]
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in expected], atol=1e-4)


def test_a_short_text_rolls_in_one_window(model, log_p):
    texts = [random_text(np.random.default_rng(1), n) for n in (LONGEST, 5, 1)]
    for text, value in zip(texts, adapter(model).loglikelihood_rolling([asked(t) for t in texts]), strict=True):
        ids = list(text.encode())
        log = log_p([TOKENIZER.bos, *ids[:-1]])
        np.testing.assert_allclose(value, log[np.arange(len(ids)), ids].sum(), atol=1e-4)


def test_a_long_text_rolls_in_windows_that_share_no_prediction(model, log_p):
    text = random_text(np.random.default_rng(2), 2 * LONGEST + 5)
    (value,) = adapter(model).loglikelihood_rolling([asked(text)])
    ids, total = [TOKENIZER.bos, *text.encode()], 0.0
    # Full windows, and one for the rest that reaches back for a full context.
    for new, end in ((0, LONGEST), (LONGEST, 2 * LONGEST), (2 * LONGEST, 2 * LONGEST + 5)):
        start = end - LONGEST
        log = log_p(ids[start:end])
        total += sum(log[t - start, ids[t + 1]] for t in range(new, end))
    np.testing.assert_allclose(value, total, atol=1e-4)
    assert adapter(model).loglikelihood_rolling([asked("")]) == [0.0]


def test_generation_is_step_by_step_decoding(model):
    contexts = ["a hybrid", "x", ""]
    found = adapter(model).generate_until([asked(c, {"until": [], "max_gen_toks": 6}) for c in contexts])
    for context, text in zip(contexts, found, strict=True):
        start = TOKENIZER.encode(context) if context else np.array([TOKENIZER.bos])
        ids = hydrax.generate(model, start[None], max_new_tokens=6, temperature=0)[0].tolist()
        assert text == TOKENIZER.decode(ids[: ids.index(TOKENIZER.eos)] if TOKENIZER.eos in ids else ids)


@pytest.fixture
def prompts(monkeypatch):
    """The prompts of a model that says "one. two; three" to everything."""
    seen = []

    def stream(model, tokens, *, max_new_tokens, lengths, temperature, **_):
        seen.append([bytes(row[:n].astype(np.uint8)) for row, n in zip(tokens, lengths, strict=True)])
        for byte in b"one. two; three"[:max_new_tokens]:
            yield np.full(len(tokens), byte)

    monkeypatch.setattr(completion, "stream", stream)
    return seen


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"until": "; "}, "one. two"),
        ({"until": ["; ", "."]}, "one"),
        ({"until": ["?"], "max_gen_toks": 8}, "one. two"),
        ({"until": "", "max_gen_toks": 3}, "one"),
        ({"max_new_tokens": 4, "do_sample": False, "temperature": 0.5}, "one."),
    ],
)
def test_stops_are_respected(model, prompts, options, expected):
    lm = adapter(model, max_gen_toks=20)
    assert lm.generate_until([asked("why", options), asked("who", {"until": [" "]})]) == [expected, "one."]


def test_long_contexts_lose_their_beginning(model, prompts):
    lm = adapter(model, tokens_at_once=32)
    lm.generate_until([asked("x" * 40 + "end", {"until": ["."], "max_gen_toks": 20})])
    assert prompts == [[b"x" * 9 + b"end"]]
    with pytest.raises(ConfigError, match=r"max_length = 32: expected more than the 256 tokens that a task wants"):
        lm.generate_until([asked("x", {"until": ["."]})])


COMMON = "dataset_path: json\ndataset_kwargs: {data_files: {test: DATA}}\ntest_split: test\n"
TASKS = {
    "choose": 'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_target: label\ndoc_to_choice: ["yes", "no"]\n'
    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    "say": 'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
    'generation_kwargs: {until: [" "], max_gen_toks: 8}\n'
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
    "roll": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{q}}"\n'
    "metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]\n",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a local task of each kind; nothing is cached outside of the tests."""
    import datasets

    tmp_path = tmp_path_factory.mktemp("harness")
    rows = [{"q": f"question {i}", "a": "one.", "label": i % 2} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in TASKS.items():
        written = f"task: local_{name}\n" + COMMON.replace("DATA", str(tmp_path / "data.jsonl")) + text
        (folder / f"{name}.yaml").write_text(written)
    (folder / "gone.yaml").write_text(
        "task: local_gone\n" + COMMON.replace("DATA", str(tmp_path / "none")) + TASKS["roll"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield str(folder)


def test_local_tasks_run_offline(model, log_p, tasks, prompts):
    lm = adapter(model)
    chosen = harness.run(lm, "local_choose", include=tasks)["local_choose"]
    right = []
    for i in range(4):
        scores = []
        for answer in (" yes", " no"):
            ids, rest = list(f"question {i}".encode()), list(answer.encode())
            log = log_p([*ids, *rest][:-1])[-len(rest) :]
            scores.append(log[np.arange(len(rest)), rest].sum())
        right.append(np.argmax(scores) == i % 2)
    assert chosen["acc"] == np.mean(right)
    np.testing.assert_allclose(chosen["acc_stderr"], np.std(right, ddof=1) / 2)

    assert harness.run(lm, "local_say", include=tasks) == {"local_say": {"exact_match": 1.0, "exact_match_stderr": 0.0}}

    rolled = harness.run(lm, "local_roll", include=tasks, limit=1)["local_roll"]["bits_per_byte"]
    (nats,) = lm.loglikelihood_rolling([asked("question 0")])
    np.testing.assert_allclose(rolled, -nats / np.log(2) / len("question 0"), rtol=1e-5)


def test_what_is_no_task_is_refused(model, tasks, monkeypatch):
    few = lambda include: harness.TaskManager(include_path=include, include_defaults=False)  # noqa: E731
    monkeypatch.setattr(harness, "_with_defaults", few)  # all take many seconds to read
    lm = adapter(model)
    with pytest.raises(ConfigError, match=r"suite = 'lm_eval:local_chose': did you mean .*local_choose"):
        harness.run(lm, "local_chose", include=tasks)
    with pytest.raises(ConfigError, match=r"suite = 'lm_eval:local_gone': its data cannot be read"):
        harness.run(lm, "local_gone", include=tasks)
    with pytest.raises(ConfigError, match=r"include = 'nowhere': expected a folder of tasks"):
        harness.run(lm, "local_roll", include="nowhere")
