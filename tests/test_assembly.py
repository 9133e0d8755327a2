"""Backends as files describe them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from popi.assembly import open_backend, response_fingerprint
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
        limit: {max_concurrency: 2}
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
          api: {backend: "parts:Named", model: far, price: {prompt: 1, completion: 1}}
          local:
            backend: "parts:Named"
            model: near
            options: {down: true}
            breaker: {failures: 1}
            price: {prompt: 0, completion: 0}
        """
    )
    backend, ledger = open_backend(file)
    assert isinstance(backend, Fallback)
    [result] = await backend.chat([ask()])
    assert (result.text, result.route) == ("I am far", "api")
    assert ledger.total.requests == 2
    await backend.close()


@pytest.mark.parametrize(
    ("prices", "first"),
    [
        (("{prompt: 2, completion: 2}", "{prompt: 1, completion: 1}"), "b"),
        (("{prompt: 1, completion: 1}", "{prompt: 1, completion: 1}"), "a"),
        (("{prompt: 2, completion: 2}", "null"), "a"),
        (("null", "{prompt: 0, completion: 0}"), "a"),
        (("null", "null"), "a"),
    ],
)
async def test_the_cheapest_is_first_only_where_every_price_is_known(
    write: Write, prices: tuple[str, str], first: str
) -> None:
    a, b = (f"{{backend: 'parts:Named', model: m, price: {price}}}" for price in prices)
    backend, _ = open_backend(write(f"routes: {{a: {a}, b: {b}}}"))
    assert [result.route for result in await backend.chat([ask()])] == [first]


async def test_a_budget_of_a_file_is_kept(write: Write) -> None:
    price = "{prompt: 1, completion: 1}"
    backend, ledger = open_backend(write(f'{{backend: "parts:Named", model: one, price: {price}, budget: 1.0e-7}}'))
    [result] = await backend.chat([ask()])
    assert result.failure == "budget" and ledger.refused == 1 and ledger.total.money == 0


MODEL = "{backend: 'parts:Named', model: one"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backend: parts:Named", "backend.yaml, field model: field required"),
        ("{backend: nobody, model: one}", "yaml, field backend: unknown backend 'nobody'"),
        (f"{MODEL}, retries: {{}}}}", "field retries: extra inputs are not permitted"),
        (f"{MODEL}, options: {{word: 3}}}}", "field options.word: .*; did you mean words"),
        (f"{MODEL}, options: {{words: many}}}}", "field options.words: .*valid integer"),
        (f"{MODEL}, limit: {{max_concurrency: 0}}}}", "field limit.max_concurrency: must be positive, got 0"),
        (f"{MODEL}, limit: {{at_once: 0}}}}", "field limit.at_once: unknown argument"),
        (f"{MODEL}, retry: {{attempts: 0}}}}", "backend.yaml, field retry.attempts: must be positive, got 0"),
        (f"{MODEL}, price: {{prompt: -1, completion: 1}}}}", "field price.prompt: a price must be zero or positive"),
        (f"{MODEL}, price: {{prompt: 1, completion: .inf}}}}", "field price.completion: a price must be zero or"),
        (f"{MODEL}, price: {{prompt: 1}}}}", "field price.completion: field required"),
        (f"{MODEL}, budget: -1}}", "field budget: "),
        (f"{MODEL}, budget: 1}}", "field price: a budget needs the price of every model; add price: {prompt: "),
        (f"{MODEL}, budget: 0}}", "field price: a budget needs the price"),
        (f"{MODEL}, price: {{}}, budget: 1}}", "field price: a budget needs the price"),
        (f"budget: 1\nroutes: {{a: {MODEL}}}}}", r"field routes\.a\.price: a budget needs the price"),
        (
            "{backend: openai, model: gpt, options: {key: NO_SUCH_KEY}}",
            "field options.key: the environment variable NO_",
        ),
        (
            "{backend: openai, model: m, options: {key: null, base_url: 'host/v1'}}",
            "field options.base_url: the base URL",
        ),
        ("{backend: openai, model: m, options: {key: null, fields: {seed: 1}}}", "field options.fields.seed: .*string"),
        (
            "{backend: openai, model: m, options: {key: null, fields: {stop: null}}}",
            "field options.fields.stop: cannot be",
        ),
        ("{backend: openai, model: m, options: {key: null, extra: {stop: a}}}", "field options.extra.stop: is a field"),
        ("routes: {}", "field routes: "),
        (f"routes: {{a: {MODEL}, breaker: {{cooldown: 0}}}}}}", "field routes.a.breaker.cooldown: must be positive"),
        (f"routes: {{a: {MODEL}}}}}\nmodel: m", "field model: extra inputs"),
        ("- one", "is not a JSON object"),
        ("a: [", "backend.yaml:1: is not YAML"),
    ],
)
def test_what_a_file_cannot_mean_is_one_line_with_its_place(write: Write, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_backend(write(text))
    assert "\n" not in str(caught.value)


def test_a_fingerprint_contains_no_secret_and_changes_with_what_answers_depend_on(write: Write) -> None:
    def fingerprint(options: str) -> str:
        return response_fingerprint(Path(write(f"{{backend: openai, model: m, options: {options}}}")))[0]

    known = fingerprint("{key: A, extra: {token: secret}, timeout: 1}")
    assert known == fingerprint("{key: B, extra: {token: secret}, max_concurrency: 2}") and "secret" not in known
    assert known != fingerprint("{key: A, extra: {token: other}}")


def test_a_file_that_is_not_there_is_told(write: Write) -> None:
    with pytest.raises(InputError, match=r"absent.yaml: cannot be read \(No such file or directory\)"):
        open_backend("absent.yaml")


@pytest.mark.parametrize(
    "broken",
    [
        "api: {backend: openai, model: m, options: {key: NO_SUCH_KEY}}",
        "api: {backend: 'parts:Named', model: m, limit: {max_concurrency: 0}}",
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
