"""A backend that responds from a script."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from popi.backends.base import (
    Backend,
    Capabilities,
    ChatRequest,
    ChatResult,
    OnComplete,
    ScoreRequest,
    ScoreResult,
    ignore_result,
)
from popi.backends.results import complete, scored
from popi.engine.answer import first_stop
from popi.errors import BackendError
from popi.prompts import Message

Answers = Mapping[str, str] | Callable[[ChatRequest], str | ChatResult]
Scores = Callable[[ScoreRequest], float | ScoreResult]


class ScriptedBackend(Backend):
    """A backend without a model: it responds from a script, counts words as tokens, and records its requests.

    Stop strings, ``max_tokens``, the context length and response prefixes work as they do with a model. Reasoning is
    removed, and an empty response or a score that is not finite is a failed item.

    Example:
        >>> import asyncio
        >>> backend = ScriptedBackend({"How are you?": "Fine, thank you."})
        >>> request = ChatRequest([Message("user", "How are you?")], max_tokens=2)
        >>> [result] = asyncio.run(backend.chat([request]))
        >>> result.text, result.finish_reason
        ('Fine, thank', 'length')

    Args:
        answers: The response to a request: a function of the request, or a mapping from the content of the last
            message. A function may return a :class:`ChatResult`, for example one that failed; it is used unchanged. A
            message that the mapping lacks is a failed item.
        scores: The log-probability of a request's response, or a :class:`ScoreResult`. By default every token has a
            log-probability of -1.
        model: Name of the model.
        context_length: Maximum number of words of a conversation and its response.

    Attributes:
        chats: All requests of ``chat`` and ``stream``, in order.
        scored: All requests of ``score``, in order.
        streams: Number of open streams.
        dead: If set, every call raises a :class:`popi.errors.BackendError` with this message.
    """

    def __init__(
        self,
        answers: Answers = lambda request: f"Noted: {request.messages[-1].content}",
        scores: Scores | None = None,
        *,
        model: str = "scripted",
        context_length: int | None = None,
    ) -> None:
        self.model = model
        self.capabilities = Capabilities(stream=True, score=True, context_length=context_length, response_prefix=True)
        self.chats: list[ChatRequest] = []
        self.scored: list[ScoreRequest] = []
        self.streams = 0
        self.dead: str | None = None
        self._answers, self._scores = answers, scores

    @property
    def identity(self) -> str:
        """The name of the model and its context length: two backends with the same name count as the same model."""
        return f"scripted {self.model} {self.capabilities.context_length}"

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Responds to each request from the script.

        Raises:
            BackendError: If ``dead`` is set.
        """
        self._check_alive()
        self.chats.extend(requests)
        return [self._answer(request) for request in requests]

    async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Yields the response word by word.

        Raises:
            BackendError: If ``dead`` is set, or the item fails.
        """
        (result,) = await self.chat([request])
        if result.error is not None:
            raise BackendError(result.error, failure=result.failure)
        self.streams += 1
        try:
            for piece in _pieces(result.text):
                yield piece
        finally:
            self.streams -= 1
        on_complete(result)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Scores each response from the script.

        Raises:
            BackendError: If ``dead`` is set.
        """
        self._check_alive()
        self.scored.extend(requests)
        return [self._score(request) for request in requests]

    def count_tokens(self, text: str) -> int:
        """Counts the words."""
        return len(_pieces(text))

    def _check_alive(self) -> None:
        if self.dead is not None:
            raise BackendError(self.dead)

    def _answer(self, request: ChatRequest) -> ChatResult:
        prompt, limit = self._prompt_tokens(request.messages), request.max_tokens
        prompt += self.count_tokens(request.response_prefix)
        context = self.capabilities.context_length
        if context is not None:
            limit = min(limit, context - prompt)
        if limit < 1:
            error = f"no room: {prompt} prompt tokens, a context of {context}, max_tokens is {request.max_tokens}"
            return ChatResult.failed(error, "request", model=self.model, prompt_tokens=prompt)
        answer = self._look_up(request)
        if isinstance(answer, ChatResult):
            return answer
        answer = answer.removeprefix(request.response_prefix)
        pieces = _pieces(answer[: first_stop(answer, request.stop)])
        kept = pieces[:limit]
        return complete(
            "".join(kept),
            "length" if len(kept) < len(pieces) else "stop",
            request,
            model=self.model,
            prompt_tokens=prompt,
            completion_tokens=len(kept),
        )

    def _look_up(self, request: ChatRequest) -> str | ChatResult:
        if callable(self._answers):
            return self._answers(request)
        last = request.messages[-1].content
        if last in self._answers:
            return self._answers[last]
        return ChatResult.failed(f"the script has no answer to {last!r}", "request", model=self.model)

    def _score(self, request: ScoreRequest) -> ScoreResult:
        prompt, tokens = self._prompt_tokens(request.messages), self.count_tokens(request.response) + 1
        context = self.capabilities.context_length
        if context is not None and prompt + tokens > context:
            error = f"too long: {prompt + tokens} tokens, and the context has room for {context}"
            return ScoreResult.failed(error, "request", model=self.model, prompt_tokens=prompt)
        score = -float(tokens) if self._scores is None else self._scores(request)
        if isinstance(score, ScoreResult) and (score.error or math.isfinite(score.logprob)):
            return score
        logprob = score.logprob if isinstance(score, ScoreResult) else score
        return scored(logprob, tokens, model=self.model, prompt_tokens=prompt)

    def _prompt_tokens(self, messages: Sequence[Message]) -> int:
        return sum(self.count_tokens(message.content) for message in messages)


def _pieces(text: str) -> list[str]:
    """Words with the white space before them; white space at the end is a separate piece."""
    return re.findall(r"\s*\S+|\s+$", text)
