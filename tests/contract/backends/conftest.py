"""The backends under contract: a later one joins by one entry in ``CASES``."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from popi.backends.base import Backend
from popi.testing import ScriptedBackend, free_port, tiny_model
from tests.servers import KEY, SERVED

if TYPE_CHECKING:
    from popi.backends.vllm import VLLMBackend


@dataclass(frozen=True)
class Case:
    """How to make a backend of a given context length, and how to make it fail as a whole.

    What costs long to start is a fixture that all tests share, and is given first.
    """

    make: Callable[..., Backend]
    kill: Callable[[Backend], None]
    shared: str | None = None


def transformers_backend(family: str, context_length: int) -> Backend:
    from popi.backends.transformers import TransformersBackend

    # Weights under which no request of the suite has an empty response.
    model, tokenizer = tiny_model(family, seed=1)
    model.config.max_position_embeddings = context_length
    return TransformersBackend.from_model(model, tokenizer, f"tiny-{family}")


def kill_transformers(backend: Backend) -> None:
    def forward(*args: object, **options: object) -> None:
        raise RuntimeError("device lost\nand a page of advice")

    backend._model.forward = forward


def scripted_backend(context_length: int) -> Backend:
    return ScriptedBackend(context_length=context_length)


def kill_scripted(backend: Backend) -> None:
    backend.dead = "switched off"


def served_backend(url: str, context_length: int) -> Backend:
    from popi.backends.openai import OpenAIBackend

    return OpenAIBackend(SERVED, base_url=url, key=KEY, tokenizer=SERVED, context_length=context_length)


def kill_served(backend: Backend) -> None:
    """Nobody listens where it looks from now on; killing the server would take it from the other tests."""
    backend._server = replace(backend._server, url=f"http://127.0.0.1:{free_port()}/v1")


def vllm_backend(shared: VLLMBackend, context_length: int) -> Backend:
    backend = copy.copy(shared)
    backend._owner = False
    backend.capabilities = replace(shared.capabilities, context_length=context_length)
    return backend


def kill_vllm(backend: Backend) -> None:
    """A real death is in tests/backends/test_vllm.py: here it would take the engine from the other tests."""
    backend._closed = True


CASES = {
    "served": Case(served_backend, kill_served, "vllm_url"),
    "vllm": Case(vllm_backend, kill_vllm, "vllm_backend"),
    "scripted": Case(scripted_backend, kill_scripted),
    "transformers-llama": Case(partial(transformers_backend, "llama"), kill_transformers),
    "transformers-neox": Case(partial(transformers_backend, "neox"), kill_transformers),
    "transformers-qwen3": Case(partial(transformers_backend, "qwen3"), kill_transformers),
}


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.slow) if case.shared else name for name, case in CASES.items()]
)
def case(request: pytest.FixtureRequest) -> Case:
    case = CASES[request.param]
    if case.shared is None:
        return case
    return Case(partial(case.make, request.getfixturevalue(case.shared)), case.kill)


@pytest.fixture
async def backend(case: Case) -> AsyncIterator[Backend]:
    async with case.make(512) as backend:
        yield backend
