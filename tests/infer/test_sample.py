"""Generation equals choosing from the full forward pass, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hydrax
from hydrax.core.build import ConfigError
from hydrax.data.tokenizer import ByteTokenizer
from hydrax.infer import sample

N = 6


@pytest.fixture(scope="module")
def model():
    lm = hydrax.build(
        {"d_model": 32, "pattern": "gla,swa", "mixers": {"gla": {"heads": 2}, "swa": {"heads": 2, "window": 4}}}, seed=1
    )
    lm.embed.weight[...] *= 10  # so that a token follows from the others and not from itself
    return lm


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(0).integers(0, 256, (3, 7))


@pytest.fixture(scope="module")
def greedy(model):
    """The definition: the most likely token of the full pass, appended."""
    forward = jax.jit(lambda row: model(row[None])[0])

    def continuation(prompt):
        row = np.zeros(7 + N, np.int32)  # what lies behind a token does not reach it
        row[: len(prompt)] = prompt
        for i in range(len(prompt), len(prompt) + N):
            row[i] = forward(row)[i - 1].argmax()
        return row[len(prompt) : len(prompt) + N]

    return continuation


def test_temperature_zero_is_the_argmax_of_the_full_pass(model, prompts, greedy):
    made = hydrax.generate(model, prompts, max_new_tokens=N, temperature=0)
    assert made.shape == (3, N)
    assert made.dtype == np.int32
    np.testing.assert_array_equal(made, [greedy(p) for p in prompts])
    assert len(np.unique(made)) > 3, "a degenerate model would pass anything"


def test_rows_of_different_length_do_not_see_their_padding(model, prompts, greedy):
    made = hydrax.generate(model, prompts, max_new_tokens=N, temperature=0, lengths=[7, 1, 4])
    for row, prompt, length in zip(made, prompts, [7, 1, 4], strict=True):
        np.testing.assert_array_equal(row, greedy(prompt[:length]))


def test_a_seed_repeats_and_another_differs(model, prompts):
    first, second, other = (hydrax.generate(model, prompts, max_new_tokens=N, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_changing_the_settings_compiles_nothing(model, prompts):
    hydrax.generate(model, prompts, max_new_tokens=N)
    before = sample._step._cache_size(), sample._prefill._cache_size()
    hydrax.generate(model, prompts, max_new_tokens=N, temperature=0, top_p=0.5, seed=9)
    assert before == (sample._step._cache_size(), sample._prefill._cache_size())


def test_a_row_that_has_stopped_goes_on_with_stop(model, prompts):
    plain = hydrax.generate(model, prompts, max_new_tokens=N, temperature=0)
    stop = int(plain[0, 1])
    made = hydrax.generate(model, prompts, max_new_tokens=N, temperature=0, stop=stop)
    for row, full in zip(made, plain, strict=True):
        end = list(full).index(stop) if stop in full else N
        np.testing.assert_array_equal(row, [*full[: end + 1], *[stop] * N][:N])


def test_the_stream_ends_when_all_rows_have_stopped(model, prompts):
    stop = int(hydrax.generate(model, prompts[:1], max_new_tokens=1, temperature=0)[0, 0])
    assert len(list(sample.stream(model, prompts[:1], max_new_tokens=N, temperature=0, stop=stop))) == 1
    made = hydrax.generate(model, prompts[:1], max_new_tokens=N, temperature=0, stop=stop)
    np.testing.assert_array_equal(made, [[stop] * N])


def draws(logits, temperature, top_p, count=4000):
    keys = jax.random.split(jax.random.key(0), count)
    rows = jax.jit(jax.vmap(lambda key: sample._choose(logits, (temperature, top_p), key)))(keys)
    return np.bincount(np.asarray(rows)[:, 0], minlength=logits.shape[1]) / count


def test_frequencies_are_the_softmax_at_that_temperature():
    logits = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4]]))
    np.testing.assert_allclose(draws(logits, 1.0, 1.0), [0.1, 0.2, 0.3, 0.4], atol=0.03)
    np.testing.assert_allclose(draws(logits, 0.5, 1.0), np.array([1, 4, 9, 16]) / 30, atol=0.03)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.3, [0, 0, 0, 1]), (0.5, [0, 0, 3 / 7, 4 / 7]), (0.8, [0, 2 / 9, 3 / 9, 4 / 9]), (1e-9, [0, 0, 0, 1])],
)
def test_the_nucleus_is_the_smallest_set_of_that_mass(top_p, expected):
    logits = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4]]))
    np.testing.assert_allclose(draws(logits, 1.0, top_p), expected, atol=0.03)


def test_masked_entries_are_never_drawn():
    logits = jnp.array([[0.0, 0.0, -1e30, -1e30]])
    assert draws(logits, 1e-9, 1.0)[2:].sum() == 0
    assert draws(logits, 100.0, 1.0)[2:].sum() == 0


def test_text_comes_in_whole_characters(model, monkeypatch):
    tokenizer = ByteTokenizer()
    ids = [*"a€😀".encode(), tokenizer.eos, *b"never"]
    monkeypatch.setattr(sample, "stream", lambda *args, **kwargs: (np.array([i]) for i in ids))
    pieces = sample.stream_text(model, tokenizer, "", tokens=99, temperature=1, top_p=1, seed=0)
    assert list(pieces) == ["a", "€", "😀"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -0.1}, r"temperature = -0\.1: expected a number >= 0"),
        ({"temperature": float("nan")}, r"temperature = nan"),
        ({"top_p": 0}, r"top_p = 0: expected a number above 0 and at most 1"),
        ({"top_p": 1.1}, r"top_p = 1\.1"),
        ({"max_new_tokens": 0}, r"max_new_tokens = 0: expected an integer >= 1"),
        ({"tokens": np.zeros((1, 0), int)}, r"tokens = \(1, 0\): expected prompts \[B,T\] of at least one token"),
        ({"tokens": np.zeros(3, int)}, r"tokens = \(3,\): expected prompts"),
        ({"lengths": [0]}, r"lengths = \[0\]: expected a length from 1 to 2 for each of the 1 rows"),
        ({"lengths": [3]}, r"lengths = \[3\]"),
        ({"lengths": [1, 1]}, r"lengths = \[1, 1\]"),
    ],
)
def test_values_out_of_range_are_refused(model, change, message):
    arguments = {"tokens": np.zeros((1, 2), int), "max_new_tokens": 1, **change}
    with pytest.raises(ConfigError, match=message):
        hydrax.generate(model, **arguments)
    with pytest.raises(ConfigError, match=message):  # when the stream is made, not when it is first read
        sample.stream(model, **arguments)
