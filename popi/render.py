"""Renders signals as prompt text under a budget of tokens.

Which signals are kept depends on their kind and age. Signals are shown oldest first, so that a new signal extends the
end of the text and a cached prefix stays valid. Nothing is cut silently: the result names the omitted signals, and a
single signal that exceeds the budget is cut with a visible marker.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial

from popi.prompts import DEFAULT, PromptSet, quote
from popi.signals import Comment, Conversation, Demographics, Rating, Signal, Speaker, Statement
from popi.summary import fits

INFORMATIVENESS = {
    "statement": 4.0,
    "edit": 2.0,
    "comment": 2.0,
    "conversation": 1.5,
    "pair": 1.5,
    "rating": 1.0,
    "demographics": 0.5,
}
"""Weight of a signal of each kind relative to another of the same age, by judgement."""

HALF_LIFE = 32
"""Number of newer signals after which the weight of a signal halves."""

REPEATS = 3
"""Number of signals with the same words, newest first, after which further ones have a lower priority."""

MAX_MISSES = 32
"""Maximum number of consecutive signals that do not fit. After them no more are tried."""

LEAST = 16
"""Minimum number of characters that a cut leaves of each text."""

CountTokens = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class RenderedSignals:
    """Signals as text.

    Attributes:
        text: The numbered signals, oldest first.
        shown: The signal id of each number: signal ``n`` of the text is ``shown[n - 1]``.
        omitted: Ids of signals that did not fit, oldest first.
        cut: Ids of signals that are shown in part.
    """

    text: str
    shown: tuple[str, ...]
    omitted: tuple[str, ...]
    cut: tuple[str, ...]


def describe(signal: Signal, limit: int | None = None, prompts: PromptSet = DEFAULT) -> str:
    """Renders one signal as text, without its number.

    Text by another person is marked as such. Lines that start like one of the labels of the templates are quoted with
    ``>``, so that no text passes for another signal or speaker.

    Args:
        signal: The signal.
        limit: Maximum number of characters of each text, cut out of its middle, and eight times the maximum number of
            turns of a conversation, cut off its beginning. ``None`` shows everything.
        prompts: The templates.
    """
    like_ours = _labels(prompts)

    def words(text: str) -> str:
        return like_ours.sub("\n> ", quote(text if limit is None else _cut(text, limit, prompts.cut)))

    match signal:
        case Conversation(turns=turns):
            last = turns if limit is None else turns[-max(limit // 8, 1) :]
            lines = [prompts.turn[turn.speaker].format(text=words(turn.text)) for turn in last]
            body = "\n".join(lines if len(last) == len(turns) else [prompts.cut.strip(), *lines])
        case Comment(text=text, about=about, prompt=prompt):
            body = prompts.signal["comment"].format(about=words(about or prompt or prompts.unnamed), text=words(text))
        case Rating(prompt=prompt, response=response, score=score, worst=worst, best=best):
            body = prompts.signal["rating"].format(
                prompt=words(prompt), response=words(response), score=score, worst=worst, best=best
            )
        case Demographics(facts=facts):
            known = ", ".join(prompts.fact.format(name=name, value=value) for name, value in facts.items())
            body = prompts.signal["demographics"].format(facts=words(known))
        case _:
            texts = signal.model_dump(exclude={"id", "time", "origin", "said_by", "kind"})
            body = prompts.signal[signal.kind].format(**{name: words(text) for name, text in texts.items()})
    if signal.said_by is Speaker.USER:
        return body
    return prompts.not_by_user.format(speaker=signal.said_by.value, signal=body)


def render_signals(
    signals: Sequence[Signal],
    count_tokens: CountTokens,
    budget: int | None = None,
    prompts: PromptSet = DEFAULT,
) -> RenderedSignals:
    """Renders signals as numbered text of at most ``budget`` tokens.

    Signals with the same text are shown once, at the place of the newest, with their count.

    Args:
        signals: The signals, oldest first.
        count_tokens: Counts the tokens of a text with the tokenizer of the model that will read it; at most its
            number of UTF-8 bytes.
        budget: Maximum number of tokens of the text. ``None`` shows everything.
        prompts: The templates.

    Returns:
        The text, and which signals are in it.

    Raises:
        ValueError: If the budget is not positive.
    """
    if budget is not None and budget <= 0:
        raise ValueError(f"the token budget must be positive, not {budget}")
    return _Rendering(signals, count_tokens, prompts).render(budget)


class _Rendering:
    """One rendering of a user's signals."""

    def __init__(self, signals: Sequence[Signal], count_tokens: CountTokens, prompts: PromptSet) -> None:
        self._count_tokens, self._prompts = count_tokens, prompts
        self._all = signals
        same: dict[str, list[Signal]] = {}
        for signal in reversed(signals):
            same.setdefault(describe(signal, prompts=prompts), []).append(signal)
        # The loop above runs from newest to oldest, so that the newest of equal signals represents them.
        groups = list(reversed(same.items()))
        self._signals = [group[0] for _, group in groups]
        self._groups = [group for _, group in groups]
        self._texts = [self._repeated(text, len(group)) for text, group in groups]

    def render(self, budget: int | None) -> RenderedSignals:
        """Chooses signals and joins their texts."""
        cut: set[int] = set()
        if budget is None or self._fits(self._join(self._texts), budget):
            blocks = dict(enumerate(self._texts))
        else:
            order = _best_first(self._signals)
            blocks = self._choose(order, budget)
            # A signal that fits cannot replace evidence: the best signal is cut rather than left out.
            if order and all(self._signals[n].is_evidence != self._signals[order[0]].is_evidence for n in blocks):
                shortened = self._shorten(order[0], budget)
                if shortened is not None:
                    blocks = {order[0]: shortened}
                    cut = set(blocks) if shortened != self._texts[order[0]] else set()
        kept = sorted(blocks)
        shown = {signal.id for place in kept for signal in self._groups[place]}
        return RenderedSignals(
            text=self._join(blocks[place] for place in kept),
            shown=tuple(self._signals[place].id for place in kept),
            omitted=tuple(signal.id for signal in self._all if signal.id not in shown),
            cut=tuple(self._signals[place].id for place in cut),
        )

    def _repeated(self, text: str, count: int) -> str:
        return text if count == 1 else self._prompts.repeated.format(signal=text, count=count)

    def _numbered(self, number: int, text: str) -> str:
        return self._prompts.numbered.format(number=number, signal=text)

    def _join(self, blocks: Iterable[str]) -> str:
        return "\n".join(self._numbered(place, block) for place, block in enumerate(blocks, start=1))

    def _choose(self, order: Sequence[int], budget: int) -> dict[int, str]:
        """Takes the best signals that fit, whole. A long one is skipped in favour of later, shorter ones."""
        blocks: dict[int, str] = {}
        left, misses = budget, 0
        for place in order:
            cost = self._count_up_to(left, self._numbered(len(self._signals), self._texts[place]) + "\n")
            if cost <= left:
                blocks[place] = self._texts[place]
                left, misses = left - cost, 0
            else:
                misses += 1
                if misses == MAX_MISSES:
                    break
        # A text may have more tokens than its parts.
        while blocks and not self._fits(self._join(blocks[place] for place in sorted(blocks)), budget):
            blocks.popitem()
        return blocks

    def _shorten(self, place: int, budget: int) -> str | None:
        """The part of a signal that fits, or ``None`` if the part is too short to be useful."""
        signal, count = self._signals[place], len(self._groups[place])

        def text(limit: int) -> str:
            return self._repeated(describe(signal, limit, self._prompts), count)

        def too_long(limit: int) -> bool:
            return not self._fits(self._join([text(limit)]), budget)

        limits = range(LEAST, len(self._texts[place]))
        fitting = bisect_left(limits, True, key=too_long)
        return text(limits[fitting - 1]) if fitting else None

    def _fits(self, text: str, budget: int) -> bool:
        return fits(text, budget, partial(self._count_up_to, budget))

    def _count_up_to(self, limit: int, text: str) -> int:
        """The length of a text, or of its first part if that is already over the limit."""
        # Few texts have this many characters per token, so a text that is much too long is rarely counted to its end.
        beginning = text[: 8 * (limit + 1)]
        count = self._count_tokens(beginning)
        return count if count > limit or len(beginning) == len(text) else self._count_tokens(text)


