"""Signals as prompt text, under a budget of tokens.

Which signals are kept is decided by how much they say and how new they are; what is kept is shown oldest first, so a
new signal only adds to the end of the text and a cached prefix stays valid. Nothing is cut silently: the rendering
names what was left out, and a signal that alone exceeds the budget is cut with a mark that says so.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from popi.prompts import CUT_MARK, FACT, NOT_BY_USER, NUMBERED, SIGNAL, TURN, UNNAMED, quote
from popi.signals import Comment, Conversation, Demographics, Rating, Signal, Speaker

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

PATIENCE = 32
"""Once this many signals in a row were too long for what is left of the budget, no more are tried."""

LEAST = 16
"""Characters of each text that a cut leaves at least: less says nothing."""

CountTokens = Callable[[str], int]

_STARTS = {
    line.partition("{")[0].strip()
    for template in (*SIGNAL.values(), *TURN.values(), NOT_BY_USER)
    for line in template.split("\n")
} - {""}
# Whatever is not a letter or a digit may stand in front: marks of a list, characters without width.
_LIKE_OURS = re.compile(rf"\n(?=[^\w\n\[]*(?i:\[[^\w\n]*\d|{'|'.join(map(re.escape, sorted(_STARTS)))}))")


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


def describe(signal: Signal, limit: int | None = None) -> str:
    """One signal as text, without its number.

    Texts that are not the user's own are marked as such, and lines of any text that begin like ours are quoted with
    ``>``, so that it does not pass for another signal or speaker.

    Args:
        signal: The signal.
        limit: The most characters of each text, cut out of its middle, and eight times the most turns of a
            conversation, cut off its beginning; ``None`` shows everything.
    """

    def words(text: str) -> str:
        return _LIKE_OURS.sub("\n> ", quote(text if limit is None else _cut(text, limit)))

    match signal:
        case Conversation(turns=turns):
            last = turns if limit is None else turns[-max(limit // 8, 1) :]
            lines = [TURN[turn.speaker].format(text=words(turn.text)) for turn in last]
            body = "\n".join(lines if len(last) == len(turns) else [CUT_MARK.strip(), *lines])
        case Comment(text=text, about=about, prompt=prompt):
            body = SIGNAL["comment"].format(about=words(about or prompt or UNNAMED), text=words(text))
        case Rating(prompt=prompt, response=response, score=score, worst=worst, best=best):
            body = SIGNAL["rating"].format(
                prompt=words(prompt), response=words(response), score=score, worst=worst, best=best
            )
        case Demographics(facts=facts):
            known = ", ".join(FACT.format(name=name, value=value) for name, value in facts.items())
            body = SIGNAL["demographics"].format(facts=words(known))
        case _:
            texts = signal.model_dump(exclude={"id", "time", "origin", "said_by", "kind"})
            body = SIGNAL[signal.kind].format(**{name: words(text) for name, text in texts.items()})
    if signal.said_by is Speaker.USER:
        return body
    return NOT_BY_USER.format(speaker=signal.said_by.value, signal=body)


def render_signals(signals: Sequence[Signal], count_tokens: CountTokens, budget: int | None = None) -> RenderedSignals:
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
    cut: set[int] = set()
    if budget is None:
        blocks = {place: describe(signal) for place, signal in enumerate(signals)}
    else:
        order = _best_first(signals)
        blocks = _choose(signals, order, count_tokens, budget)
        # Whatever fits is no substitute for evidence: the best signal is shown in part rather than not at all.
        if order and all(signals[place].is_evidence != signals[order[0]].is_evidence for place in blocks):
            shortened = _shorten(signals[order[0]], count_tokens, budget)
            if shortened is not None:
                blocks = {order[0]: shortened}
                cut = set(blocks) if shortened != describe(signals[order[0]]) else set()
    kept = sorted(blocks)
    text = _join(blocks[place] for place in kept)
    return RenderedSignals(
        text=text,
        shown=tuple(signals[place].id for place in kept),
        omitted=tuple(signal.id for place, signal in enumerate(signals) if place not in blocks),
        cut=tuple(signals[place].id for place in cut),
        tokens=count_tokens(text) if text else 0,
    )


def _join(blocks: Iterable[str]) -> str:
    return "\n".join(NUMBERED.format(number=place, signal=block) for place, block in enumerate(blocks, start=1))


def _best_first(signals: Sequence[Signal]) -> list[int]:
    """The places of the signals: evidence first, then by kind and age."""

    def worth(place: int) -> tuple[bool, float, int]:
        age = len(signals) - 1 - place
        kind = INFORMATIVENESS[signals[place].kind]
        return signals[place].is_evidence, kind * 0.5 ** (age / HALF_LIFE), place

    return sorted(range(len(signals)), key=worth, reverse=True)


def _choose(signals: Sequence[Signal], order: Sequence[int], count_tokens: CountTokens, budget: int) -> dict[int, str]:
    """Takes the best signals that fit, whole; a long one is passed over in favour of shorter ones behind it."""
    blocks: dict[int, str] = {}
    left, misses = budget, 0
    for place in order:
        block = describe(signals[place])
        cost = _count_up_to(left, NUMBERED.format(number=len(signals), signal=block) + "\n", count_tokens)
        if cost <= left:
            blocks[place] = block
            left, misses = left - cost, 0
        else:
            misses += 1
            if misses == PATIENCE:
                break
    # A text may have more tokens than its parts.
    while blocks and count_tokens(_join(blocks[place] for place in sorted(blocks))) > budget:
        blocks.popitem()
    return blocks


def _shorten(signal: Signal, count_tokens: CountTokens, budget: int) -> str | None:
    """As much of a signal as fits, or ``None`` if what fits says nothing."""

    def too_long(limit: int) -> bool:
        return _count_up_to(budget, _join([describe(signal, limit)]), count_tokens) > budget

    limits = range(LEAST, len(describe(signal)))
    fitting = bisect_left(limits, True, key=too_long)
    return describe(signal, limits[fitting - 1]) if fitting else None


def _count_up_to(limit: int, text: str, count_tokens: CountTokens) -> int:
    """The length of a text, or of a beginning of it that is over the limit already."""
    # Few texts have so many characters to a token, so what is far too long is seldom counted to its end.
    beginning = text[: 8 * (limit + 1)]
    count = count_tokens(beginning)
    return count if count > limit or len(beginning) == len(text) else count_tokens(text)


def _cut(text: str, limit: int) -> str:
    half = limit // 2
    return text if len(text) <= limit + len(CUT_MARK) else text[:half] + CUT_MARK + text[-half:]
