import dataclasses
import re
from collections import Counter

import numpy as np
import pytest

from hydrax.core.build import ConfigError, build
from hydrax.tasks.ruler import VARIANTS, CommonWords, FrequentWords, Needle, Variables
from tests.tasks.reading import draw, right, texts


def needles(context, question):
    pairs = re.findall(r"([\w-]+) -> (\w+)\.", context)
    return [value for asked in question.removesuffix(" -> ").split(", ") for key, value in pairs if key == asked]


def variables(context, question):
    (value,) = re.findall(r"\d+", question)
    names, known = [], {}
    for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", context):
        known[name] = known.get(source, source)
        names += [name] if known[name] == value else []
    return names


def common(context, question):
    listed = re.findall(r"(\d+)\. (\w+)", context)
    assert [int(i) for i, _ in listed] == list(range(1, len(listed) + 1))
    words = [word for _, word in listed]
    counts = Counter(words)
    most = {word for word, _ in counts.most_common(10)}
    assert {counts[word] for word in most} == {max(counts.values())}
    return [word for word in dict.fromkeys(words) if word in most]


def frequent(context, question):
    counts = Counter(context.split())
    (dots, first), *rest = counts.most_common(5)
    assert dots == "..." and first > rest[0][1] > rest[1][1] > rest[2][1] > rest[3][1]
    return [word for word, _ in rest[:3]]


CASES = [
    *((Needle(variant=name), needles) for name in VARIANTS),
    (Variables(), variables),
    (Variables(chains=3, hops=2), variables),
    (CommonWords(), common),
    (FrequentWords(), frequent),
]
IDS = [getattr(task, "variant", type(task).__name__) for task, _ in CASES]


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize(("task", "read"), CASES, ids=IDS)
def test_answers_follow_from_the_text(task, read, split):
    sample = draw(task, 24, split)
    for (context, question, answer), references in zip(texts(sample), sample["meta"]["references"], strict=True):
        assert answer.split() == read(context, question) == [reference.decode() for reference in references]
        assert len(answer) <= task.budget
        assert task.score(f"It is {answer.upper()}!", references) == 1 and task.score("none", references) == 0


@pytest.mark.parametrize(("task", "read"), CASES, ids=IDS)
def test_rows_are_nearly_as_long_as_they_may_be(task, read):
    sample = draw(task, 40, "eval")
    used = (sample["inputs"] != 256).sum(1)
    limit = np.array([int(re.match(r"length=(\d+)", name)[1]) for name in task.slices])[sample["meta"]["slice"]]
    assert (used <= limit).all()
    assert (used > limit - 260).all()  # less than one sentence or needle more


@pytest.mark.parametrize("name", ["single_1", "single_2", "multikey_1", "multikey_2"])
def test_depths_are_uniform_in_every_length(name):
    task = Needle(variant=name, length=256, eval_factors=(4, 8))
    sample = draw(task, 800, "eval")
    counts = np.bincount(sample["meta"]["slice"], minlength=20)
    assert task.slices[:2] == ("length=1024,depth=0-10%", "length=1024,depth=10-20%")
    assert task.slices[-1] == "length=2048,depth=90-100%"
    assert len(counts) == 20 and counts.sum() == 800
    # Places in so few sentences are coarse: bins are even up to a few places more or less.
    assert counts.min() > 12 and counts.max() < 80
    for (context, question, _), depth in zip(texts(sample), sample["meta"]["depth"], strict=True):
        sentences = re.split(r"(?<=\.) ", context)
        pairs = [s for s in sentences if re.fullmatch(r"[\w-]+ -> \w+\.", s)]
        at = next(i for i, s in enumerate(sentences) if s.startswith(question.removesuffix(" ")))
        if name == "multikey_2":
            assert abs(depth - at / len(sentences)) < 1e-9
        else:
            before = sum(s in pairs for s in sentences[:at])
            assert abs(depth - (at - before) / (len(sentences) - len(pairs))) < 0.05


def test_training_rows_have_all_lengths():
    used = (draw(FrequentWords(length=800, min_length=400), 2000)["inputs"] != 256).sum(1)
    counts = np.histogram(used, 4, (392, 800))[0]
    assert counts.sum() == 2000 and abs(counts - 500).max() < 5 * 500**0.5
    assert (draw(Needle(length=200), 200)["inputs"] != 256).sum(1).min() < 120


def test_all_needles_of_a_haystack_have_different_keys():
    for context, _, _ in texts(draw(Needle(variant="multikey_2", length=1024), 8, "eval")):
        keys = re.findall(r"([\w-]+) ->", context)
        assert len(keys) == len(set(keys)) > 30


def test_common_words_come_ten_times_as_often():
    for context, _, _ in texts(draw(CommonWords(length=8192, eval_factors=(1,)), 2, "eval")):
        assert set(Counter(re.findall(r"[a-z]+", context)).values()) == {30, 3}
    for context, _, _ in texts(draw(CommonWords(), 4)):
        assert set(Counter(re.findall(r"[a-z]+", context)).values()) == {6, 1}


def test_frequent_words_fall_with_the_square_of_their_rank():
    (context, _, _) = next(texts(draw(FrequentWords(length=8192, eval_factors=(1,)), 1, "eval")))
    counts = np.array([count for _, count in Counter(context.split()).most_common(6)])
    assert abs(counts / counts[0] * np.arange(1, 7) ** 2 - 1).max() < 0.1


def test_a_guess_of_digits_is_worth_a_tenth():
    sample = draw(Needle(), 500)
    guess = np.random.default_rng(1).integers(ord("0"), ord("9") + 1, sample["targets"].shape)
    assert abs(right(sample, guess) - 0.1) < 0.02


@pytest.mark.parametrize(
    ("cls", "options", "key"),
    [
        (Needle, {"length": 50}, "length"),
        (Needle, {"variant": "multikey_2", "length": 100_000}, "length"),
        (Needle, {"min_length": 1000}, "min_length"),
        (Needle, {"variant": "single_9"}, "variant"),
        (Needle, {"eval_factors": (2, 2)}, "eval_factors"),
        (Needle, {"variant": "single_2", "essay": ("/nowhere.txt",)}, "essay"),
        (Variables, {"hops": 0}, "hops"),
        (CommonWords, {"length": 512}, "length"),
        (FrequentWords, {"length": 200}, "length"),
    ],
)
def test_bad_options_are_one_line(cls, options, key):
    with pytest.raises(ConfigError, match=f"^{key} = .*expected.*$") as error:
        build(cls, options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", [task for task, _ in CASES], ids=IDS)
def test_the_shortest_rows_hold_every_example(task):
    draw(dataclasses.replace(task, length=task.least, eval_factors=(1,)), 50)
