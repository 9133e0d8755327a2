"""Measures a mini model on held-out users: how well it writes summaries, and how well it follows each dimension."""

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
from popi.errors import BackendError
from popi.prompts import DEFAULT, Message
from popi.render import render_signals
from popi.summary import Claim

SUMMARY_TOKENS = 64


async def probe_writing(backend: Backend, users: int) -> dict[str, float]:
    """Compares summaries that the model writes for held-out users with those of the evidence oracle.

    A response that failed counts as a summary without claims: a model that is not yet trained writes such responses.

    Args:
        backend: The model.
        users: Number of users.

    Returns:
        ``precision`` and ``recall`` of the claims against the evidence; ``accuracy``, the share of test pairs in which
        a perfect reader of the summary predicts the choice (a tie counts as half); and ``accuracy_evidence``, the same
        for the evidence oracle, which is the upper bound.
    """
    sample = [draw_user("validation", 0, place) for place in range(users)]
    texts = [render_signals([seen.signal for seen in user.observations], len).text for user in sample]
    responses = await backend.chat(
        [ChatRequest(DEFAULT.inference_messages(text), max_tokens=SUMMARY_TOKENS) for text in texts]
    )
    claims = np.stack([as_vector(claimed_tastes(response.text)) for response in responses])
    best = np.stack([best_claims(user.beliefs()[-1]) for user in sample])
    agreed = float(((claims == best) & (best != 0)).sum())
    return {
        "precision": agreed / max(1, int(np.abs(claims).sum())),
        "recall": agreed / max(1, int(np.abs(best).sum())),
        "accuracy": _perfect_reader(claims, sample),
        "accuracy_evidence": _perfect_reader(best, sample),
    }


def _perfect_reader(claims: Style, users: Sequence[User]) -> float:
    correct = [
        (np.sign(int(claim.astype(int) @ choice.difference)) + 1) / 2
        for claim, user in zip(claims, users, strict=True)
        for choice in user.tests
    ]
    return float(np.mean(correct))


async def probe_following(backend: Backend, pairs: int) -> dict[str, float]:
    """Measures for each dimension how often the model prefers the side that the summary claims.

    The two answers of a pair differ in that dimension only. The summary claims one side of it, among other claims.

    Args:
        backend: The model.
        pairs: Number of pairs of each dimension.

    Returns:
        By dimension, the share of pairs with a positive margin against the bare prompt.

    Raises:
        BackendError: If a score failed.
    """
    rng = np.random.default_rng(0)
    requests = [
        request for dimension in range(len(DIMENSIONS)) for _ in range(pairs) for request in _pair(rng, dimension)
    ]
    results = await backend.score(requests)
    if failed := next((result for result in results if result.error is not None), None):
        raise BackendError(f"{failed.model} cannot be measured: {failed.error}", failure=failed.failure)
    table = np.reshape([result.logprob for result in results], (len(DIMENSIONS), pairs, 4))
    margins = table @ np.array([1, -1, -1, 1])
    return {name: float((margins[place] > 0).mean()) for place, name in enumerate(DIMENSIONS)}


def _pair(rng: np.random.Generator, dimension: int) -> list[ScoreRequest]:
    while not (taste := draw_taste(rng))[dimension]:
        pass
    question = draw_question(rng, list(TOPICS))
    preferred = draw_style(rng)
    preferred[dimension] = taste[dimension]
    other = preferred.copy()
    other[dimension] *= -1
    answers = [write_answer(rng, question, style) for style in (preferred, other)]
    context = as_text([Claim(text=text) for text in claims_for(rng, taste)])
    conversations: tuple[list[Message], ...] = (
        DEFAULT.answer_messages(question.text, context),
        DEFAULT.answer_messages(question.text),
    )
    return [ScoreRequest(messages, answer) for messages in conversations for answer in answers]
