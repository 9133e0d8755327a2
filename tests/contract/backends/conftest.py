"""The backends under contract: a later one joins by one entry in ``CASES``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial

import pytest

from popi.backends.base import Backend
from popi.testing import ScriptedBackend, tiny_model
from tests.servers import KEY, SERVED, free_port


@dataclass(frozen=True)
class Case:
    """How to make a backend of a given context length, and how to make it fail as a whole.

    One that talks to a server is made with the server's address first.
    """

    make: Callable[..., Backend]
    kill: Callable[[Backend], None]
    served: bool = False


def transformers_backend(family: str, context_length: int) -> Backend:
    from popi.backends.transformers import TransformersBackend

    model, tokenizer = tiny_model(family)
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
    backend._url = f"http://127.0.0.1:{free_port()}/v1"


CASES = {
    "served": Case(served_backend, kill_served, served=True),
    "scripted": Case(scripted_backend, kill_scripted),
    "transformers-llama": Case(partial(transformers_backend, "llama"), kill_transformers),
    "transformers-neox": Case(partial(transformers_backend, "neox"), kill_transformers),
    "transformers-qwen3": Case(partial(transformers_backend, "qwen3"), kill_transformers),
}


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.slow) if case.served else name for name, case in CASES.items()]
)
def case(request: pytest.FixtureRequest) -> Case:
    case = CASES[request.param]
    if not case.served:
        return case
    url = request.getfixturevalue("vllm_url")
    return Case(partial(case.make, url), case.kill)


@pytest.fixture
async def backend(case: Case) -> AsyncIterator[Backend]:
    async with case.make(512) as backend:
        yield backend
