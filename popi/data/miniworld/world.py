"""Users of the mini world, in any number, each made from the seed and their own place alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from popi.claims import as_text
from popi.data.example import HeldOutPair, PersonalizationExample
from popi.data.miniworld.language import Question, all_prompts, as_sides, claims_for, draw_question
from popi.data.miniworld.observe import Choice, Observation, draw_choice, draw_observation, draw_style
from popi.data.miniworld.tastes import (
    CARED,
    DIMENSIONS,
    Floats,
    Style,
    best_claims,
    draw_taste,
    hypotheses,
    marginals,
    posterior,
)
from popi.data.miniworld.topics import HELD_OUT_TOPICS, TOPICS
from popi.errors import InputError
from popi.signals import UserSignals
from popi.summary import Claim

SPLITS = ("train", "validation", "unseen-users", "unseen-combinations", "unseen-topics")
"""All but ``train`` hold out users and prompts; the last two also combinations of tastes, or topics.

What training is shown, in signals too, has neither the prompts, nor the combinations, nor the topics that are held out.
"""

SIGNALS, TESTS = 8, 4
_SEEN_TOPICS = tuple(name for name in TOPICS if name not in HELD_OUT_TOPICS)
_UNSEEN_TOPICS = tuple(sorted(HELD_OUT_TOPICS))


def is_reserved(text: str, share: int) -> bool:
    """Whether one in ``share`` texts, this among them, is kept out of training, by its hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % share == 0


def is_held_out(taste: Style) -> bool:
    """Whether this combination, one that a user can have, is kept for the split of unseen combinations: one in five."""
    usual = CARED[0] <= np.abs(taste).sum() <= CARED[1]
    return bool(usual) and is_reserved("".join(f"{side:+d}" for side in taste), 5)


@dataclass(frozen=True, slots=True)
class User:
    """A user with the truth about them.

    Attributes:
        user_id: Split, seed and place.
        taste: (dimensions,) in {-1, 0, 1}.
        observations: Oldest first.
        tests: Choices on prompts that the signals do not show.
    """

    user_id: str
    taste: Style
    observations: tuple[Observation, ...]
    tests: tuple[Choice, ...]

    def beliefs(self) -> Floats:
        """The exact posterior after each signal: (signals + 1, hypotheses)."""
        rows = [seen.log_likelihood for seen in self.observations]
        return posterior(np.reshape(rows, (len(rows), len(hypotheses()))).astype(np.float32))


def draw_user(split: str, seed: int, place: int, *, signals: int = SIGNALS, tests: int = TESTS) -> User:
    """Makes one user; the same arguments give the same user, whoever else is made.

    Raises:
        InputError: If there is no such split, or it has fewer prompts than are to be tested.
    """
    if split not in SPLITS:
        raise InputError(f"there is no split {split!r}", field="split", fix=f"use one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([SPLITS.index(split), seed, place])
    while is_held_out(taste := draw_taste(rng)) != (split == "unseen-combinations"):
        pass
    shown: set[str] = set()
    observations: dict[str, Observation] = {}
    while len(observations) < signals:
        question = training_question(rng) if split == "train" else draw_question(rng, _SEEN_TOPICS)
        seen = draw_observation(rng, taste, question)
        observations.setdefault(seen.signal.id, seen)
        shown.add(question.text)
    left = len(_test_prompts(split)) - len(_test_prompts(split) & shown)
    if tests > left:
        raise InputError(
            f"{split} has {left} prompts that the signals do not show, not {tests}",
            field="tests",
            fix=f"ask for at most {left}",
        )
    asked: dict[str, Choice] = {}
    while len(asked) < tests:
        question = _test_question(rng, split)
        if question.text not in shown:
            asked.setdefault(question.text, draw_choice(rng, taste, question))
    return User(f"{split}-{seed}-{place}", taste, tuple(observations.values()), tuple(asked.values()))


def _test_question(rng: np.random.Generator, split: str) -> Question:
    """A prompt of the split: training never sees the reserved ones, the others test on nothing else."""
    while True:
        question = draw_question(rng, _topics(split))
        if _is_of(question.text, split):
            return question


def _topics(split: str) -> Sequence[str]:
    return _UNSEEN_TOPICS if split == "unseen-topics" else _SEEN_TOPICS


def _is_of(prompt: str, split: str) -> bool:
    return is_reserved(prompt, 5) != (split == "train")


@cache
def _test_prompts(split: str) -> frozenset[str]:
    return frozenset(text for text in all_prompts(_topics(split)) if _is_of(text, split))


def training_question(rng: np.random.Generator) -> Question:
    """A prompt that training may show and answer."""
    return _test_question(rng, "train")


def training_taste(rng: np.random.Generator) -> Style:
    """A combination of tastes that training may show; a few are of more or fewer tastes than a user has."""
    while True:
        usual = rng.random() < 0.85
        taste = draw_taste(rng) if usual else draw_style(rng) * (rng.random(len(DIMENSIONS)) < 0.3)
        if not is_held_out(taste := taste.astype(np.int8)):
            return taste


def evidence_for(user: User, claims: Style) -> list[Claim]:
    """Claims in words that depend on the user, each with the at most two signals that speak most for it."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(user.user_id.encode()).digest()[:8]))
    words = claims_for(rng, claims)
    made = []
    for text, dimension in zip(words, np.flatnonzero(claims), strict=True):
        support = [
            (float(_support(seen, int(dimension), int(claims[dimension]))), place)
            for place, seen in enumerate(user.observations)
            if seen.shows[dimension] == claims[dimension]
        ]
        best = sorted(place for _, place in sorted(support, reverse=True)[:2])
        made.append(Claim(text=text, evidence=tuple(user.observations[place].signal.id for place in best)))
    return made


def _support(seen: Observation, dimension: int, side: int) -> float:
    """How much one signal by itself raises the belief in a side."""
    belief = posterior(seen.log_likelihood[None])
    return float(marginals(belief)[1, dimension, 0 if side > 0 else 1])


def generate(
    *, split: str, users: int, seed: int, signals: int = SIGNALS, tests: int = TESTS
) -> Iterator[PersonalizationExample]:
    """Yields users as examples, one at a time.

    Args:
        split: One of ``SPLITS``.
        users: How many.
        seed: Another seed gives other users.
        signals: Signals of each user.
        tests: Test pairs of each user.

    Raises:
        InputError: If there is no such split, or it has fewer prompts than are to be tested.
    """
    for place in range(users):
        yield as_example(draw_user(split, seed, place, signals=signals, tests=tests))


def as_example(user: User) -> PersonalizationExample:
    """The user as an example, with both oracle summaries and what an exact judge needs to know."""
    evidence = best_claims(user.beliefs()[-1])
    return PersonalizationExample(
        user=UserSignals(user_id=user.user_id, signals=tuple(seen.signal for seen in user.observations)),
        tests=tuple(
            HeldOutPair(prompt=choice.question.text, chosen=choice.chosen, rejected=choice.rejected)
            for choice in user.tests
        ),
        oracles={
            "truth": as_text(evidence_for(user, user.taste)),
            "evidence": as_text(evidence_for(user, evidence)),
        },
        facts={
            "world": "miniworld",
            "tastes": as_sides(user.taste),
            "evidence_tastes": as_sides(evidence),
            "perfect_choice": [1.0 if choice.meant else 0.0 for choice in user.tests],
        },
    )
