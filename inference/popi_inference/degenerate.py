"""Detects replies that are not summaries: echoes of the request, repetition, replies without a claim."""

from __future__ import annotations

import re
from collections.abc import Sequence

from popi.claims import claims_in, says_nothing, sentences_of
from popi.prompts import PromptSet
from popi.roles import SummaryPrompt
from popi.signals import Signal, Speaker

ECHO_WORDS = 6
"""Minimum number of words of a claim that counts as an echo of another person's text."""

REPEATS = 4
"""Minimum number of consecutive repeats of a sequence of words that count as a loop."""

LOOP_WORDS = 24
"""Minimum length of a loop at the end of a reply, in words."""

LONGEST_PERIOD = 32
"""Maximum length of the repeated sequence, in words."""


class Degenerate:
    """Finds the reason why a reply is not a summary.

    Args:
        prompts: The templates of the request.
    """

    def __init__(self, prompts: PromptSet) -> None:
        request = prompts.inference_messages("")
        self._request = _folded("\n".join(message.content for message in request))
        # A reply may have a short line in common with those of the examples.
        lines = (line for message in request if message.role != "assistant" for line in message.content.splitlines())
        self._headings = {_folded(line) for line in lines} - {""}
        self._marks = (prompts.open, prompts.close)
        labels = {
            template.partition("{")[0].strip()
            for line in (*prompts.signal.values(), *prompts.turn.values())
            for template in line.split("\n")
        } - {""}
        self._label = re.compile(rf"(?:\[\d+\]\s*)?(?:{'|'.join(map(re.escape, sorted(labels)))})\s")

    def reason(self, prompt: SummaryPrompt, reply: str) -> str | None:
        """Names what is wrong with a reply, or returns ``None``.

        Args:
            prompt: The request.
            reply: The reply, without reasoning.
        """
        if not reply.strip():
            return "the reply is empty"
        if repeats_itself(reply):
            return "the reply repeats itself"
        claims = [claim.text for claim in claims_in(reply)]
        if not claims:
            says_so = any(says_nothing(sentence) for sentence in sentences_of(reply))
            return None if says_so else "the reply contains no claim"
        echoed = sum(self._echoes(line, prompt) for line in reply.splitlines())
        if any(mark in reply for mark in self._marks) or 2 * echoed >= len(claims):
            return "the reply echoes the request"
        return None

    def _echoes(self, line: str, prompt: SummaryPrompt) -> bool:
        text = " ".join(sentences_of(line))
        if _folded(line) in self._headings or self._label.match(text):
            return True
        claim = _folded(text).rstrip(".!?")
        if len(claim.split()) < ECHO_WORDS:
            return False
        others = (words for signal in prompt.user.signals for words in _others_words(signal))
        return claim in self._request or any(claim in _folded(words) for words in others)


def repeats_itself(text: str) -> bool:
    r"""Whether most of a text is the same sentence, or its end is a loop.

    Example:
        >>> repeats_itself("The user likes tea. " * 5)
        True
        >>> repeats_itself("- likes tea\n- likes coffee")
        False
    """
    sentences = [_plain(sentence) for sentence in sentences_of(text)]
    surplus = len(sentences) - len(set(sentences))
    if surplus >= REPEATS - 1 and 2 * surplus > len(sentences):
        return True
    # A text without spaces, as in Chinese or Thai, loops in characters.
    words = text.split()
    units: Sequence[str] = words if len(text) < 12 * max(len(words), 1) else text
    return len(units) >= LOOP_WORDS and any(_tail_loops(units, period) for period in range(1, LONGEST_PERIOD + 1))


def _tail_loops(units: Sequence[str], period: int) -> bool:
    length = 0
    while length + period < len(units) and units[-1 - length] == units[-1 - length - period]:
        length += 1
    return length + period >= max(REPEATS * period, LOOP_WORDS)


def _others_words(signal: Signal) -> list[str]:
    """The texts of a signal that other people wrote."""
    fields = {"comment": ("about",), "rating": ("response",), "edit": ("original",), "pair": ("chosen", "rejected")}
    if signal.kind == "conversation":
        return [turn.text for turn in signal.turns if turn.speaker is not Speaker.USER]
    if signal.kind == "demographics":
        return []
    named = fields.get(signal.kind, ())
    if signal.said_by is not Speaker.USER:
        named = (*named, *(name for name in ("text",) if hasattr(signal, name)))
    return [getattr(signal, name) for name in named]


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _plain(text: str) -> str:
    return "".join(char for char in text.casefold() if char.isalnum() or char == " ").strip()
