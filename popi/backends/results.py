"""Makes a result from the output of a model, or a failure with the reason."""

from __future__ import annotations

import math
from dataclasses import replace

from popi.backends.base import ChatRequest, ChatResult, FinishReason, ScoreResult
from popi.io import writable
from popi.reasoning import ReasoningFilter, strip_reasoning

ORPHAN = (
    "malformed response: a reasoning block ended after its text was already shown; "
    "turn on the reasoning parser of the server, or do not stream"
)


def complete(
    text: str,
    reason: FinishReason,
    request: ChatRequest,
    *,
    model: str,
    prompt_tokens: int = 0,
    completion_tokens: int = 0,
    opened: bool = False,
    reasoned: bool = False,
    tool_calls: bool = False,
) -> ChatResult:
    """Makes the result of a response. Reasoning is removed, the prefix is added, and lone surrogates are replaced.

    Args:
        text: The text that the model generated after the conversation and the prefix.
        reason: Why it ended.
        request: The request.
        model: Name of the model.
        prompt_tokens: Length of the rendered conversation.
        completion_tokens: Number of new tokens; 0 if unknown.
        opened: Whether the chat template opened a reasoning block.
        reasoned: Whether reasoning arrived in a separate field.
        tool_calls: Whether the model called tools.

    Returns:
        The result. It is a failure of kind ``empty`` if no text is left, unless the model refused or a filter removed
        the text.
    """
    prefix = writable(request.response_prefix)
    shown = strip_reasoning(writable(text), opened=_opens(prefix, opened))
    result = ChatResult("", reason, prompt_tokens, completion_tokens, model)
    if shown is not None and shown.strip():
        return replace(result, text=prefix + shown)
    if reason in ("refused", "filtered"):
        return result
    used = completion_tokens or request.max_tokens
    if tool_calls:
        why = "the model called tools instead of writing text"
    elif reason == "length" and (reasoned or shown is None):
        why = f"reasoning used all {used} tokens; raise max_tokens"
    elif reason == "length":
        why = f"all {used} tokens were used without writing text; raise max_tokens"
    elif reasoned or shown is None:
        why = "the model wrote reasoning and no response"
    else:
        why = "the model wrote no text"
    return replace(result, finish_reason="error", error=f"the response is empty: {why}", failure="empty")


def scored(logprob: float, tokens: int, *, model: str, prompt_tokens: int = 0) -> ScoreResult:
    """Makes the result of a score. It is a failure of kind ``malformed`` if the log-probability is not finite."""
    if math.isfinite(logprob):
        return ScoreResult(logprob, tokens, prompt_tokens, model)
    error = f"malformed response: the log-probability is not finite ({logprob})"
    return ScoreResult.failed(error, "malformed", model=model, prompt_tokens=prompt_tokens)


class Pieces:
    """The pieces of a response that may be shown. Joined, they are the text of :func:`complete`.

    Reasoning is left out, the prefix comes first, and an incomplete character is held back until it is complete.

    Args:
        request: The request.
        opened: Whether the chat template opened a reasoning block.
    """

    def __init__(self, request: ChatRequest, *, opened: bool = False) -> None:
        self._reasoning = ReasoningFilter(opened=_opens(request.response_prefix, opened))
        self._prefix, self._half = writable(request.response_prefix), ""

    @property
    def orphan(self) -> bool:
        """Whether a reasoning block ended whose text was already shown."""
        return self._reasoning.orphan

    def feed(self, piece: str) -> str:
        """Takes the next piece, and returns the text that can now be shown."""
        piece = self._half + piece
        self._half = piece[-1:] if "\ud800" <= piece[-1:] <= "\udbff" else ""
        return self._show(self._reasoning.feed(writable(piece[: len(piece) - len(self._half)])))

    def finish(self) -> str:
        """Returns the rest of the text at the end of the response."""
        return self._show(self._reasoning.feed(writable(self._half)) + self._reasoning.finish())

    def _show(self, text: str) -> str:
        if text:
            text, self._prefix = self._prefix + text, ""
        return text


def _opens(prefix: str, opened: bool) -> bool:
    """Whether a response after a prefix starts inside a reasoning block."""
    reasoning = ReasoningFilter(opened=opened)
    reasoning.feed(prefix)
    return reasoning.inside
