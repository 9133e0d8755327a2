"""Rollouts of a vLLM server, on other GPUs or another machine."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from openai import APIError, APIStatusError, AsyncOpenAI, OpenAI
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from popi.backends.vllm_worker import NAME
from popi.engine.decoding import Completion
from popi.errors import ConfigError, PopiError
from popi.training.ranks import ONE_RANK, Ranks
from popi.training.rollouts import Rollouts
from popi.training.snapshots import TOLERANCE, TOLERANCE_OF_HALF, Snapshot, Weights

SECONDS_TO_LOAD, SECONDS_TO_SAMPLE = 600.0, 1800.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
START = f"start it with VLLM_SERVER_DEV_MODE=1 and vllm serve --worker-extension-cls {NAME}"


class ServerRollouts(Rollouts):
    """Samples with a vLLM server, which gets the current weights of the policy before each call.

    The first rank writes the weights into a folder, from which the server reads them. The server samples for training
    only: it must have the model of the policy, and the options of the guide (docs/training.md).

    Args:
        url: The base URL of its API, such as ``http://127.0.0.1:8000/v1``.
        model: The policy.
        tokenizer: Its tokenizer.
        key: Name of the environment variable with the API key; ``None`` for a server that needs none.
        weights: The weights of the policy, if they are not those of the model.
        end_tokens: The tokens that end a completion.
        half: Whether the policy computes in bfloat16.
        shared: A folder that a server on another machine sees under the same path.
        ranks: The ranks of the run.

    Raises:
        ConfigError: If the key is not set.
        PopiError: If the server does not respond.
    """

    def __init__(
        self,
        url: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        key: str | None,
        end_tokens: Collection[int],
        shared: Path,
        half: bool = False,
        weights: Weights = lambda: None,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        if key is not None and key not in os.environ:
            raise ConfigError(f"{key} is not set", field="writer.server.key", fix=f"export {key}=...")
        self._url, self._key, self._ranks = url, "none" if key is None else os.environ[key], ranks
        self._end_tokens = sorted(end_tokens)
        self.tolerance = TOLERANCE_OF_HALF if half else TOLERANCE
        self._admin = OpenAI(base_url=url, api_key=self._key, timeout=SECONDS_TO_LOAD, max_retries=0)
        self._name = self._asked(lambda: self._admin.models.list().data[0].id)
        near = None if urlsplit(url).hostname in LOOPBACK else shared
        self._snapshot = Snapshot(model, tokenizer, weights, near=near) if ranks.is_first else None

    def sample(
        self, prompts: Sequence[list[int]], *, seeds: Sequence[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[Completion]:
        """See :meth:`Rollouts.sample`.

        Raises:
            ArithmeticError: If a log-probability is not finite.
            PopiError: If the server does not take the weights, or does not respond.
        """
        self._ranks.on_first(self._push)
        options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
        completions: list[Completion] = self._asked(lambda: asyncio.run(self._sample(prompts, seeds, options)))
        if not all(math.isfinite(each) for completion in completions for each in completion.logprobs):
            raise ArithmeticError("the log-probabilities of vLLM are not finite")
        return completions

    def close(self) -> None:
        """Removes the weights, and closes the connections."""
        self._admin.close()
        if self._snapshot is not None:
            self._snapshot.close()

    def _push(self) -> None:
        assert self._snapshot is not None
        self._snapshot.write()
        root = self._url.rstrip("/").removesuffix("/v1")
        body = {"method": "take_weights", "args": [str(self._snapshot.path)]}
        self._asked(lambda: self._admin.post(f"{root}/collective_rpc", cast_to=object, body=body))
        self._asked(lambda: self._admin.post(f"{root}/reset_prefix_cache", cast_to=object))

    async def _sample(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], options: dict[str, Any]
    ) -> list[Completion]:
        async with AsyncOpenAI(base_url=self._url, api_key=self._key, timeout=SECONDS_TO_SAMPLE) as client:

            async def one(prompt: list[int], seed: int) -> Completion:
                extra = {"return_token_ids": True, "stop_token_ids": self._end_tokens}
                found = await client.completions.create(
                    model=self._name, prompt=prompt, seed=seed % 2**63, logprobs=0, extra_body=extra, **options
                )
                choice: Any = found.choices[0]
                tokens, logprobs = list(choice.token_ids), list(choice.logprobs.token_logprobs)
                if not tokens or len(tokens) != len(logprobs):
                    raise ValueError(f"{len(tokens)} tokens with {len(logprobs)} log-probabilities")
                return Completion(tokens, logprobs, "stop" if tokens[-1] in self._end_tokens else "length")

            return list(await asyncio.gather(*map(one, prompts, seeds)))

    def _asked(self, request: Callable[[], Any]) -> Any:
        try:
            return request()
        except APIStatusError as error:
            self._fail(f"responded {error.status_code} ({_first_line(error)}); {START}", error)
        except APIError as error:
            self._fail(f"does not respond ({_first_line(error)}); the same command resumes when it does", error)
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            self._fail(f"sent a malformed response ({_first_line(error)}); {START}", error)

    def _fail(self, what: str, error: Exception) -> NoReturn:
        raise PopiError(f"the vLLM server at {self._url} {what}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
