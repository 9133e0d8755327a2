"""Users of the mini world, each made from a seed and a number only."""

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
"""All but ``train`` have held-out users and prompts, and the last two held-out combinations of tastes, or topics.

Held-out prompts, combinations and topics do not occur in training, not even in signals.
"""

SIGNALS, TESTS = 8, 4
_SEEN_TOPICS = tuple(name for name in TOPICS if name not in HELD_OUT_TOPICS)
_UNSEEN_TOPICS = tuple(sorted(HELD_OUT_TOPICS))


def is_reserved(text: str, share: int) -> bool:
    """Whether a text is held out from training. The hash of the text selects one in ``share`` texts."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % share == 0


def is_held_out(taste: Style) -> bool:
    """Whether this combination is reserved for ``unseen-combinations``. One in five possible combinations is."""
    usual = CARED[0] <= np.abs(taste).sum() <= CARED[1]
    return bool(usual) and is_reserved("".join(f"{side:+d}" for side in taste), 5)


@dataclass(frozen=True, slots=True)
class User:
    """A user, with the truth about them.

    Attributes:
        user_id: Split, seed and number.
        taste: (dimensions,) in {-1, 0, 1}.
        observations: The signals, oldest first.
        tests: Choices for prompts that are not in the signals.
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
    """Makes one user. The same arguments give the same user.

    Args:
        split: One of ``SPLITS``.
        seed: Each seed gives different users.
        place: Number of the user.
        signals: Number of signals.
        tests: Number of held-out pairs.

    Raises:
        InputError: If the split is unknown, or has fewer prompts than ``tests``.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}", field="split", fix=f"use one of {', '.join(SPLITS)}")
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
            f"{split} has {left} prompts that are not in the signals, not {tests}",
            field="tests",
            fix=f"use at most {left}",
        )
    asked: dict[str, Choice] = {}
    while len(asked) < tests:
        question = _test_question(rng, split)
        if question.text not in shown:
            asked.setdefault(question.text, draw_choice(rng, taste, question))
    return User(f"{split}-{seed}-{place}", taste, tuple(observations.values()), tuple(asked.values()))


def _test_question(rng: np.random.Generator, split: str) -> Question:
    """A prompt of the split: a reserved one, or for training one that is not reserved."""
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
    """A prompt that may occur in training."""
    return _test_question(rng, "train")


def training_taste(rng: np.random.Generator) -> Style:
    """A combination of tastes that may occur in training. A few have more or fewer tastes than users have."""
    while True:
        usual = rng.random() < 0.85
        taste = draw_taste(rng) if usual else draw_style(rng) * (rng.random(len(DIMENSIONS)) < 0.3)
        if not is_held_out(taste := taste.astype(np.int8)):
            return taste


def evidence_for(user: User, claims: Style) -> list[Claim]:
    """Claims in words that depend on the user, each with up to two signals that support it most."""
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
    """The belief in a side after one signal by itself."""
    belief = posterior(seen.log_likelihood[None])
    return float(marginals(belief)[1, dimension, 0 if side > 0 else 1])


def generate(
    *, split: str, users: int, seed: int, signals: int = SIGNALS, tests: int = TESTS
) -> Iterator[PersonalizationExample]:
    """Yields users as examples, one at a time.

    Args:
        split: One of ``SPLITS``.
        users: Number of users.
        seed: Each seed gives different users.
        signals: Number of signals per user.
        tests: Number of held-out pairs per user.

    Raises:
        InputError: If the split is unknown, or has fewer prompts than ``tests``.
    """
    for place in range(users):
        yield as_example(draw_user(split, seed, place, signals=signals, tests=tests))


def as_example(user: User) -> PersonalizationExample:
    """The user as an example, with both oracle summaries and the facts that the exact judge needs."""
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
