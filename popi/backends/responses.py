"""Tokens of a model in this process to a response: reasoning removed, prefix in front, empty responses as failures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from itertools import groupby

from popi.backends.base import ChatRequest, ChatResult, FinishReason
from popi.backends.reasoning import MARKERS, ReasoningFilter, strip_reasoning
from popi.engine.answer import Answer

Decode = Callable[[Sequence[int]], str]


class Response:
    """The response to one request, while its tokens are generated.

    Args:
        request: The request.
        decode: Decodes token ids to text; see :func:`keeping_markers`.
        end_tokens: Token ids that end a response.
        opened: Whether the rendered conversation ends inside a reasoning block.
        emit: Called with each piece of the text as soon as it is final.

    Attributes:
        watch: Takes all tokens after each new one, and returns whether a stop string ends the response. ``None`` if
            there is nothing to watch for.
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
        self._request, self._end_tokens, self._emit, self._opened = request, end_tokens, emit, opened
        self._unsent = request.response_prefix
        self._inside = self._orphan = False
        self._answer = Answer(decode, end_tokens, request.stop, self._send if emit else None, self._visible)
        self.watch = self._watch if self._answer.watches else None

    def result(self, tokens: Sequence[int], reason: FinishReason, *, prompt_tokens: int, model: str) -> ChatResult:
        """Emits the rest, and makes the result.

        Args:
            tokens: All tokens, including the end token.
            reason: Why the response ended: ``stop`` or ``length``.
            prompt_tokens: Length of the rendered conversation.
            model: Name of the model.
        """
        text, _ = self._answer.finish(tokens)
        self._send("")
        if self._orphan and not self._emit:
            text = strip_reasoning(text) or ""
        result = ChatResult(self._request.response_prefix + text, reason, prompt_tokens, len(tokens), model)
        if self._orphan and self._emit:
            why = "the response closes a reasoning block that it never opened"
            failed = ChatResult.failed(why, "malformed", model=model, prompt_tokens=prompt_tokens)
        elif (self._inside and not self._stopped(tokens, reason)) or not result.text.strip():
            why = self._why_empty(tokens, reason)
            failed = ChatResult.failed(why, "empty", model=model, prompt_tokens=prompt_tokens)
        else:
            return result
        return replace(failed, completion_tokens=len(tokens))

    def _why_empty(self, tokens: Sequence[int], reason: FinishReason) -> str:
        if reason == "length":
            what = "reasoning used" if self._inside else "there is no text in"
            return f"empty response: {what} all {len(tokens)} tokens; raise max_tokens"
        if self._stopped(tokens, reason):
            return "empty response: it starts with a stop string"
        where = "inside its reasoning" if self._inside else "without any text"
        return f"empty response: the model ended its turn {where}; change the prompt or the sampling"

    def _stopped(self, tokens: Sequence[int], reason: FinishReason) -> bool:
        """Whether a stop string ended the response."""
        return reason == "stop" and not (tokens and tokens[-1] in self._end_tokens)

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
        """The text without reasoning, which the conversation or the prefix may have started."""
        reasoning = ReasoningFilter(opened=self._opened)
        reasoning.feed(self._request.response_prefix)
        reasoning.finish()
        reasoning.orphan = False
        visible = reasoning.feed(text) + (reasoning.finish() if final else "")
        self._inside, self._orphan = reasoning.inside, reasoning.orphan
        return visible


def keeping_markers(decode: Decode, special: Mapping[int, str]) -> Decode:
    """Makes a decoder keep the control tokens that are part of the markers of reasoning blocks.

    Some families spell these markers with control tokens, which are not part of a text otherwise.

    Args:
        decode: Decodes token ids to text without control tokens.
        special: Text of each control token.
    """
    markers = [*MARKERS, *MARKERS.values()]
    kept = {token: text for token, text in special.items() if any(text in marker for marker in markers)}

    def decode_with_markers(tokens: Sequence[int]) -> str:
        runs = groupby(tokens, key=lambda token: token in kept)
        return "".join("".join(kept[token] for token in run) if marks else decode(list(run)) for marks, run in runs)

    return decode_with_markers if kept else decode


def opens_reasoning(text: str) -> bool:
    """Whether a rendered conversation ends with the opening marker of a reasoning block."""
    return text.rstrip().endswith(tuple(MARKERS))
