"""The command line with a scripted model behind it."""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from popi import registry
from popi.backends.base import ChatRequest, ChatResult
from popi.cli import main
from popi.testing import ScriptedBackend


async def at_once(calls: int) -> None:
    """Does nothing."""


@dataclass
class Models:
    """What the models of the command line say, and which were made.

    Attributes:
        answers: What every model answers.
        before: Awaited before each call of a model, with the number of earlier calls.
        made: Every backend, in order.
        closed: Those that were closed.
        kind: The class of the backends.
    """

    answers: Callable[[ChatRequest], str | ChatResult] = lambda request: "- Short answers [1]"
    before: Callable[[int], Awaitable[None]] = at_once
    made: list[ScriptedBackend] = field(default_factory=list)
    closed: list[ScriptedBackend] = field(default_factory=list)
    kind: type[ScriptedBackend] = ScriptedBackend

    @property
    def chats(self) -> list[ChatRequest]:
        return [request for backend in self.made for request in backend.chats]


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Models:
    """Puts a scripted backend in the place of the transformers one."""
    script = Models()

    class Scripted(ScriptedBackend):
        calls = 0

        def __init__(self, model: str) -> None:
            super().__init__(lambda request: script.answers(request), model=model)
            script.made.append(self)

        async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
            self.calls += 1
            await script.before(self.calls - 1)
            return await super().chat(requests)

        async def close(self) -> None:
            script.closed.append(self)

    script.kind = Scripted
    module = ModuleType("scripted_models")
    module.__getattr__ = lambda name: script.kind  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "scripted_models", module)
    monkeypatch.setitem(registry.BACKENDS, "transformers", "scripted_models:Scripted")
    return script


@dataclass
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def record(self) -> dict[str, Any]:
        """The one JSON line that it printed."""
        [line] = self.out.splitlines()
        parsed: dict[str, Any] = json.loads(line)
        return parsed


@pytest.fixture
def popi(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs a command in this process."""

    def run(*args: object) -> Ran:
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes records, or bare lines, to a file."""

    def write(name: str, *records: object) -> Path:
        path = tmp_path / name
        lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write
