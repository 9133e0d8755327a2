"""Signals as prompt text, under a budget of tokens.

Which signals are kept is decided by how much they say and how new they are; what is kept is shown oldest first, so a
new signal only adds to the end of the text and a cached prefix stays valid. Nothing is cut silently: the rendering
names what was left out, and a signal that alone exceeds the budget is cut with a mark that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
)

INFORMATIVENESS = {
    "statement": 4.0,
    "edit": 2.0,
    "comment": 2.0,
    "conversation": 1.5,
    "pair": 1.5,
    "rating": 1.0,
    "demographics": 0.5,
}
"""How much a signal of each kind is worth beside another of the same age, by judgement."""

HALF_LIFE = 32
"""A signal is worth half as much once this many newer ones have been seen."""

CUT_MARK = " [... cut to fit ...] "

CountTokens = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class RenderedSignals:
    """Signals as text.

    Attributes:
        text: The numbered signals, oldest first.
        shown: The id behind each number: signal ``n`` of the text is ``shown[n - 1]``.
        omitted: Ids left out for want of room, oldest first.
        cut: Ids shown in part.
        tokens: Length of ``text``.
    """

    text: str
    shown: tuple[str, ...]
    omitted: tuple[str, ...]
    cut: tuple[str, ...]
    tokens: int


def describe(signal: Signal) -> str:
    """One signal as text, without its number. Texts that are not the user's own are marked as such."""
    match signal:
        case PreferencePair():
            body = f"asked: {signal.prompt}\npreferred: {signal.chosen}\nover: {signal.rejected}"
        case Comment():
            body = f"on: {signal.about or signal.prompt or 'an answer'}\ncommented: {signal.text}"
        case Rating():
            scale = f"{signal.score:g} ({signal.worst:g} worst, {signal.best:g} best)"
            body = f"asked: {signal.prompt}\nread: {signal.response}\nrated: {scale}"
        case Edit():
            body = f"asked: {signal.prompt}\nread: {signal.original}\nrewrote: {signal.edited}"
        case Statement():
            body = f"said: {signal.text}"
        case Demographics():
            body = "about: " + ", ".join(f"{name} {value}" for name, value in signal.facts.items())
        case Conversation():
            names = {Speaker.USER: "said", Speaker.ASSISTANT: "assistant", Speaker.QUOTED: "quoted"}
            body = "\n".join(f"{names[turn.speaker]}: {turn.text}" for turn in signal.turns)
    return body if signal.said_by is Speaker.USER else f"not by the user, {signal.said_by.value}:\n{body}"


def render_signals(
    signals: Sequence[Signal], count_tokens: CountTokens, budget: int | None = None
) -> RenderedSignals:
    """Writes signals as numbered text of at most ``budget`` tokens.

    Args:
        signals: Oldest first, as in ``UserSignals``.
        count_tokens: The length of a text by the tokenizer of the model that will read it.
        budget: The most tokens that the text may have; ``None`` shows everything.

    Returns:
        The text and what became of each signal.

    Raises:
        ValueError: If the budget is not positive.
    """
    if budget is not None and budget <= 0:
        raise ValueError(f"the token budget must be positive, not {budget}")
    blocks = {place: describe(signal) for place, signal in enumerate(signals)}
    cut: set[int] = set()
    if budget is None:
        kept = list(blocks)
    else:
        kept = _choose(signals, blocks, count_tokens, budget)
        if not kept and blocks:
            first = max(blocks, key=lambda place: _worth(signals, place))
            blocks[first] = _shorten(blocks[first], count_tokens, budget)
            kept, cut = [first], {first}
    text = _join([blocks[place] for place in kept])
    return RenderedSignals(
        text=text,
        shown=tuple(signals[place].id for place in kept),
        omitted=tuple(signal.id for place, signal in enumerate(signals) if place not in set(kept)),
        cut=tuple(signals[place].id for place in sorted(cut)),
        tokens=count_tokens(text) if text else 0,
    )


def _join(blocks: Sequence[str]) -> str:
    return "\n".join(f"[{number}] {block}" for number, block in enumerate(blocks, start=1))


def _worth(signals: Sequence[Signal], place: int) -> tuple[bool, float, int]:
    signal = signals[place]
    age = len(signals) - 1 - place
    return signal.is_evidence, INFORMATIVENESS[signal.kind] * 0.5 ** (age / HALF_LIFE), place


def _choose(
    signals: Sequence[Signal], blocks: dict[int, str], count_tokens: CountTokens, budget: int
) -> list[int]:
    """Takes the best signals that fit, whole; a long one is passed over in favour of shorter ones behind it."""
    kept: list[int] = []
    spent = 0
    for place in sorted(blocks, key=lambda place: _worth(signals, place), reverse=True):
        # The number in front and the line end behind count too, and a token may straddle a seam: two spare.
        cost = count_tokens(f"[{len(signals)}] {blocks[place]}\n") + 2
        if spent + cost <= budget:
            kept.append(place)
            spent += cost
        elif budget - spent < 8:
            break
    return sorted(kept)


def _shorten(block: str, count_tokens: CountTokens, budget: int) -> str:
    """Keeps the head and the tail of a text around a mark, as much as fits (bisection on characters)."""
    low, high = 0, len(block) // 2
    while low < high:
        half = (low + high + 1) // 2
        if count_tokens(_around(block, half)) + 6 <= budget:
            low = half
        else:
            high = half - 1
    return _around(block, low)


def _around(block: str, half: int) -> str:
    return block[:half] + CUT_MARK + (block[-half:] if half else "")
