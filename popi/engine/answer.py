"""The text of one answer while its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

# What a decoder writes for bytes that are not, or not yet, a character.
INCOMPLETE = "\ufffd"


class Answer:
    """Follows one answer: ends it at a stop text, and gives its text in pieces that stay true.

    Args:
        decode: Token ids to text, without control tokens.
        end_tokens: Ids that end an answer and are not part of its text.
        stop: Texts that end the answer and are not part of it.
        emit: Takes each piece of text as soon as it can no longer change.

    Attributes:
        watches: Whether :meth:`watch` has anything to do.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        end_tokens: Set[int],
        stop: Sequence[str] = (),
        emit: Callable[[str], None] | None = None,
    ) -> None:
        self._decode, self._end_tokens, self._emit = decode, end_tokens, emit
        self._stop = [text for text in stop if text]
        self._given = 0
        self.watches = bool(self._stop or emit)

    def watch(self, tokens: Sequence[int]) -> bool:
        """Looks at all tokens so far, and says whether a stop text ends the answer here."""
        text, stopped = self._text(tokens)
        if not stopped:
            self._give(text[: settled(text, self._stop)])
        return stopped

    def finish(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """The whole text, and whether it came to an end by itself; gives what has not been given."""
        text, stopped = self._text(tokens)
        self._give(text)
        return text, stopped or (bool(tokens) and tokens[-1] in self._end_tokens)

    def _text(self, tokens: Sequence[int]) -> tuple[str, bool]:
        ended = bool(tokens) and tokens[-1] in self._end_tokens
        text = self._decode(tokens[:-1] if ended else tokens)
        cut = first_stop(text, self._stop)
        return text[:cut], cut is not None

    def _give(self, text: str) -> None:
        if self._emit and len(text) > self._given:
            self._emit(text[self._given :])
            self._given = len(text)


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop text begins that is whole first: so an answer does not depend on how it is cut into tokens."""
    found = ((place + len(end), place) for end in stop if end and (place := text.find(end)) >= 0)
    return min(found, default=(None, None))[1]


def settled(text: str, stop: Sequence[str]) -> int:
    """How much of a growing text can no longer change, in characters.

    The rest is half a character, or the beginning of a stop text.
    """
    whole = text.rstrip(INCOMPLETE)
    held = (
        length
        for length in range(1, max(map(len, stop), default=1))
        if any(whole.endswith(end[:length]) for end in stop if len(end) > length)
    )
    return len(whole) - max(held, default=0)
