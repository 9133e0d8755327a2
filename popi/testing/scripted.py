"""A backend that answers from a script."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from popi.backends.base import (
    Backend,
    Capabilities,
    ChatRequest,
    ChatResult,
    FinishReason,
    OnComplete,
    ScoreRequest,
    ScoreResult,
    ignore_result,
)
from popi.engine.answer import first_stop
from popi.errors import BackendError
from popi.prompts import Message

Answers = Mapping[str, str] | Callable[[ChatRequest], str | ChatResult]
Scores = Callable[[ScoreRequest], float | ScoreResult]


class ScriptedBackend(Backend):
    """A backend without a model: it answers from a script, counts words as tokens, and remembers what it was asked.

    Stop strings, ``max_tokens`` and the context length hold as they do for a real one.

    Args:
        answers: The answer to a request, by a function or by the content of its last message. A function that
            returns a :class:`ChatResult` gives it as it stands, so one with an ``error`` is an item that fails; a
            message that the mapping lacks fails its item too.
        scores: The log-probability of a request's response, or a :class:`ScoreResult` as it stands; without it,
            every token costs one nat.
        model: The name of the model.
        context_length: The most words of a conversation and its answer.

    Attributes:
        chats: Every request of ``chat`` and ``stream``, in order.
        scored: Every request of ``score``, in order.
        streams: How many streams are open.
        dead: Set to a reason, it makes every call raise a :class:`popi.errors.BackendError` that gives it.
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
        self.capabilities = Capabilities(stream=True, score=True, context_length=context_length)
        self.chats: list[ChatRequest] = []
        self.scored: list[ScoreRequest] = []
        self.streams = 0
        self.dead: str | None = None
        self._answers, self._scores = answers, scores

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Answers each request from the script.

        Raises:
            BackendError: If it was told to be dead.
        """
        self._check_alive()
        self.chats.extend(requests)
        return [self._answer(request) for request in requests]

    async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Gives the answer word by word.

        Raises:
            BackendError: If it was told to be dead, or the item fails.
        """
        (result,) = await self.chat([request])
        if result.error is not None:
            raise BackendError(result.error)
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
            BackendError: If it was told to be dead.
        """
        self._check_alive()
        self.scored.extend(requests)
        return [self._score(request) for request in requests]

    def count_tokens(self, text: str) -> int:
        """The number of words."""
        return len(_pieces(text))

    def _check_alive(self) -> None:
        if self.dead is not None:
            raise BackendError(self.dead)

    def _answer(self, request: ChatRequest) -> ChatResult:
        prompt, limit = self._prompt_tokens(request.messages), request.max_tokens
        context = self.capabilities.context_length
        if context is not None:
            limit = min(limit, context - prompt)
        if limit < 1:
            error = f"no room: {prompt} tokens, a context of {context}, {request.max_tokens} asked for"
            return ChatResult.failed(error, "request", model=self.model, prompt_tokens=prompt)
        answer = self._look_up(request)
        if isinstance(answer, ChatResult):
            return answer
        pieces = _pieces(answer[: first_stop(answer, request.stop)])
        kept = pieces[:limit]
        reason: FinishReason = "length" if len(kept) < len(pieces) else "stop"
        return ChatResult("".join(kept), reason, prompt, len(kept), self.model)

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
            error = f"{prompt + tokens} tokens, and the context holds {context}"
            return ScoreResult.failed(error, "request", model=self.model, prompt_tokens=prompt)
        score = -float(tokens) if self._scores is None else self._scores(request)
        return score if isinstance(score, ScoreResult) else ScoreResult(score, tokens, prompt, self.model)

    def _prompt_tokens(self, messages: Sequence[Message]) -> int:
        return sum(self.count_tokens(message.content) for message in messages)


def _pieces(text: str) -> list[str]:
    """Words with the space in front of them; what is left at the end is a piece too."""
    return re.findall(r"\s*\S+|\s+$", text)
