"""A backend for servers with an OpenAI-compatible API: OpenAI's own, vLLM servers, and others."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

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
from popi.backends.remote.client import Client, certificates
from popi.backends.remote.endpoints import ByMessages, ByTokenIds, Endpoint
from popi.backends.remote.failures import Failed, failed
from popi.backends.remote.fields import Fields
from popi.backends.remote.server import read_server
from popi.backends.sharing import PerLoop, Semaphore
from popi.backends.together import closing, each
from popi.errors import BackendError, ConfigError, MissingExtra
from popi.models import folder_of
from popi.provenance import fingerprint_files

Request = TypeVar("Request")
Result = TypeVar("Result", ChatResult, ScoreResult)

TOKENIZER_FILES = "tokenizer*", "chat_template*", "special_tokens*", "added_tokens*", "vocab*", "merges*"


class OpenAIBackend(Backend):
    """A model on a server with an OpenAI-compatible API.

    Without a tokenizer, requests contain messages, which any server understands. For a server of an open model that has
    the completions endpoint, such as vLLM's, pass the model's tokenizer: conversations are rendered here as in
    training, tokens are counted exactly, and responses can be scored and can continue a prefix.

    Fields without effect are not sent: ``top_p`` if it is 1, and ``top_p`` and ``seed`` for greedy decoding. A field
    that the server does not know is renamed (``max_tokens`` to ``max_completion_tokens``) or dropped (``temperature``,
    ``top_p``, ``seed``, ``stream_options``, ``stop_token_ids``) after the first error that names it; the log reports it
    once. The model then samples as the server decides.

    The SDK reads ``OPENAI_ORG_ID``, ``OPENAI_PROJECT_ID`` and ``OPENAI_CUSTOM_HEADERS`` from the environment, and adds
    their headers to each request.

    Requests are not repeated: see :class:`popi.backends.wrappers.Retry`. The backend can be used from several event
    loops and threads, and in forked processes.

    ::

        backend: openai
        model: gpt-5-mini
        options:
          key: OPENAI_API_KEY
          fields: {temperature: null, max_tokens: max_completion_tokens}
          extra: {reasoning_effort: low}

    Example:
        >>> backend = OpenAIBackend("my-model", base_url="http://127.0.0.1:8000/v1", key=None)
        >>> backend.capabilities.stream, backend.capabilities.score
        (True, False)

    Args:
        model: The server's name of the model.
        base_url: Base URL of the API; ``None`` is ``OPENAI_BASE_URL``, or OpenAI's own. It may contain a user name and
            password.
        key: Name of the environment variable with the API key; ``None`` for a server that needs none.
        tokenizer: The model's tokenizer: the name of a shipped model, a folder, or a hub id.
        context_length: Maximum number of tokens of a conversation and its response, if known.
        scores: Whether the server echoes log-probabilities. Needs a tokenizer.
        fields: Names of request fields on this server, by popi's names: ``max_tokens``, ``temperature``, ``top_p``,
            ``seed``, ``stop``, ``stream_options`` and ``stop_token_ids``. ``None`` drops the field; ``max_tokens`` and
            ``stop`` can only be renamed.
        extra: Fields to add to each request.
        timeout: Seconds to wait for a response, or for the next piece of a stream.
        max_concurrency: Maximum number of requests at the same time.

    Raises:
        ConfigError: If the key, the address, a proxy, a certificate or another option cannot be used.
        ModelError: If the tokenizer is missing, broken, or has no chat template.
        MissingExtra: If a tokenizer is named, and the packages that read it are not installed.
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
        fields: Mapping[str, str | None] | None = None,
        extra: Mapping[str, Any] | None = None,
        timeout: float = 120.0,
        max_concurrency: int = 64,
    ) -> None:
        for name, value in {"timeout": timeout, "max_concurrency": max_concurrency}.items():
            if not 0 < value < float("inf"):
                raise ConfigError(f"must be positive, got {value}", field=name)
        self.model = model
        self._timeout, self._max_concurrency = timeout, max_concurrency
        self._server = read_server(base_url, key, extra or {})
        certificates()
        # OpenAI's newer models accept only the first name, most other servers only the second.
        limit = "max_completion_tokens" if self._server.is_openai and tokenizer is None else "max_tokens"
        names = Fields(model, limit=limit, names=fields or {}, extra=extra or {})
        self._endpoint = _endpoint(model, names, tokenizer, context_length, scores=scores)
        self.capabilities = Capabilities(
            stream=True,
            score=self._endpoint.scores,
            context_length=context_length,
            response_prefix=self._endpoint.response_prefix,
        )
        options = json.dumps([tokenizer and context_length, dict(fields or {}), dict(extra or {})], sort_keys=True)
        self._identity = json.dumps(
            [
                "openai",
                self._server.url,
                model,
                None if tokenizer is None else _fingerprint(tokenizer),
                hashlib.sha256(options.encode()).hexdigest()[:16],
            ]
        )
        self._places = Semaphore(max_concurrency)
        self._clients = PerLoop(lambda: Client(self._server, timeout=timeout))
        self._closed = False

    @property
    def identity(self) -> str:
        """The address, the model, the tokenizer and the options that change responses. It contains no secrets."""
        return self._identity

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Continues each conversation.

        Raises:
            BackendError: If no request reaches the server, or it rejects the key or the model.
        """
        return await self._each(requests, self._endpoint.chat, ChatResult)

    async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Continues one conversation, and yields the text in pieces.

        Raises:
            BackendError: If the request fails or the stream breaks.
        """
        client = self._client()
        async with turn(self._places):
            try:
                async with closing(self._endpoint.stream(client, request, on_complete)) as pieces:
                    async for piece in pieces:
                        yield piece
            except BackendError:
                raise
            except Exception as error:
                raise self._failed(error).raised(self.model) from error

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Scores each response, including its end of turn, given its conversation.

        Raises:
            BackendError: If no request reaches the server, it rejects the key or the model, or it cannot score.
        """
        return await self._each(requests, self._endpoint.score, ScoreResult)

    def count_tokens(self, text: str) -> int:
        """Counts the tokens of a plain text: exactly with a tokenizer, else approximately."""
        return self._endpoint.count_tokens(text)

    async def close(self) -> None:
        """Closes the connections."""
        self._closed = True
        here = asyncio.get_running_loop()
        for loop, client in self._clients.clear().items():
            if loop is here:
                await client.close()
            # The connections of a loop that has ended are closed already.
            elif loop.is_running():
                with suppress(RuntimeError):
                    asyncio.run_coroutine_threadsafe(client.close(), loop)

    def _client(self) -> Client:
        if self._closed:
            raise BackendError(f"{self.model}: the backend is closed")
        return self._clients.get()

    def _failed(self, error: Exception) -> Failed:
        return failed(error, url=self._server.url, timeout=self._timeout, redact=self._server.redact)

    async def _each(
        self,
        requests: Sequence[Request],
        ask: Callable[[Client, Request], Awaitable[Result]],
        kind: type[Result],
    ) -> list[Result]:
        """Sends each request. Failures are data, unless all requests fail for a reason that concerns all of them."""
        client = self._client()

        async def one(request: Request) -> Result:
            try:
                async with turn(self._places), asyncio.timeout(self._timeout):
                    return await ask(client, request)
            except BackendError:
                raise
            except Exception as error:
                failure = self._failed(error)
                if failure.kind in ("denied", "unreachable"):
                    raise failure.raised(self.model) from error
                return kind.failed(failure.error, failure.kind, model=self.model, retry_after=failure.retry_after)

        return await each(requests, one, kind, model=self.model, max_concurrency=self._max_concurrency)


def _endpoint(
    model: str, fields: Fields, tokenizer: str | None, context_length: int | None, *, scores: bool
) -> Endpoint:
    if tokenizer is None:
        return ByMessages(model, fields)
    try:
        from popi.engine.chat_tokens import ChatTokens
        from popi.engine.loading import load_tokenizer
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "transformers", "local") from error
    tokens = ChatTokens(load_tokenizer(tokenizer), tokenizer)
    return ByTokenIds(model, fields, tokens, context=context_length, scores=scores)


def _fingerprint(tokenizer: str) -> list[str]:
    """The files of a tokenizer, or the commit of a hub id."""
    folder = folder_of(tokenizer)
    if folder is None:
        return [tokenizer]
    files = sorted(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file())
    return [fingerprint_files(file) or "" for file in files]
