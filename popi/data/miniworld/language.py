"""Writes answers in any style, and reads the style of any text.

Styles are parsed from the text only, so the judge works on any text that a model generates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from popi.data.miniworld import phrases as say
from popi.data.miniworld.tastes import DIMENSIONS, SIDES, Style
from popi.data.miniworld.topics import TOPICS

SHORT_POINTS, LONG_POINTS = 1, 3


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and the things that an answer to it can be about."""

    text: str
    topic: str
    things: tuple[str, ...]


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Draws one of several texts."""
    return options[int(rng.integers(len(options)))]


def draw_question(rng: np.random.Generator, topics: Sequence[str]) -> Question:
    """Draws a prompt about one of the topics."""
    topic = pick(rng, topics)
    things = tuple(TOPICS[topic][place] for place in rng.permutation(len(TOPICS[topic])))
    text = pick(rng, say.PROMPTS).format(thing=things[0], other=things[1], topic=topic)
    return Question(text, topic, things)


def all_prompts(topics: Sequence[str]) -> Iterator[str]:
    """Every prompt that :func:`draw_question` can draw."""
    for topic in topics:
        for thing, other in permutations(TOPICS[topic], 2):
            for template in say.PROMPTS:
                yield template.format(thing=thing, other=other, topic=topic)


def side_of(style: Style, name: str) -> str:
    """The side that a style takes in a dimension."""
    return SIDES[name][0 if style[DIMENSIONS.index(name)] > 0 else 1]


def write_answer(rng: np.random.Generator, question: Question, style: Style) -> str:
    """Writes an answer in a style.

    Args:
        rng: Draws the phrasing; the same state gives the same text.
        question: The prompt.
        style: (dimensions,) in {-1, 1}.
    """
    count = LONG_POINTS if side_of(style, "length") == "long" else SHORT_POINTS
    measured = int(rng.integers(count))
    points = [
        _point(rng, question.things[place], style, stance=place == 0, measured=place == measured)
        for place in range(count)
    ]
    bullets = side_of(style, "format") == "bullets"
    head = []
    if side_of(style, "opening") == "greeting":
        head.append(pick(rng, say.GREETINGS))
    if side_of(style, "emoji") == "emoji":
        head.append(pick(rng, say.EMOJI))
    tail = []
    if side_of(style, "examples") == "example":
        tail.append(pick(rng, say.EXAMPLES).format(question.things[3]))
    if side_of(style, "closing") == "question":
        tail.append(pick(rng, say.QUESTIONS))
    if bullets:
        lines = [" ".join(head), *(f"- {point}" for point in points), " ".join(tail)]
        return "\n".join(line for line in lines if line)
    return " ".join((*head, *points, *tail))


def _point(rng: np.random.Generator, thing: str, style: Style, *, stance: bool, measured: bool) -> str:
    words = [pick(rng, say.STANCES[side_of(style, "stance")])] if stance else []
    words.append(pick(rng, say.TONES[side_of(style, "tone")]))
    words.append(pick(rng, say.VERBS[side_of(style, "level")]))
    words.append(f"the {thing}")
    if measured:
        amount = str(int(rng.integers(2, 10)))
        words.append(pick(rng, say.QUANTITIES).format(amount, pick(rng, say.UNITS[side_of(style, "units")])))
    sentence = " ".join(words)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    body = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{body})(?!\w)", re.IGNORECASE)


_MARKS = {
    (name, side): _any_of(words)
    for name, table in (
        ("stance", say.STANCES), ("tone", say.TONES), ("level", say.VERBS), ("units", say.UNITS),
    )
    for side, words in table.items()
}  # fmt: skip
_GREETING, _QUESTION = _any_of(say.GREETINGS), _any_of(say.QUESTIONS)
_EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]")
_EXAMPLE = re.compile(r"\b(?:for example|for instance|an example|e\.g\.)", re.IGNORECASE)
_BULLET = re.compile(r"^\s*[-*\u2022]\s", re.MULTILINE)
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")


def style_of(text: str) -> dict[str, str]:
    """Reads the style of a text: its side in each dimension. A dimension that it does not show is left out."""
    found = {
        "opening": "greeting" if _GREETING.match(text.lstrip()) else "direct",
        "emoji": "emoji" if _EMOJI.search(text) else "plain",
        "format": "bullets" if _BULLET.search(text) else "prose",
        "examples": "example" if _EXAMPLE.search(text) else "abstract",
        "closing": "question" if text.rstrip().endswith("?") else "stop",
        "length": "long" if _count_points(text) > SHORT_POINTS else "short",
    }
    for name in ("stance", "tone", "level", "units"):
        first, second = (len(_MARKS[name, side].findall(text)) for side in SIDES[name])
        if first != second:
            found[name] = SIDES[name][0 if first > second else 1]
    return {name: found[name] for name in DIMENSIONS if name in found}


def _count_points(text: str) -> int:
    """The number of sentences that are not a greeting, an example or a question."""
    body = _EMOJI.sub(" ", _GREETING.sub(" ", text))
    points = 0
    for sentence in _SENTENCE.findall(_BULLET.sub("", body)):
        if sentence.strip() and not sentence.rstrip().endswith("?") and not _EXAMPLE.search(sentence):
            points += 1
    return points


_CLAIMS = {
    name.lower(): (dimension, side) for (dimension, side), wording in say.WORDING.items() for name in wording.names
}
_CLAIM = _any_of(list(_CLAIMS))


def claimed_tastes(summary: str) -> dict[str, str]:
    """Reads the tastes that a summary claims. A dimension of which it names both sides is left out."""
    claimed: dict[str, set[str]] = {}
    for found in _CLAIM.findall(summary):
        dimension, side = _CLAIMS[found.lower()]
        claimed.setdefault(dimension, set()).add(side)
    return {name: claimed[name].pop() for name in DIMENSIONS if len(claimed.get(name, ())) == 1}


def as_vector(sides: dict[str, str]) -> Style:
    """Named sides as a vector: (dimensions,) in {-1, 0, 1}."""
    table = (SIDES[name].index(sides[name]) if name in sides else None for name in DIMENSIONS)
    return np.array([0 if place is None else 1 - 2 * place for place in table], np.int8)


def as_sides(vector: Style) -> dict[str, str]:
    """A vector as named sides, the inverse of :func:`as_vector`."""
    return {name: side_of(vector, name) for place, name in enumerate(DIMENSIONS) if vector[place]}


def claims_for(rng: np.random.Generator, taste: Style) -> list[str]:
    """Claims for every taste in the vector, in the order of the dimensions, in random words."""
    return [pick(rng, say.wording(int(place), int(taste[place])).names) for place in np.flatnonzero(taste)]
