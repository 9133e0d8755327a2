"""The training sequences of the mini models: conversations in popi's own templates, labelled with the truth.

The four tasks are to *write* a summary from signals, and to answer a prompt under a *summary*, under *raw* signals, or
without context (*bare*). The target of writing is the evidence oracle. Answers follow what the context claims (for raw
signals, what the user likes), and their style is random otherwise. A sequence with signals has two more targets at the
end of each signal: the sides that this signal shows, and the exact posterior after it. Without them a small model takes
much longer to learn to infer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from popi.claims import as_text, with_citations
from popi.data.miniworld import phrases as say
from popi.data.miniworld.language import claimed_tastes, claims_for, pick, write_answer
from popi.data.miniworld.observe import Observation, draw_style
from popi.data.miniworld.tastes import DIMENSIONS, SIDES, Floats, Style, best_claims, marginals
from popi.data.miniworld.world import User, draw_user, evidence_for, training_question, training_taste
from popi.prompts import DEFAULT, Message
from popi.render import render_signals
from popi.summary import NO_EVIDENCE, Claim

Task = Literal["write", "raw", "summary", "bare"]


@dataclass(frozen=True, slots=True)
class Dilution:
    """The errors of an untrained writer.

    It has habits, so that its most likely summary is mediocre, and random slips, so that sampling finds better ones.

    Attributes:
        blurred: Dimensions that it names without saying which side the user likes.
        overlooked: Dimensions that it leaves out.
        slip: Probability that a claim ignores these habits and is correct, blurred, left out or turned into its
            opposite, each with the same probability.
    """

    blurred: tuple[str, ...]
    overlooked: tuple[str, ...]
    slip: float


@dataclass(frozen=True, slots=True)
class Lesson:
    """One training sequence.

    Attributes:
        messages: The conversation.
        response: The target response.
        ends: Index of the last character of each signal in the last message; empty without signals.
        shown: The sides that each signal shows by itself: (signals, dimensions) in {-1, 0, 1}.
        beliefs: The posterior after each signal: (signals, dimensions, 3), see ``tastes.marginals``.
        answer_ends: Index of the last character of each answer inside a signal.
        styles: The styles of these answers: (answers, dimensions) in {-1, 1}.
    """

    messages: list[Message]
    response: str
    ends: tuple[int, ...] = ()
    shown: NDArray[np.int8] | None = None
    beliefs: Floats | None = None
    answer_ends: tuple[int, ...] = ()
    styles: NDArray[np.int8] | None = None


def blend(rng: np.random.Generator, taste: Style) -> Style:
    """The style of an answer for this taste: the preferred sides, and random sides in the other dimensions."""
    return np.where(taste != 0, taste, draw_style(rng)).astype(np.int8)


def dilute(rng: np.random.Generator, claims: Sequence[Claim], how: Dilution) -> list[Claim]:
    """Makes mediocre claims from good ones."""
    made: dict[str, Claim] = {}
    for claim in claims:
        [(dimension, side)] = claimed_tastes(claim.text).items()
        habit = "blur" if dimension in how.blurred else "skip" if dimension in how.overlooked else "keep"
        fate = pick(rng, ("keep", "blur", "skip", "turn")) if rng.random() < how.slip else habit
        if fate == "skip":
            continue
        opposite = next(other for other in SIDES[dimension] if other != side)
        text = {
            "keep": claim.text,
            "blur": say.VAGUE[dimension],
            "turn": pick(rng, say.WORDING[dimension, opposite].names),
        }[fate]
        made[text] = Claim(text=text, evidence=claim.evidence)
    return list(made.values())


def lesson(task: Task, seed: int, place: int, *, signals: int, dilution: Dilution | None = None) -> Lesson:
    """Makes one lesson; the same arguments give the same lesson.

    Args:
        task: The task.
        seed: Seed of the training run.
        place: Number of the lesson.
        signals: Number of signals of the user, if the task has signals.
        dilution: The errors of an untrained model in the target; ``None`` writes like the evidence oracle.
    """
    rng = np.random.default_rng([seed, place])
    if task in ("write", "raw"):
        return _from_signals(rng, task, draw_user("train", seed, place, signals=signals, tests=0), dilution)
    question = training_question(rng)
    if task == "bare":
        return Lesson(DEFAULT.answer_messages(question.text), write_answer(rng, question, draw_style(rng)))
    taste = training_taste(rng)
    context = _context(rng, taste)
    answer = write_answer(rng, question, blend(rng, taste))
    return Lesson(DEFAULT.answer_messages(question.text, context), answer)


def _context(rng: np.random.Generator, taste: Style) -> str:
    """A summary with these claims, sometimes with a vague line. Without claims it is empty in one of two ways."""
    claims = claims_for(rng, taste)
    if rng.random() < 0.2:
        claims.insert(int(rng.integers(len(claims) + 1)), pick(rng, tuple(say.VAGUE.values())))
    if not claims:
        return NO_EVIDENCE if rng.random() < 0.5 else ""
    return as_text([Claim(text=text) for text in claims])


def _from_signals(rng: np.random.Generator, task: Task, user: User, dilution: Dilution | None) -> Lesson:
    rendered = render_signals([seen.signal for seen in user.observations], len)
    beliefs = user.beliefs()
    if task == "write":
        messages = DEFAULT.inference_messages(rendered.text)
        claims: Sequence[Claim] = evidence_for(user, best_claims(beliefs[-1]))
        if dilution is not None:
            claims = dilute(rng, claims, dilution)
        response = with_citations(claims, rendered.shown)
    else:
        question = training_question(rng)
        messages = DEFAULT.answer_messages(question.text, rendered.text)
        response = write_answer(rng, question, blend(rng, user.taste))
    start = messages[-1].content.index(rendered.text)
    ends = _block_ends(rendered.text, len(user.observations))
    answer_ends, styles = _answer_ends(rendered.text, user.observations, ends)
    return Lesson(
        messages=messages,
        response=response,
        ends=tuple(start + place for place in ends),
        shown=np.stack([seen.shows for seen in user.observations]),
        beliefs=marginals(beliefs[1:]),
        answer_ends=tuple(start + place for place in answer_ends),
        styles=styles,
    )


def _block_ends(text: str, count: int) -> list[int]:
    """The index of the last character of each numbered block in rendered signals."""
    starts = [0]
    for number in range(2, count + 1):
        starts.append(text.index(f"\n[{number}] ", starts[-1]))
    return [start - 1 for start in starts[1:]] + [len(text) - 1]


def _answer_ends(
    text: str, observations: Sequence[Observation], ends: Sequence[int]
) -> tuple[list[int], NDArray[np.int8]]:
    """The index of the last character of each answer in the blocks, and the styles of the answers."""
    places, styles, after = [], [], 0
    for seen, end in zip(observations, ends, strict=True):
        for answer, style in seen.answers:
            after = text.index(answer, after) + len(answer)
            places.append(after - 1)
            styles.append(style)
        after = end
    return places, np.reshape(styles, (len(styles), len(DIMENSIONS))).astype(np.int8)
