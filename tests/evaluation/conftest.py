"""A model that does exactly what it is told, and users made by hand."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from popi.backends.base import ChatRequest, ScoreRequest
from popi.data.example import HeldOutPair, PersonalizationExample
from popi.data.miniworld import claimed_tastes, style_of, utility
from popi.evaluation.measure import Column
from popi.prompts import DEFAULT
from popi.registry import generator
from popi.signals import Statement, UserSignals
from popi.testing import ScriptedBackend

WRITTEN = "- bullet points\n- something nice"


def context_of(request: ScoreRequest | ChatRequest) -> str:
    """What a request tells of the user; nothing on a bare prompt."""
    found = re.search(f"{DEFAULT.open}\n(.*)\n{DEFAULT.close}", request.messages[-1].content, re.DOTALL)
    return found.group(1) if found else ""


@pytest.fixture
def obedient() -> ScriptedBackend:
    """Scores an answer by how well it meets the claimed tastes, answers in bullets if these are claimed.

    As a writer it always claims bullet points, and something that no judge can check.
    """

    def answer(request: ChatRequest) -> str:
        if "Signals of one user" in request.messages[-1].content:
            return WRITTEN
        return "- One thing." if "bullet" in context_of(request) else "One thing."

    def score(request: ScoreRequest) -> float:
        return float(utility(claimed_tastes(context_of(request)), style_of(request.response)))

    return ScriptedBackend(answer, score, model="obedient")


@pytest.fixture
def column(obedient: ScriptedBackend) -> Column:
    return Column("obedient", generator("prompted")(obedient), obedient)


@pytest.fixture
def make_example() -> Callable[..., PersonalizationExample]:
    """Makes a user with one statement and pairs of answers."""

    def make(user_id: str, *pairs: tuple[str, str], tastes: dict[str, str] | None = None) -> PersonalizationExample:
        facts = {} if tastes is None else {"world": "miniworld", "tastes": tastes, "evidence_tastes": tastes}
        return PersonalizationExample(
            user=UserSignals(user_id=user_id, signals=(Statement(text=f"I am {user_id}."),)),
            tests=tuple(
                HeldOutPair(prompt=f"Question {place}?", chosen=chosen, rejected=rejected)
                for place, (chosen, rejected) in enumerate(pairs)
            ),
            facts=facts,
        )

    return make
