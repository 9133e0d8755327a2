"""Reasoning blocks: text that a model writes for itself before its response.

Servers with a reasoning parser return it in a separate field. Others, and models in this process, leave it in the text,
between markers. Every backend removes it here, so that a response never contains reasoning.
"""

from __future__ import annotations

import re

MARKERS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<thoughts>": "</thoughts>",
    "<reasoning>": "</reasoning>",
    "<reflection>": "</reflection>",
    "<scratchpad>": "</scratchpad>",
    "[THINK]": "[/THINK]",
    "<seed:think>": "</seed:think>",
    "<mm:think>": "</mm:think>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|thinking|>": "<|/thinking|>",
    "<|inner_prefix|>": "<|inner_suffix|>",
    "\u25c1think\u25b7": "\u25c1/think\u25b7",
    "<|channel>": "<channel|>",
    "<|channel|>analysis<|message|>": "<|channel|>final<|message|>",
}
"""Opening and closing markers of reasoning blocks, by model family. They are found in upper and lower case."""

_CLOSING_OF = {opening.lower(): closing for opening, closing in MARKERS.items()}
_ALL = tuple(marker.lower() for pair in MARKERS.items() for marker in pair)
_LONGEST = max(map(len, _ALL))
_BEGINNINGS = frozenset(marker[:length] for marker in _ALL for length in range(1, len(marker) + 1))
_OPENING = re.compile("|".join(map(re.escape, MARKERS)), re.IGNORECASE)
_CLOSING = re.compile("|".join(map(re.escape, MARKERS.values())), re.IGNORECASE)
_MARKER = re.compile(f"{_OPENING.pattern}|{_CLOSING.pattern}", re.IGNORECASE)


class ReasoningFilter:
    """Removes reasoning blocks from a text that arrives in pieces.

    White space next to a block at the start of the text is removed with it. The visible pieces, joined, do not depend
    on how the text was split.

    Example:
        >>> reasoning = ReasoningFilter()
        >>> reasoning.feed("<thi"), reasoning.feed("nk>hm</think> yes"), reasoning.finish()
        ('', 'yes', '')

    Args:
        opened: Whether the text starts inside a block, because the chat template opened one.

    Attributes:
        inside: Whether the text ended, so far, inside a block.
        orphan: Whether a closing marker appeared without an opening one, after visible text. That text was reasoning;
            if it was already emitted, the stream is malformed.
    """

    def __init__(self, *, opened: bool = False) -> None:
        self.inside, self.orphan = opened, False
        self._end = _CLOSING if opened else _MARKER
        self._held, self._blank = "", ""
        self._started = self._trim = False

    def feed(self, piece: str) -> str:
        """Takes the next piece, and returns the text that can now be shown."""
        self._held += piece
        visible = ""
        while found := self._end.search(self._held):
            visible += self._take(found.start())
            self._held = self._held[len(found[0]) :]
            visible += self._pass(found[0])
        return visible + self._take(len(self._held) - _start_of_marker(self._held))

    def finish(self) -> str:
        """Returns the rest of the visible text at the end of the response."""
        return self._take(len(self._held))

    def _pass(self, marker: str) -> str:
        """Enters or leaves a block, and returns the marker if it belongs to no block."""
        closing = _CLOSING_OF.get(marker.lower())
        if not self.inside and closing is None and self._started:
            self.orphan = True
            return marker
        self.inside = not self.inside and closing is not None
        self._end = re.compile(re.escape(closing), re.IGNORECASE) if self.inside and closing else _MARKER
        self._trim = True
        return ""

    def _take(self, length: int) -> str:
        """Removes characters from the start of the held text, and returns those that are visible."""
        text, self._held = self._held[:length], self._held[length:]
        if self.inside:
            return ""
        if not self._started:
            text, self._blank = self._blank + text, ""
            if not text.strip():
                self._blank = text
                return ""
            text, self._started = (text.lstrip() if self._trim else text), True
        return text


def strip_reasoning(text: str, *, opened: bool = False) -> str | None:
    """Removes reasoning blocks from a whole response.

    A closing marker without an opening one ends a block that the chat template opened.

    Args:
        text: The response.
        opened: Whether it starts inside a block.

    Returns:
        The response without reasoning, or ``None`` if it ended inside a block, without a response.

    Example:
        >>> strip_reasoning("<think>short?</think> Yes.")
        'Yes.'
        >>> strip_reasoning("<think>so I will") is None
        True
    """
    first_opening, first_closing = _OPENING.search(text), _CLOSING.search(text)
    if first_closing and (first_opening is None or first_closing.start() < first_opening.start()):
        opened = True
    reasoning = ReasoningFilter(opened=opened)
    shown = reasoning.feed(text) + reasoning.finish()
    return None if reasoning.inside else shown


def _start_of_marker(text: str) -> int:
    """Length of the longest end of a text that could be the beginning of a marker."""
    end = text[1 - _LONGEST :].lower()
    return next((size for size in range(len(end), 0, -1) if end[-size:] in _BEGINNINGS), 0)