def _best_first(signals: Sequence[Signal]) -> list[int]:
    """Indices of the signals: evidence first, then signals whose words are not repeated often, then by kind and age."""
    said = Counter[str]()
    is_new = dict[int, bool]()
    for place, signal in reversed(list(enumerate(signals))):
        words = _said(signal)
        said[words] += bool(words)
        is_new[place] = said[words] <= REPEATS

    def priority(place: int) -> tuple[bool, bool, float, int]:
        age = len(signals) - 1 - place
        kind = INFORMATIVENESS[signals[place].kind]
        return signals[place].is_evidence, is_new[place], kind * 0.5 ** (age / HALF_LIFE), place

    return sorted(range(len(signals)), key=priority, reverse=True)


def _said(signal: Signal) -> str:
    """The words of a statement or comment, without case and punctuation."""
    text = signal.text if isinstance(signal, Statement | Comment) else ""
    return " ".join(re.findall(r"\w+", text.casefold()))


@cache
def _labels(prompts: PromptSet) -> re.Pattern[str]:
    """Matches the line break before a line that starts like one of the labels of the templates."""
    starts = {
        line.partition("{")[0].strip()
        for template in (*prompts.signal.values(), *prompts.turn.values(), prompts.not_by_user)
        for line in template.split("\n")
    } - {""}
    # Characters other than letters and digits may come first: list marks, zero-width characters.
    return re.compile(rf"\n(?=[^\w\n\[]*(?i:\[[^\w\n]*\d|{'|'.join(map(re.escape, sorted(starts)))}))")


def _cut(text: str, limit: int, mark: str) -> str:
    half = limit // 2
    return text if len(text) <= limit + len(mark) else text[:half] + mark + text[-half:]
