"""Signals of every kind, each with its exact likelihood under every taste."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from popi.data.miniworld import phrases as say
from popi.data.miniworld.language import Question, pick, write_answer
from popi.data.miniworld.tastes import (
    DIMENSIONS,
    NOISE,
    PAIR_DIFFERENCES,
    Floats,
    Style,
    hypotheses,
    of_choice,
    of_edit,
    of_rating,
    of_remark,
    of_trade,
    score_of,
)
from popi.signals import (
    Comment,
    Conversation,
    Demographics,
    Edit,
    PreferencePair,
    Rating,
    Signal,
    Speaker,
    Statement,
    Turn,
)

MIX = {
    "pair": 0.40,
    "edit": 0.12,
    "comment": 0.12,
    "conversation": 0.10,
    "rating": 0.08,
    "statement": 0.08,
    "demographics": 0.06,
    "quoted": 0.04,
}
"""Frequency of each kind of signal. ``quoted`` is a statement by another person, which is not evidence."""


@dataclass(frozen=True, slots=True)
class Observation:
    """A signal with its evidence about the user's taste.

    Attributes:
        signal: The signal.
        log_likelihood: Log-likelihood of the signal under each taste: (hypotheses,).
        shows: The sides that this signal by itself supports: (dimensions,) in {-1, 0, 1}.
        answers: The answers in the signal, each with its style: (dimensions,) in {-1, 1}.
    """

    signal: Signal
    log_likelihood: Floats
    shows: Style
    answers: tuple[tuple[str, Style], ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """A question with a chosen and a rejected answer.

    Attributes:
        question: The question.
        chosen: The answer that the user chose.
        rejected: The other answer.
        styles: The styles of the chosen and of the rejected answer: (dimensions,) in {-1, 1} each.
        meant: Whether the choice follows the user's utility.
    """

    question: Question
    chosen: str
    rejected: str
    styles: tuple[Style, Style]
    meant: bool

    @property
    def difference(self) -> Style:
        """Style of the chosen minus style of the rejected, halved: (dimensions,) in {-1, 0, 1}."""
        return ((self.styles[0] - self.styles[1]) // 2).astype(np.int8)


def draw_style(rng: np.random.Generator) -> Style:
    """Draws the style of an answer that was not written for a user."""
    return rng.choice(np.array([1, -1], np.int8), size=len(DIMENSIONS))


def draw_choice(rng: np.random.Generator, taste: Style, question: Question) -> Choice:
    """Draws a choice between two answers that differ in few dimensions and of which the user prefers one."""
    while True:
        first = draw_style(rng)
        second = first.copy()
        turned = rng.choice(len(DIMENSIONS), size=rng.choice(PAIR_DIFFERENCES), replace=False)
        second[turned] *= -1
        gain = int(taste.astype(int) @ (first.astype(int) - second))
        if gain:
            break
    meant = bool(rng.random() >= NOISE)
    if (gain > 0) != meant:
        first, second = second, first
    return Choice(
        question=question,
        chosen=write_answer(rng, question, first),
        rejected=write_answer(rng, question, second),
        styles=(first, second),
        meant=meant,
    )


def _nothing() -> Style:
    return np.zeros(len(DIMENSIONS), np.int8)


def _one(dimension: int, side: int) -> Style:
    vector = _nothing()
    vector[dimension] = side
    return vector


def _remark(rng: np.random.Generator, taste: Style) -> tuple[int, int]:
    """A dimension and side that the user requests: one that they like, or by mistake its opposite."""
    dimension = int(rng.choice(np.flatnonzero(taste)))
    side = int(taste[dimension])
    return dimension, side if rng.random() >= NOISE else -side


def _pair(rng: np.random.Generator, taste: Style, question: Question) -> Observation:
    choice = draw_choice(rng, taste, question)
    signal = PreferencePair(prompt=question.text, chosen=choice.chosen, rejected=choice.rejected)
    answers = ((choice.chosen, choice.styles[0]), (choice.rejected, choice.styles[1]))
    return Observation(signal, of_choice(choice.difference), choice.difference, answers)


def _edit(rng: np.random.Generator, taste: Style, question: Question) -> Observation:
    while not (missed := np.flatnonzero((style := draw_style(rng)) == -taste)).size:
        pass
    by_mistake = rng.random() < NOISE
    dimension = int(rng.choice(len(DIMENSIONS) if by_mistake else missed))
    edited = style.copy()
    edited[dimension] *= -1
    answers = ((write_answer(rng, question, style), style), (write_answer(rng, question, edited), edited))
    signal = Edit(prompt=question.text, original=answers[0][0], edited=answers[1][0])
    return Observation(signal, of_edit(style, dimension), _one(dimension, int(edited[dimension])), answers)


def _comment(rng: np.random.Generator, taste: Style, question: Question) -> Observation:
    dimension, side = _remark(rng, taste)
    style = draw_style(rng)
    words = say.wording(dimension, side)
    text = pick(rng, words.praise if style[dimension] == side else words.complaint)
    about = write_answer(rng, question, style)
    signal = Comment(text=text, about=about, prompt=question.text)
    return Observation(signal, of_remark(dimension, side), _one(dimension, side), ((about, style),))


def _conversation(rng: np.random.Generator, taste: Style, question: Question) -> Observation:
    dimension, side = _remark(rng, taste)
    style = draw_style(rng)
    style[dimension] = -side
    answer = write_answer(rng, question, style)
    turns = (
        Turn(speaker=Speaker.USER, text=question.text),
        Turn(speaker=Speaker.ASSISTANT, text=answer),
        Turn(speaker=Speaker.USER, text=pick(rng, say.wording(dimension, side).request)),
    )
    signal = Conversation(turns=turns)
    return Observation(signal, of_remark(dimension, side), _one(dimension, side), ((answer, style),))


def _rating(rng: np.random.Generator, taste: Style, question: Question) -> Observation:
    style = draw_style(rng)
    gain = np.array(int(taste.astype(int) @ style))
    exact = int(score_of(gain, np.abs(taste).sum()))
    score = exact if rng.random() >= NOISE else int(rng.integers(1, 6))
    response = write_answer(rng, question, style)
    signal = Rating(prompt=question.text, response=response, score=score)
    return Observation(signal, of_rating(style, score), _nothing(), ((response, style),))


def _statement(rng: np.random.Generator, taste: Style, question: Question) -> Observation:
    dimension, side = _remark(rng, taste)
    text = pick(rng, say.STATEMENTS).format(pick(rng, say.wording(dimension, side).names))
    return Observation(Statement(text=text), of_remark(dimension, side), _one(dimension, side))


def _demographics(rng: np.random.Generator, taste: Style, question: Question) -> Observation:
    if rng.random() < 0.5:
        dimension, side = int(rng.integers(len(DIMENSIONS))), int(rng.choice((1, -1)))
    else:
        dimension = int(rng.choice(np.flatnonzero(taste)))
        side = int(taste[dimension])
    signal = Demographics(facts={"occupation": say.wording(dimension, side).trade})
    return Observation(signal, of_trade(dimension, side), _one(dimension, side))


def _quoted(rng: np.random.Generator, taste: Style, question: Question) -> Observation:
    dimension, side = int(rng.integers(len(DIMENSIONS))), int(rng.choice((1, -1)))
    text = pick(rng, say.STATEMENTS).format(pick(rng, say.wording(dimension, side).names))
    flat = np.zeros(len(hypotheses()), np.float32)
    return Observation(Statement(text=text, said_by=Speaker.QUOTED), flat, _nothing())


_DRAW: dict[str, Callable[[np.random.Generator, Style, Question], Observation]] = {
    "pair": _pair,
    "edit": _edit,
    "comment": _comment,
    "conversation": _conversation,
    "rating": _rating,
    "statement": _statement,
    "demographics": _demographics,
    "quoted": _quoted,
}


def draw_observation(
    rng: np.random.Generator, taste: Style, question: Question, kind: str | None = None
) -> Observation:
    """Draws a signal of a user.

    Args:
        rng: The random generator.
        taste: The user's taste.
        question: The prompt, if the signal is about an answer.
        kind: One of ``MIX``; ``None`` draws it by its frequency.
    """
    if kind is None:
        kind = str(rng.choice(list(MIX), p=list(MIX.values())))
    return _DRAW[kind](rng, taste, question)
