"""What a mini model can do by now, on held-out users: write what the signals show, and follow each dimension."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from popi.backends.base import Backend, ChatRequest, ScoreRequest
from popi.claims import as_text
from popi.data.miniworld.language import as_vector, claimed_tastes, claims_for, draw_question, write_answer
from popi.data.miniworld.observe import draw_style
from popi.data.miniworld.tastes import DIMENSIONS, Style, best_claims, draw_taste
from popi.data.miniworld.topics import TOPICS
from popi.data.miniworld.world import User, draw_user
from popi.prompts import DEFAULT, Message
from popi.render import render_signals
from popi.summary import Claim

SUMMARY_TOKENS = 64


async def probe_writing(backend: Backend, users: int) -> dict[str, float]:
    """Lets the model write summaries of held-out users and compares them with the evidence oracle's.

    Returns:
        ``precision`` and ``recall`` of claims against the evidence, and ``accuracy``: how often a perfect reader of
        the summary predicts the choice in a test pair (ties count half); ``accuracy_evidence`` is the ceiling.
    """
    people = [draw_user("validation", 0, place) for place in range(users)]
    texts = [render_signals([seen.signal for seen in user.observations], len).text for user in people]
    answers = await backend.chat(
        [ChatRequest(DEFAULT.inference_messages(text), max_tokens=SUMMARY_TOKENS) for text in texts]
    )
    claims = np.stack([as_vector(claimed_tastes(answer.text)) for answer in answers])
    best = np.stack([best_claims(user.beliefs()[-1]) for user in people])
    agreed = float(((claims == best) & (best != 0)).sum())
    return {
        "precision": agreed / max(1, np.abs(claims).sum()),
        "recall": agreed / max(1, np.abs(best).sum()),
        "accuracy": _perfect_reader(claims, people),
        "accuracy_evidence": _perfect_reader(best, people),
    }


def _perfect_reader(claims: Style, people: Sequence[User]) -> float:
    right = [
        (np.sign(int(claim.astype(int) @ choice.difference)) + 1) / 2
        for claim, user in zip(claims, people, strict=True)
        for choice in user.tests
    ]
    return float(np.mean(right))


async def probe_following(backend: Backend, pairs: int) -> dict[str, float]:
    """Measures for each dimension by itself how often a claimed side is followed.

    Both answers of a pair differ in that one dimension, on which the summary, among claims on others, takes a side.

    Returns:
        By dimension, the share of pairs with a positive margin against the bare prompt.
    """
    rng = np.random.default_rng(0)
    requests: list[ScoreRequest] = []
    for dimension in range(len(DIMENSIONS)):
        for _ in range(pairs):
            requests += _pair(rng, dimension)
    scores = [result.logprob for result in await backend.score(requests)]
    table = np.reshape(scores, (len(DIMENSIONS), pairs, 4))
    margins = table @ np.array([1, -1, -1, 1])
    return {name: float((margins[place] > 0).mean()) for place, name in enumerate(DIMENSIONS)}


def _pair(rng: np.random.Generator, dimension: int) -> list[ScoreRequest]:
    while not (taste := draw_taste(rng))[dimension]:
        pass
    question = draw_question(rng, list(TOPICS))
    liked = draw_style(rng)
    liked[dimension] = taste[dimension]
    other = liked.copy()
    other[dimension] *= -1
    answers = [write_answer(rng, question, style) for style in (liked, other)]
    context = as_text([Claim(text=text) for text in claims_for(rng, taste)])
    conversations: tuple[list[Message], ...] = (
        DEFAULT.answer_messages(question.text, context),
        DEFAULT.answer_messages(question.text),
    )
    return [ScoreRequest(messages, answer) for messages in conversations for answer in answers]
