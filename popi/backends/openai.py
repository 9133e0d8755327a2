"""Any server that speaks OpenAI's protocol: OpenAI's own, a vLLM server, and others."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from openai import AsyncOpenAI

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
from popi.backends.deadline import turn
from popi.backends.remote.endpoints import ByMessages, ByTokenIds, Endpoint
from popi.backends.remote.failures import failed
from popi.backends.together import each, held
from popi.errors import BackendError, ConfigError, MissingExtra

Request = TypeVar("Request")
Result = TypeVar("Result", ChatResult, ScoreResult)

OPENAI = "https://api.openai.com/v1"


class OpenAIBackend(Backend):
    """A model behind a server that speaks OpenAI's protocol.

    A black box is asked by messages. A server of an open model that has the completions endpoint, as vLLM's does, is
    better asked by token ids: name its tokenizer, and conversations are rendered here as they are in training, tokens
    are counted exactly, and responses can be scored.

    Nothing is asked twice: see :class:`popi.backends.wrappers.Retry` for that.

    Args:
        model: The server's name of the model.
        base_url: Where the server is; ``None`` is OpenAI's own.
        key: The name of the environment variable that holds the key; ``None`` for a server that wants none.
        tokenizer: The model's tokenizer: the name of a shipped model, a folder, or a hub id.
        context_length: The most tokens of a conversation and its answer, if that is known.
        scores: Whether a server of an open model echoes log-probabilities, as vLLM's does. It matters where a tokenizer
            is named.
        sampling: Whether the model takes a temperature and a nucleus (``top_p``). Some that reason before they answer
            refuse both, and sample as they like.
        timeout: Seconds for an answer, or for the next piece of a stream.
        concurrency: The most requests at once.

    Raises:
        ConfigError: If the environment variable is not set, or a number makes no sense.
        ModelError: If the tokenizer is missing, broken, or without a chat template.
        MissingExtra: If a tokenizer is named and what reads it is not installed.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        key: str | None = "OPENAI_API_KEY",
        tokenizer: str | None = None,
        context_length: int | None = None,
        scores: bool = True,
        sampling: bool = True,
        timeout: float = 120.0,
        concurrency: int = 64,
    ) -> None:
        if timeout <= 0 or concurrency < 1:
            raise ConfigError(f"a timeout of {timeout} s and {concurrency} requests at once serve nobody")
        self.model = model
        self._url, self._key = base_url, _key(key)
        self._timeout, self._concurrency = timeout, concurrency
        self._endpoint = (
            _by_messages(model, base_url, sampling=sampling)
            if tokenizer is None
            else _by_token_ids(model, tokenizer, context_length, scores=scores)
        )
        self.capabilities = Capabilities(stream=True, score=self._endpoint.scores, context_length=context_length)
        # Connections cannot be taken from one event loop into another.
        self._open: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[AsyncOpenAI, asyncio.Semaphore]]
        self._open = WeakKeyDictionary()
        self._closed = False

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Continues each conversation.

        Raises:
            BackendError: If nothing can be reached, or the server refuses the key or the model.
        """
        return await self._each(requests, self._endpoint.chat, ChatResult)

    async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Continues one conversation, piece by piece.

        Raises:
            BackendError: If the answer cannot be had or breaks off.
        """
        client, gate = self._connected()
        async with turn(gate):
            try:
                async with held(self._endpoint.stream(client, request, on_complete)) as pieces:
                    while True:
                        async with asyncio.timeout(self._timeout):
                            piece = await anext(pieces)
                        yield piece
            except StopAsyncIteration:
                return
            except BackendError:
                raise
            except Exception as error:
                raise failed(error, self._timeout).raised(self.model) from error

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Sums the log-probabilities of each response, end of turn included, given its conversation.

        Raises:
            BackendError: If nothing can be reached, the server refuses the key or the model, or no tokenizer was named.
        """
        return await self._each(requests, self._endpoint.score, ScoreResult)

    def count_tokens(self, text: str) -> int:
        """The length of a bare text: exact by the tokenizer, about so without one."""
        return self._endpoint.count_tokens(text)

    async def close(self) -> None:
        """Closes the connections."""
        self._closed = True
        here = self._open.pop(asyncio.get_running_loop(), None)
        self._open.clear()
        if here is not None:
            await here[0].close()

    def _connected(self) -> tuple[AsyncOpenAI, asyncio.Semaphore]:
        """The client of the running event loop."""
        if self._closed:
            raise BackendError(f"{self.model}: the backend is closed")
        loop = asyncio.get_running_loop()
        if loop not in self._open:
            client = AsyncOpenAI(api_key=self._key, base_url=self._url, max_retries=0, timeout=self._timeout)
            self._open[loop] = client, asyncio.Semaphore(self._concurrency)
        return self._open[loop]

    async def _each(
        self,
        requests: Sequence[Request],
        ask: Callable[[AsyncOpenAI, Request], Awaitable[Result]],
        kind: type[Result],
    ) -> list[Result]:
        """Asks for each request, so many at once; those that fail are data, unless all of them would."""
        client, gate = self._connected()

        async def one(request: Request) -> Result:
            try:
                async with turn(gate), asyncio.timeout(self._timeout):
                    return await ask(client, request)
            except BackendError:
                raise
            except Exception as error:
                failure = failed(error, self._timeout)
                if failure.whole or failure.kind == "unreachable":
                    raise failure.raised(self.model) from error
                return kind.failed(failure.error, failure.kind, model=self.model, retry_after=failure.retry_after)

        return await each(requests, one, kind, model=self.model, at_once=self._concurrency)


def _key(name: str | None) -> str:
    if name is None:
        return "none"
    if value := os.environ.get(name):
        return value
    if name.isidentifier() and name.isupper():
        raise ConfigError(f"the environment variable {name} holds no key", fix=f"export {name}, or name another one")
    # It may be the key itself, which belongs into no log.
    raise ConfigError(
        "there is no environment variable of this name", field="key", fix="give the name of one, not the key itself"
    )


def _by_messages(model: str, base_url: str | None, *, sampling: bool) -> Endpoint:
    host = urlsplit(base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).hostname
    # OpenAI's newer models know the one name, most other servers the other.
    limit = "max_completion_tokens" if host == urlsplit(OPENAI).hostname else "max_tokens"
    return ByMessages(model, limit=limit, sampling=sampling)


def _by_token_ids(model: str, tokenizer: str, context_length: int | None, *, scores: bool) -> Endpoint:
    try:
        from popi.engine.chat_tokens import ChatTokens
        from popi.engine.loading import load_tokenizer
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "transformers", "local") from error
    return ByTokenIds(model, ChatTokens(load_tokenizer(tokenizer), tokenizer), context=context_length, scores=scores)
