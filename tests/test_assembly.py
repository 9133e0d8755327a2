"""Backends as files describe them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from popi.assembly import open_backend
from popi.backends.base import ChatRequest, ChatResult
from popi.backends.wrappers import Cache, Cost, Fallback, Limit, Retry
from popi.errors import InputError
from popi.prompts import Message
from popi.testing import ScriptedBackend

Write = Callable[[str], str]


class Named(ScriptedBackend):
    """Answers with its name; one that is down is unreachable."""

    def __init__(self, model: str, *, down: bool = False, words: int = 100) -> None:
        lost = ChatResult.failed("nobody is there", "unreachable", model=model)
        said = ChatResult(f"I am {model}", "stop", 1000, 500, model)
        super().__init__(lambda request: lost if down else said, model=model, context_length=words)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file, in a folder from which its paths are told."""
    module = ModuleType("parts")
    module.Named = Named  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "parts", module)
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        (tmp_path / "backend.yaml").write_text(text)
        return "backend.yaml"

    return write


def ask(text: str = "Who are you?") -> ChatRequest:
    return ChatRequest([Message("user", text)], max_tokens=10)


async def test_the_parts_of_a_file_stand_around_the_model_in_their_order(write: Write, tmp_path: Path) -> None:
    file = write(
        """
        backend: parts:Named
        model: one
        options: {words: 50}
        limit: {at_once: 2}
        price: {prompt: 1000, completion: 2000}
        retry: {attempts: 2, first: 0.001}
        budget: 100
        cache: kept/answers.sqlite
        """
    )
    backend, ledger = open_backend(file, role="inference")
    found, kinds = backend, []
    while not isinstance(found, Named):
        kinds.append(type(found))
        found = found.inner  # type: ignore[attr-defined]
    assert kinds == [Cache, Retry, Limit, Cost]
    assert backend.model == "one" and backend.capabilities.context_length == 50
    async with backend:
        for _ in range(2):
            assert [result.text for result in await backend.chat([ask()])] == ["I am one"]
    assert ledger.cap == 100 and ledger.by_role()["inference"].requests == 1
    assert ledger.total.money == pytest.approx(1000 * 1000 / 1e6 + 500 * 2000 / 1e6)
    assert (tmp_path / "kept" / "answers.sqlite").exists()


async def test_routes_serve_for_each_other_under_one_budget(write: Write) -> None:
    file = write(
        """
        routes:
          api: {backend: "parts:Named", model: far, price: {prompt: 1}}
          local: {backend: "parts:Named", model: near, options: {down: true}, breaker: {failures: 1}}
        """
    )
    backend, ledger = open_backend(file)
    assert isinstance(backend, Fallback)
    [result] = await backend.chat([ask()])
    assert (result.text, result.route) == ("I am far", "api")
    assert ledger.total.requests == 2
    await backend.close()


async def test_a_budget_of_a_file_is_kept(write: Write) -> None:
    backend, ledger = open_backend(
        write('{backend: "parts:Named", model: one, price: {completion: 1}, budget: 1.0e-7}')
    )
    [result] = await backend.chat([ask()])
    assert result.failure == "budget" and ledger.refused == 1 and ledger.total.money == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backend: parts:Named", "backend.yaml, field model: field required"),
        ("{backend: nobody, model: one}", "yaml, field backend: unknown backend 'nobody'"),
        ("{backend: 'parts:Named', model: one, retries: {}}", "field retries: extra inputs are not permitted"),
        ("{backend: 'parts:Named', model: one, options: {word: 3}}", "field options.word: .*; did you mean words"),
        ("{backend: 'parts:Named', model: one, options: {words: many}}", "field options.words: .*valid integer"),
        ("{backend: 'parts:Named', model: one, limit: {at_once: 0}}", "field limit.at_once: a limit of 0"),
        ("{backend: 'parts:Named', model: one, retry: {attempts: 0}}", "backend.yaml, field retry: 0 attempts"),
        ("{backend: 'parts:Named', model: one, price: {prompt: -1}}", "field price: a price is no less than nothing"),
        ("{backend: 'parts:Named', model: one, budget: -1}", "field budget: "),
        ("{backend: openai, model: gpt, options: {key: NO_SUCH_KEY}}", "field options: the environment variable NO_S"),
        ("routes: {}", "field routes: "),
        ("routes: {a: {backend: 'parts:Named', model: m, breaker: {rest: 0}}}", "field routes.a.breaker: 3 failures"),
        ("routes: {a: {backend: 'parts:Named', model: m}}\nmodel: m", "field model: extra inputs"),
        ("- one", "is not a JSON object"),
        ("a: [", "backend.yaml:1: is not YAML"),
    ],
)
def test_what_a_file_cannot_mean_is_one_line_with_its_place(write: Write, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_backend(write(text))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_told(write: Write) -> None:
    with pytest.raises(InputError, match=r"absent.yaml: cannot be read \(No such file or directory\)"):
        open_backend("absent.yaml")


@pytest.mark.parametrize(
    "broken",
    [
        "api: {backend: openai, model: m, options: {key: NO_SUCH_KEY}}",
        "api: {backend: 'parts:Named', model: m, limit: {at_once: 0}}",
    ],
)
async def test_what_was_opened_is_closed_when_a_later_part_cannot_be_made(
    write: Write, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def close(self: Named) -> None:
        closed.append(self.model)

    closed: list[str] = []
    monkeypatch.setattr(Named, "close", close)
    with pytest.raises(InputError, match=r"routes\.api"):
        open_backend(write(f"routes:\n  local: {{backend: 'parts:Named', model: near}}\n  {broken}\n"))
    assert closed[0] == "near"
