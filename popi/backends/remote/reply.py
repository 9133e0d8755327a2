"""Assembles the pieces of a server's response."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from popi.backends.base import ChatRequest, ChatResult, FinishReason
from popi.backends.remote.client import DONE
from popi.backends.remote.failures import Malformed, Stopped
from popi.backends.remote.wire import Choice, Chunk, read
from popi.backends.results import ORPHAN, Pieces, complete
from popi.errors import BackendError

FINISH_REASONS: dict[str, FinishReason] = {
    **dict.fromkeys(("length", "max_tokens", "max_length", "max_output_tokens", "max_completion_tokens"), "length"),
    **dict.fromkeys(("model_length", "token_limit", "context_length", "model_context_window_exceeded"), "length"),
    **dict.fromkeys(("content_filter", "safety", "sensitive", "blocklist", "prohibited_content"), "filtered"),
    **dict.fromkeys(("recitation", "spii"), "filtered"),
    **dict.fromkeys(("abort", "aborted", "cancelled", "canceled", "error", "failed", "timeout"), "error"),
    **dict.fromkeys(("network_error", "insufficient_system_resource"), "error"),
}
"""The words of servers for a response that the model did not end. All others mean ``stop``, which has many words."""

REFUSED = "the model refused: {}"
FILTERED = "the content filter of the server removed the response, or the rest of it"


class Reply:
    """A response, from its first piece to its result.

    Args:
        request: The request.
        model: Name of the model.
        opened: Whether the chat template opened a reasoning block.
    """

    def __init__(self, request: ChatRequest, model: str, *, opened: bool = False) -> None:
        self._request, self._model, self._opened = request, model, opened
        self._pieces = Pieces(request, opened=opened)
        self._text = self._refusal = self._other = ""
        self._prompt_tokens = self._completion_tokens = 0
        self._responds = self._reasoned = self._calls_tools = self._whole = False
        self._reason: str | None = None

    def add(self, body: Any) -> str:
        """Takes the next body, and returns the text that can now be shown.

        Raises:
            Malformed: If the body does not follow the protocol.
        """
        if body is DONE:
            self._whole = True
            return ""
        chunk = read(Chunk, body)
        if not chunk.choices and chunk.usage is None and body:
            self._other = self._other or f": {body}"
        if chunk.usage is not None:
            details = chunk.usage.completion_tokens_details
            self._prompt_tokens = chunk.usage.prompt_tokens or self._prompt_tokens
            self._completion_tokens = chunk.usage.completion_tokens or self._completion_tokens
            self._reasoned |= bool(details and details.reasoning_tokens)
        # A body that only reports usage follows the last piece.
        self._whole = not chunk.choices and chunk.usage is not None and self._responds
        return self._take(chunk.first) if chunk.first else ""

    def finish(self) -> str:
        """Returns the rest of the text that can be shown.

        Raises:
            Malformed: If the response ended before the model did, or contains nothing.
        """
        ended_early = not self._whole and self._reason is None
        if not self._responds and (self._other or not ended_early):
            raise Malformed(f"the response contains no message{self._other}")
        if ended_early:
            raise Malformed("the response ended early")
        return self._pieces.finish()

    def result(self) -> ChatResult:
        """Returns the result.

        Raises:
            Stopped: If the server stopped the response.
        """
        word = (self._reason or "").lower().replace("-", "_")
        reason: FinishReason = "refused" if self._refusal else FINISH_REASONS.get(word, "stop")
        if reason == "error":
            raise Stopped(f"the server stopped the response ({self._reason})")
        result = complete(
            self._text,
            reason,
            self._request,
            model=self._model,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            opened=self._opened,
            reasoned=self._reasoned,
            tool_calls=self._calls_tools,
        )
        errors = {"refused": REFUSED.format(self._refusal), "filtered": FILTERED}
        return replace(result, error=errors[reason]) if reason in errors else result

    def streamed(self) -> ChatResult:
        """Returns the result of a response whose pieces were shown.

        Raises:
            BackendError: If it is a failure, a refusal, or was filtered.
            Stopped: If the server stopped the response.
        """
        result = self.result()
        if result.error is not None:
            raise BackendError(f"{self._model}: {result.error}", failure=result.failure or "withheld")
        if self._pieces.orphan:
            raise BackendError(f"{self._model}: {ORPHAN}", failure="malformed")
        return result

    def _take(self, choice: Choice) -> str:
        self._reason = choice.finish_reason or self._reason
        self._refusal += choice.refusal
        self._reasoned |= choice.reasons
        self._calls_tools |= choice.calls_tools
        self._responds |= choice.is_response
        self._text += choice.content
        return self._pieces.feed(choice.content)
