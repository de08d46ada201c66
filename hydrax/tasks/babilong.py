"""BABILong in bytes (arXiv 2406.10149): facts of a small world, in order among sentences about other things.

People walk between rooms, take things that lie there and put them down. The kinds of question are those of the first
three bAbI tasks, which need one, two and three of the facts:

    qa1  Where is Mary?                          the room she last went to
    qa2  Where is the milk?                      the room in which it was last taken, carried to or put down
    qa3  Where was the milk before the office?   the room it was in before that one

The answer is a sentence of one word; a generated text is right if its first sentence holds that word.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from hydrax.core.build import Positive
from hydrax.tasks import haystack
from hydrax.tasks.text import Example, TextTask, score

PEOPLE = ("Mary", "John", "Daniel", "Sandra")
ROOMS = ("kitchen", "bathroom", "bedroom", "garden", "hallway", "office")
THINGS = ("apple", "football", "milk")
MOVED = ("moved to", "went to", "journeyed to", "travelled to", "went back to")
TOOK = ("took", "got", "picked up", "grabbed")
LEFT = ("put down", "dropped", "left", "discarded")
FACT = len("Sandra journeyed to the bathroom. ")  # bytes of the longest
QUESTION = len("Where was the football before the bathroom? ") + len("bathroom.")

FACTS: Mapping[str, tuple[int, int]] = {"qa1": (2, 10), "qa2": (4, 16), "qa3": (8, 24)}  # facts of a story, at most


class Known(NamedTuple):
    """That something came to be in a room, and the number of the fact which says so."""

    room: str
    fact: int


@dataclasses.dataclass(frozen=True)
class BabiLong(TextTask):
    """A story of uniform length in a text of which the other sentences have nothing to do with it.

    The depth is that of the last fact which the answer needs.

    Attributes:
      essay: paths of the text files that the other sentences are from; none: the standard library's documentation.
    """

    length: Positive = 1024
    question: Literal["qa1", "qa2", "qa3"] = "qa1"
    essay: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        haystack.essay(self.essay, self.longest)  # files are read now, so that they fail now

    @property
    def budget(self) -> int:
        return max(map(len, ROOMS)) + 1

    def labels(self, split: str) -> int:
        return self.budget

    @property
    def least(self) -> int:
        return 1 + FACTS[self.question][1] * FACT + QUESTION

    def score(self, text: str, references: Iterable[bytes]) -> float:
        return score(text.split(".")[0], references)

    def example(self, rng: np.random.Generator, room: int) -> Example:
        least, most = FACTS[self.question]
        asked = None
        while asked is None:  # few stories answer no question at all
            facts, people, things = story(rng, int(rng.integers(least, most, endpoint=True)))
            asked = ASK[self.question](rng, people, things)
        question, answer, fact = asked
        hay = haystack.essay(self.essay, self.longest)
        left = room - 1 - QUESTION
        context, depths = hay.around(rng, [f.encode() for f in facts], np.sort(rng.random(len(facts))), left)
        return Example(context, question.encode(), f"{answer}.".encode(), (answer.encode(),), float(depths[fact]))


Histories = Mapping[str, list[Known]]


def story(rng: np.random.Generator, facts: int) -> tuple[list[str], Histories, Histories]:
    """So many facts, and in which rooms people and things are known to have been, in order, no room twice in a row.

    Where somebody is is unknown until they move, and where a thing is until it is taken; nobody goes where they are.
    """
    people: dict[str, list[Known]] = {name: [] for name in PEOPLE}
    things: dict[str, list[Known]] = {name: [] for name in THINGS}
    lies = {name: ROOMS[i] for name, i in zip(THINGS, rng.integers(len(ROOMS), size=len(THINGS)), strict=True)}
    holder: dict[str, str] = {}
    told = []
    for fact in range(facts):
        who = PEOPLE[rng.integers(len(PEOPLE))]
        here = people[who][-1].room if people[who] else None
        held = [thing for thing in THINGS if holder.get(thing) == who]
        near = [thing for thing in THINGS if thing not in holder and lies[thing] == here]
        chance = rng.random()
        if near and chance < 0.6:
            thing = near[rng.integers(len(near))]
            holder[thing] = who
            _arrive(things[thing], lies[thing], fact)
            told.append(f"{who} {_one(rng, TOOK)} the {thing}.")
        elif held and chance > 0.8:
            thing = held[rng.integers(len(held))]
            lies[thing] = str(here)
            del holder[thing]
            told.append(f"{who} {_one(rng, LEFT)} the {thing}.")
        else:
            room = _one(rng, [room for room in ROOMS if room != here])
            for history in [people[who], *(things[thing] for thing in held)]:
                _arrive(history, room, fact)
            told.append(f"{who} {_one(rng, MOVED)} the {room}.")
    return told, people, things


def _arrive(history: list[Known], room: str, fact: int) -> None:
    if not history or history[-1].room != room:  # what is taken where it was put down has not moved
        history.append(Known(room, fact))


def _one(rng: np.random.Generator, choices: list[str] | tuple[str, ...]) -> str:
    return choices[rng.integers(len(choices))]


Asked = tuple[str, str, int] | None  # question, answer, the last fact that it needs


def _where_is(rng: np.random.Generator, people: Histories, things: Histories) -> Asked:
    name = _one(rng, [name for name in people if people[name]])
    return f"Where is {name}? ", *people[name][-1]


def _where_is_thing(rng: np.random.Generator, people: Histories, things: Histories) -> Asked:
    known = [thing for thing in things if things[thing]]
    if not known:
        return None
    thing = _one(rng, known)
    return f"Where is the {thing}? ", *things[thing][-1]


def _where_was(rng: np.random.Generator, people: Histories, things: Histories) -> Asked:
    """About a room that a thing came to once, so that there is one answer."""
    choices = []
    for thing, history in things.items():
        rooms = [known.room for known in history]
        choices += [(thing, i) for i in range(1, len(rooms)) if rooms.count(rooms[i]) == 1]
    if not choices:
        return None
    thing, i = choices[rng.integers(len(choices))]
    before, after = things[thing][i - 1 : i + 1]
    return f"Where was the {thing} before the {after.room}? ", before.room, after.fact


ASK = {"qa1": _where_is, "qa2": _where_is_thing, "qa3": _where_was}
