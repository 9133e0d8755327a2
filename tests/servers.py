"""The real vLLM server that tests share."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from popi.models import find
from popi.testing import VLLMServer, vllm_server

KEY = "POPI_TEST_KEY"
"""The environment variable that holds the key of every server here."""

SERVED, CONTEXT = "popi-mini-base", 512
"""The model of the vLLM server, and the maximum number of tokens of a request to it."""


def needs_vllm() -> None:
    """Skips a test if vLLM is not installed. In continuous integration the test fails instead."""
    if importlib.util.find_spec("vllm") is None:
        if "CI" in os.environ:
            pytest.fail("vLLM is not installed")
        pytest.skip("vLLM is not installed")


def mini_server(log: Path, *, port: int | None = None) -> AbstractContextManager[VLLMServer]:
    """A server of :data:`SERVED` with a small cache, which requires the key in :data:`KEY`."""
    return vllm_server(
        find(SERVED),
        name=SERVED,
        port=port,
        options=["--max-model-len", str(CONTEXT)],
        environment={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_API_KEY": os.environ[KEY]},
        log=log,
    )
