"""Scripted models, and personalizers on them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import pytest

from popi.backends.base import ChatRequest, ChatResult
from popi.personalizer import Personalizer
from popi.signals import Statement
from popi.summary import PreferenceSummary
from popi.testing import ScriptedBackend
from popi_generators import PromptedGenerator
from popi_inference import LLMSummarizer

SHORT, LONG = Statement(text="short please"), Statement(text="longer please")


def wants_summary(request: ChatRequest) -> bool:
    return request.messages[-1].content.startswith("Signals of one user")


def script(request: ChatRequest) -> str | ChatResult:
    """Summarizes by counting what the user said, and answers with what it was shown."""
    content = request.messages[-1].content
    if wants_summary(request):
        return f"- Said {content.count('said:')} things [1]"
    if "fail" in content:
        return ChatResult.failed("cannot", "request", model="scripted")
    return f"Answered under {content.partition('<<<')[2].partition('>>>')[0].strip()}".strip()


class Gate(ScriptedBackend):
    """Holds requests back until it is opened, from any thread.

    Attributes:
        running: Number of requests that wait.
        most: Maximum of that number.
    """

    def __init__(self, answers: Callable[[ChatRequest], str | ChatResult] = script) -> None:
        super().__init__(answers)
        self.opened = threading.Event()
        self.arrived = threading.Event()
        self.running = self.most = 0

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        self.running += 1
        self.most = max(self.most, self.running)
        self.arrived.set()
        try:
            while not self.opened.is_set():
                await asyncio.sleep(0.001)
        finally:
            self.running -= 1
        return await super().chat(requests)


def personalizer_on(backend: ScriptedBackend, **options: Any) -> Personalizer:
    return Personalizer(LLMSummarizer(backend), PromptedGenerator(backend), backends=(backend,), **options)


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend(script)


@pytest.fixture
def personalizer(backend: ScriptedBackend) -> Iterator[Personalizer]:
    made = personalizer_on(backend)
    yield made
    made.close_sync()


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def gated(gate: Gate) -> Iterator[Personalizer]:
    """A personalizer whose model responds when its gate is opened."""
    made = personalizer_on(gate)
    yield made
    gate.opened.set()
    made.close_sync()


async def eventually(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.001)


def summary_of(personalizer: Personalizer, user_id: str = "ann") -> str:
    summary = personalizer.infer_sync(user_id)
    assert isinstance(summary, PreferenceSummary)
    return summary.text


async def collect(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]
