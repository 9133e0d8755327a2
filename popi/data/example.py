"""The format in which every data set reaches training and evaluation: a user's signals and held-out pairs."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from popi.errors import InputError
from popi.signals import (
    Comment,
    Conversation,
    Edit,
    FileRecord,
    PreferencePair,
    Rating,
    Signal,
    Speaker,
    Text,
    UserSignals,
    number_as_text,
    without_missing,
)


class HeldOutPair(FileRecord):
    """A prompt that is not in the signals, with a response that the user prefers and one that the user rejects.

    Example:
        >>> pair = HeldOutPair(prompt="How do magnets work?", chosen="Poles attract.", rejected="Well, let me explain.")
        >>> pair.chosen
        'Poles attract.'
    """

    prompt: Text
    chosen: Text
    rejected: Text

    @model_validator(mode="after")
    def _responses_differ(self) -> HeldOutPair:
        if self.chosen == self.rejected:
            raise ValueError("chosen and rejected are the same text")
        return self


class PersonalizationExample(FileRecord):
    """One user: the signals that a writer may read, and the held-out pairs for evaluation.

    Example:
        >>> from popi.signals import Statement
        >>> user = UserSignals(user_id="ann", signals=(Statement(text="I like short answers."),))
        >>> pair = HeldOutPair(prompt="How do magnets work?", chosen="Poles attract.", rejected="Well, let me explain.")
        >>> example = PersonalizationExample(user=user, tests=(pair,))
        >>> example.user.user_id, len(example.tests)
        ('ann', 1)

    Attributes:
        user: The signals. A writer sees nothing else.
        tests: Held-out pairs. See :func:`find_unusable` for the requirements.
        oracles: Summaries that no writer could know, by name: ``truth`` (the true preferences) and ``evidence`` (the
            best summary given only the signals). Present only where the truth is known.
        facts: Other facts about the user, for judges. They are never shown to a writer or a generator. Users with the
            same ``cluster`` are not independent of each other.
    """

    user: UserSignals
    tests: tuple[HeldOutPair, ...] = ()
    oracles: Annotated[dict[str, str], BeforeValidator(without_missing)] = Field(default_factory=dict)
    facts: dict[str, Any] = Field(default_factory=dict)

    @property
    def cluster(self) -> str:
        """The unit of resampling for confidence intervals."""
        cluster = self.facts.get("cluster")
        return self.user.user_id if cluster is None else str(number_as_text(cluster))

    @field_validator("facts")
    @classmethod
    def _facts_are_json(cls, facts: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(facts, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(f"cannot be written as JSON ({error})") from error
        return facts


def find_unusable(user: UserSignals, tests: Sequence[HeldOutPair]) -> dict[int, str]:
    """Finds held-out pairs that cannot be used.

    A pair is unusable if a signal contains its prompt together with one of its responses, because a generator that sees
    the signals can then look up the answer, or if an earlier pair has the same prompt and the same two responses, in
    either order. A comment without a prompt matches any prompt. Texts are compared without regard to
    white space, case and the encoding of characters.

    Args:
        user: The signals.
        tests: The held-out pairs of the same user.

    Returns:
        The reason for each unusable pair, by its place in ``tests``.
    """
    prompts = {text_key(pair.prompt) for pair in tests} | {""} if tests else set()
    kinds = {
        (prompt, text_key(response)): signal.kind
        for signal in user.signals
        for shown_prompt, response in _shown(signal)
        if (prompt := text_key(shown_prompt)) in prompts
    }
    reasons: dict[int, str] = {}
    earlier: set[tuple[str, frozenset[str]]] = set()
    for place, pair in enumerate(tests):
        prompt, responses = text_key(pair.prompt), (text_key(pair.chosen), text_key(pair.rejected))
        found = (kinds.get((shown, text)) for text in responses for shown in (prompt, ""))
        kind = next(filter(None, found), None)
        if kind is not None:
            reasons[place] = f"a signal of the kind {kind} has the prompt and a response of this pair"
        elif (prompt, frozenset(responses)) in earlier:
            reasons[place] = "repeats an earlier held-out pair"
        earlier.add((prompt, frozenset(responses)))
    return reasons


def check_held_out(example: PersonalizationExample) -> None:
    """Checks that all held-out pairs of a user can be used.

    Raises:
        InputError: If one cannot: see :func:`find_unusable`.
    """
    reasons = find_unusable(example.user, example.tests)
    if reasons:
        place, reason = next(iter(reasons.items()))
        prompt = example.tests[place].prompt
        raise InputError(
            f"{reason}; prompt {prompt[:60]!r}; {len(reasons)} of {len(example.tests)} held-out pairs of user "
            f"{example.user.user_id!r} cannot be used",
            field=f"tests.{place}",
            fix="remove them from tests, or from the signals",
        )


def _shown(signal: Signal) -> list[tuple[str, str]]:
    """The prompts and responses that a signal contains; the prompt is empty if it is not given."""
    match signal:
        case PreferencePair():
            return [(signal.prompt, signal.chosen), (signal.prompt, signal.rejected)]
        case Rating():
            return [(signal.prompt, signal.response)]
        case Edit():
            return [(signal.prompt, signal.original), (signal.prompt, signal.edited)]
        case Comment() if signal.about:
            return [(signal.prompt, signal.about)]
        case Conversation():
            return [
                (turn.text, reply.text)
                for turn, reply in pairwise(signal.turns)
                if (turn.speaker, reply.speaker) == (Speaker.USER, Speaker.ASSISTANT)
            ]
        case _:
            return []


def text_key(text: str) -> str:
    """The form in which texts are compared: equal for texts that differ in white space, case or encoding only."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
