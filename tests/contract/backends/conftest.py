"""The backends under contract. A new one needs one entry in ``CASES``."""

from __future__ import annotations

import copy
import math
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from popi.backends.base import Backend
from popi.testing import ScriptedBackend, free_port, tiny_model
from tests.servers import KEY, SERVED

if TYPE_CHECKING:
    from popi.backends.vllm import VLLMBackend


@dataclass(frozen=True)
class Case:
    """How to make a backend, and how to break it.

    Attributes:
        make: Makes a backend of a context length.
        other: Makes one of the same name that may respond differently: other weights, or another address.
        kill: Makes it fail as a whole.
        poison: Makes its log-probabilities NaN.
        shared: A fixture that takes long to start, and is the first argument of ``make`` and ``other``.
    """

    make: Callable[..., Backend]
    other: Callable[..., Backend]
    kill: Callable[[Backend], None]
    poison: Callable[[Backend], None]
    shared: str | None = None


def transformers_backend(family: str, context_length: int, *, seed: int = 1) -> Backend:
    from popi.backends.transformers import TransformersBackend

    # Weights under which no request of the suite has an empty response.
    model, tokenizer = tiny_model(family, seed=seed)
    model.config.max_position_embeddings = context_length
    return TransformersBackend.from_model(model, tokenizer, f"tiny-{family}")


def kill_transformers(backend: Backend) -> None:
    def forward(*args: object, **options: object) -> None:
        raise RuntimeError("device lost\nand a page of advice")

    backend._model.forward = forward


def poison_transformers(backend: Backend) -> None:
    backend._model.get_output_embeddings().weight.data.fill_(math.nan)


def scripted_backend(context_length: int, *, model: str = "scripted") -> Backend:
    return ScriptedBackend(model=model, context_length=context_length)


def kill_scripted(backend: Backend) -> None:
    backend.dead = "switched off"


def poison_scripted(backend: Backend) -> None:
    backend._scores = lambda request: math.nan


def served_backend(url: str, context_length: int) -> Backend:
    from popi.backends.openai import OpenAIBackend

    return OpenAIBackend(SERVED, base_url=url, key=KEY, tokenizer=SERVED, context_length=context_length)


def served_elsewhere(url: str, context_length: int) -> Backend:
    return served_backend(f"http://127.0.0.1:{free_port()}/v1", context_length)


def kill_served(backend: Backend) -> None:
    """Nobody listens where it looks from now on; killing the server would take it from the other tests."""
    backend._server = replace(backend._server, url=f"http://127.0.0.1:{free_port()}/v1")


def poison_served(backend: Backend) -> None:
    from popi.backends.remote.client import DONE, Client

    class Poisoned(Client):
        async def bodies(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[Any]:
            async for each in super().bodies(path, body):
                if each is not DONE:
                    each["choices"][0]["logprobs"]["token_logprobs"][-1] = math.nan
                yield each

    backend._clients._make = lambda: Poisoned(backend._server, timeout=60)


def vllm_backend(shared: VLLMBackend, context_length: int) -> Backend:
    backend = copy.copy(shared)
    backend._owner = False
    backend.capabilities = replace(shared.capabilities, context_length=context_length)
    return backend


def vllm_backend_of_other_weights(shared: VLLMBackend, context_length: int) -> Backend:
    backend = vllm_backend(shared, context_length)
    backend._engine = copy.copy(shared._engine)
    backend._engine.weights = "others"
    return backend


def poison_vllm(backend: Backend) -> None:
    async def generate(*arguments: Any) -> AsyncIterator[Any]:
        async for output in engine.generate(*arguments):
            output.prompt_logprobs.logprobs[-1] = math.nan
            yield output

    engine, backend._engine = backend._engine, copy.copy(backend._engine)
    backend._engine.generate = generate


def kill_vllm(backend: Backend) -> None:
    """A real death is in tests/backends/test_vllm.py: here it would take the engine from the other tests."""
    backend._closed = True


def transformers_case(family: str) -> Case:
    make = partial(transformers_backend, family)
    return Case(make, partial(make, seed=2), kill_transformers, poison_transformers)


CASES = {
    "served": Case(served_backend, served_elsewhere, kill_served, poison_served, "vllm_url"),
    "vllm": Case(vllm_backend, vllm_backend_of_other_weights, kill_vllm, poison_vllm, "vllm_backend"),
    "scripted": Case(scripted_backend, partial(scripted_backend, model="other"), kill_scripted, poison_scripted),
    **{f"transformers-{family}": transformers_case(family) for family in ("llama", "neox", "qwen3", "mistral")},
}


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.slow) if case.shared else name for name, case in CASES.items()]
)
def case(request: pytest.FixtureRequest) -> Case:
    case = CASES[request.param]
    if case.shared is None:
        return case
    shared = request.getfixturevalue(case.shared)
    return replace(case, make=partial(case.make, shared), other=partial(case.other, shared))


@pytest.fixture
async def backend(case: Case) -> AsyncIterator[Backend]:
    async with case.make(512) as backend:
        yield backend
