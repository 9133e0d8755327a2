"""Tiny models for the tests of the engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from popi.backends.transformers import TransformersBackend
from popi.testing import tiny_model


@pytest.fixture(params=["llama", "neox", "qwen3"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny(family: str):
    return tiny_model(family)


@pytest.fixture
def make(tiny) -> Callable[..., TransformersBackend]:
    return lambda **options: TransformersBackend.from_model(*tiny, "tiny", **options)
