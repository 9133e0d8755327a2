"""Tiny models for the tests of the transformers backend, and servers for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from popi.backends.transformers import TransformersBackend
from popi.testing import tiny_model
from tests.faults import Scripted, ScriptedServer, Serve


@pytest.fixture(params=["llama", "neox", "qwen3"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny(family: str):
    return tiny_model(family)


@pytest.fixture
def make(tiny) -> Callable[..., TransformersBackend]:
    return lambda **options: TransformersBackend.from_model(*tiny, "tiny", **options)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers on loopback, which run until the end of the test."""
    with ExitStack() as servers:

        def start(reply: Scripted | Callable[[dict[str, Any]], Scripted]) -> ScriptedServer:
            script = reply if callable(reply) else lambda body: reply
            return servers.enter_context(ScriptedServer(script).running())

        yield start
