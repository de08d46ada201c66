import itertools
import re

import numpy as np
import pytest

from hydrax.core.build import ConfigError, build
from hydrax.tasks.babilong import FACTS, LEFT, MOVED, PEOPLE, ROOMS, THINGS, TOOK, BabiLong, story
from tests.tasks.reading import draw, texts

VERB = {verb: kind for kind, verbs in (("move", MOVED), ("take", TOOK), ("leave", LEFT)) for verb in verbs}
FACT = re.compile(rf"({'|'.join(PEOPLE)}) ({'|'.join(VERB)}) the ({'|'.join(ROOMS + THINGS)})\.")


def read(context, question):
    """Retell the story: the trails of all people and things, then the question. Also checks that it can be told."""
    place, held, trail = {}, {}, {thing: [] for thing in THINGS}
    for who, verb, what in FACT.findall(context):
        if VERB[verb] == "move":
            assert place.get(who) != what
            place[who] = what
            for thing, holder in held.items():
                if holder == who:
                    trail[thing].append(what)
        elif VERB[verb] == "take":
            assert what not in held and (not trail[what] or trail[what][-1] == place[who])
            held[what] = who
            trail[what].append(place[who])
        else:
            assert held.pop(what) == who
    trail = {thing: [r for i, r in enumerate(rooms) if i == 0 or r != rooms[i - 1]] for thing, rooms in trail.items()}
    if match := re.fullmatch(r"Where was the (\w+) before the (\w+)\? ", question):
        thing, after = match.groups()
        assert trail[thing].count(after) == 1
        return trail[thing][trail[thing].index(after) - 1]
    if match := re.fullmatch(r"Where is the (\w+)\? ", question):
        return trail[match[1]][-1]
    return place[re.fullmatch(r"Where is (\w+)\? ", question)[1]]


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("question", FACTS)
def test_answers_follow_from_the_story(question, split):
    task = BabiLong(question=question)
    sample = draw(task, 60, split)
    answers = set()
    for (context, asked, answer), references in zip(texts(sample), sample["meta"]["references"], strict=True):
        assert read(context, asked) + "." == answer and references.tolist() == [answer[:-1].encode()]
        assert FACTS[question][0] <= len(FACT.findall(context)) <= FACTS[question][1]
        assert len(answer) <= task.budget
        answers.add(answer)
    assert len(answers) == len(ROOMS)


def test_histories_have_a_room_once_at_a_time_and_the_fact_that_says_so():
    rng = np.random.default_rng(0)
    for _ in range(50):
        told, people, things = story(rng, 24)
        assert len(told) == 24
        for history in [*people.values(), *things.values()]:
            for before, after in itertools.pairwise(history):
                assert before.room != after.room and before.fact < after.fact
        for name, history in people.items():
            assert all(told[known.fact].startswith(name) and known.room in told[known.fact] for known in history)


def test_the_first_sentence_counts():
    task = BabiLong()
    assert task.score("In the Kitchen. Not the office", [b"kitchen"]) == 1
    assert task.score("The office. No, the kitchen.", [b"kitchen"]) == 0


def test_depth_is_that_of_the_fact_that_decides():
    sample = draw(BabiLong(eval_factors=(2,)), 100, "eval")
    for (context, question, answer), depth in zip(texts(sample), sample["meta"]["depth"], strict=True):
        name = re.fullmatch(r"Where is (\w+)\? ", question)[1]
        at = [m.start() for m in re.finditer(rf"{name} [\w ]+ the {answer}", context)][-1]
        assert abs(at / len(context) - depth) < 0.2
    assert len(np.unique(sample["meta"]["slice"])) > 5


@pytest.mark.parametrize("question", FACTS)
def test_the_shortest_rows_hold_every_story(question):
    least = BabiLong(question=question).least
    draw(BabiLong(question=question, length=least, eval_factors=(1,)), 100)


def test_rooms_are_about_equally_likely():
    answers = np.unique(draw(BabiLong(question="qa2"), 1200)["meta"]["answer"], return_counts=True)[1]
    assert abs(answers - 200).max() < 5 * 200**0.5


@pytest.mark.parametrize(
    ("options", "key"),
    [({"length": 100}, "length"), ({"question": "qa4"}, "question"), ({"essay": ("/nowhere.txt",)}, "essay")],
)
def test_bad_options_are_one_line(options, key):
    with pytest.raises(ConfigError, match=f"^{key} = .*expected.*$") as error:
        build(BabiLong, options)
    assert "\n" not in str(error.value)
