"""The response of a model in this process while its tokens are generated: decoded, without reasoning, in pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import replace

from popi.backends.base import ChatRequest, ChatResult, FinishReason
from popi.backends.results import ORPHAN, complete
from popi.engine.answer import Answer
from popi.io import writable
from popi.reasoning import ReasoningFilter, strip_reasoning

Decode = Callable[[Sequence[int]], str]


class Response:
    """The response to one request.

    Stop strings are searched in the visible text: they do not end a response inside its reasoning.

    Args:
        request: The request.
        decode: Decodes the new tokens, and keeps the markers of reasoning blocks; see :func:`after_prefix`.
        end_tokens: Token ids that end a response.
        opened: Whether the rendered conversation ends inside a reasoning block.
        emit: Called with each piece of the text as soon as it is final, first with the prefix.

    Attributes:
        watch: Takes all tokens after each new one, and returns whether a stop string ends the response. ``None`` if the
            request has no stop strings.
    """

    def __init__(
        self,
        request: ChatRequest,
        decode: Decode,
        end_tokens: Set[int],
        *,
        opened: bool = False,
        emit: Callable[[str], None] | None = None,
    ) -> None:
        self._request, self._end_tokens, self._emit = request, end_tokens, emit
        self._reasoning = ReasoningFilter(opened=opened)
        self._reasoning.feed(request.response_prefix)
        self._prefix = self._unsent = writable(request.response_prefix)
        self._opened = self._reasoning.inside
        self._answer = Answer(decode, end_tokens, request.stop, self._send if emit else None, self._visible)
        self.watch = self._watch if self._answer.watches else None

    def result(self, tokens: Sequence[int], reason: FinishReason, *, prompt_tokens: int, model: str) -> ChatResult:
        """Emits the rest of the text, and makes the result.

        Args:
            tokens: All tokens, including the end token.
            reason: Why the response ended: ``stop`` or ``length``.
            prompt_tokens: Length of the rendered conversation and the prefix.
            model: Name of the model.
        """
        text, _ = self._answer.finish(tokens)
        if self._reasoning.orphan:
            if self._emit:
                return ChatResult.failed(ORPHAN, "malformed", model=model, prompt_tokens=prompt_tokens)
            text = strip_reasoning(text) or ""
        by_stop_string = reason == "stop" and not (tokens and tokens[-1] in self._end_tokens)
        thinking = self._reasoning.inside and not by_stop_string
        result = complete(
            "" if thinking else text,
            reason,
            replace(self._request, response_prefix=""),
            model=model,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(tokens),
            reasoned=thinking,
        )
        return result if result.error else replace(result, text=self._prefix + result.text)

    def _watch(self, tokens: Sequence[int]) -> bool:
        self._send("")
        return self._answer.watch(tokens)

    def _send(self, piece: str) -> None:
        """Emits a piece, and the prefix before the first one."""
        for part in (self._unsent, piece):
            if part and self._emit:
                self._emit(part)
        self._unsent = ""

    def _visible(self, text: str, final: bool) -> str:
        """The text without reasoning."""
        self._reasoning = ReasoningFilter(opened=self._opened)
        return self._reasoning.feed(text) + (self._reasoning.finish() if final else "")


def after_prefix(decode: Decode, prefix: Sequence[int]) -> Decode:
    """Makes a decoder of the tokens that follow a prefix: some tokenizers drop the space before a first token."""
    if not prefix:
        return decode
    length = len(decode(prefix))
    return lambda tokens: decode([*prefix, *tokens])[length:]
