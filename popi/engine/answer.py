"""The text of one response while its tokens are generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

# The character that a tokenizer returns for bytes that are not, or not yet, a character.
INCOMPLETE = "\ufffd"


def all_of_it(text: str, final: bool) -> str:
    """The default ``visible``: everything."""
    return text


class Answer:
    """Follows one response: ends it at a stop string, and emits its text in pieces that no later token changes.

    Args:
        decode: Decodes token ids to text, without control tokens.
        end_tokens: Token ids that end a response. They are not part of its text.
        stop: Strings that end the response. They are not part of it.
        emit: Called with each piece of text as soon as it is final.
        visible: Returns the visible part of the text so far, in which stop strings are searched. The second argument is
            true for the whole text. Visible text must stay visible when the text grows.

    Attributes:
        watches: Whether :meth:`watch` has anything to do.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        end_tokens: Set[int],
        stop: Sequence[str] = (),
        emit: Callable[[str], None] | None = None,
        visible: Callable[[str, bool], str] = all_of_it,
    ) -> None:
        self._decode, self._end_tokens, self._emit, self._visible = decode, end_tokens, emit, visible
        self._stop = [text for text in stop if text]
        self._emitted = 0
        self.watches = bool(self._stop or emit)

    def watch(self, tokens: Sequence[int]) -> bool:
        """Takes all tokens so far, and returns whether a stop string ends the response here."""
        text, stopped = self._text(tokens, final=False)
        if not stopped:
            self._emit_up_to(text[: settled(text, self._stop)])
        return stopped

    def finish(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """Emits the rest, and returns the whole text and whether an end token or a stop string ended it."""
        text, stopped = self._text(tokens, final=True)
        self._emit_up_to(text)
        return text, stopped or (bool(tokens) and tokens[-1] in self._end_tokens)

    def _text(self, tokens: Sequence[int], *, final: bool) -> tuple[str, bool]:
        ended = bool(tokens) and tokens[-1] in self._end_tokens
        text = self._visible(self._decode(tokens[:-1] if ended else tokens), final)
        cut = first_stop(text, self._stop)
        return text[:cut], cut is not None

    def _emit_up_to(self, text: str) -> None:
        if self._emit and len(text) > self._emitted:
            self._emit(text[self._emitted :])
            self._emitted = len(text)


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Start of the stop string that is complete first, so that a response does not depend on its tokenization."""
    found = ((place + len(end), place) for end in stop if end and (place := text.find(end)) >= 0)
    return min(found, default=(None, None))[1]


def settled(text: str, stop: Sequence[str]) -> int:
    """Number of characters of a growing text that can no longer change.

    The rest is part of a character, or the start of a stop string.
    """
    whole = text.rstrip(INCOMPLETE)
    held = (
        length
        for length in range(1, max(map(len, stop), default=1))
        if any(whole.endswith(end[:length]) for end in stop if len(end) > length)
    )
    return len(whole) - max(held, default=0)
