"""The backends under contract: a later one joins by one entry in ``CASES``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial

import pytest

from popi.backends.base import Backend
from popi.testing import ScriptedBackend, tiny_model


@dataclass(frozen=True)
class Case:
    """How to make a backend of a given context length, and how to make it fail as a whole."""

    make: Callable[[int], Backend]
    kill: Callable[[Backend], None]


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


CASES = {
    "scripted": Case(scripted_backend, kill_scripted),
    "transformers-llama": Case(partial(transformers_backend, "llama"), kill_transformers),
    "transformers-neox": Case(partial(transformers_backend, "neox"), kill_transformers),
    "transformers-qwen3": Case(partial(transformers_backend, "qwen3"), kill_transformers),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
async def backend(case: Case) -> AsyncIterator[Backend]:
    async with case.make(512) as backend:
        yield backend
