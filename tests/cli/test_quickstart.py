"""``popi quickstart`` as it is typed."""

from __future__ import annotations

import json

import pytest

from popi.backends.base import ChatRequest, ChatResult
from popi.cli import main
from popi.prompts import DEFAULT
from popi.testing import ScriptedBackend


def answer(request: ChatRequest) -> str | ChatResult:
    text = request.messages[-1].content
    if "Signals of one user" in text:
        return "- bullet points [2, 1]\n- something [nice]"
    return "Told." if DEFAULT.open in text else "Plain."


@pytest.fixture(autouse=True)
def few_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("popi.cli.quickstart.USERS", 5)
    monkeypatch.setattr("popi.registry.backend", lambda name: lambda model: ScriptedBackend(answer, model=model))


def test_it_tells_the_whole_story(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart"]) == 0
    told = capsys.readouterr().out
    places = [
        told.index(part)
        for part in (
            "popi in miniature",
            "[1] ",
            "popi-mini-base infers, untrained",
            "popi-mini-writer infers, trained",
            "bullet points  (from 1, 2)",
            "something [nice]  (no citation)",
            "Plain.",
            "popi-mini-generator: preference accuracy",
            "popi-mini-reader: preference accuracy",
            "The mini world is a miniature",
            "popi doctor",
        )
    ]
    assert places == sorted(places)


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds[:5] == ["user", "summary", "summary", "answers", "answers"]
    assert kinds.count("cell") == 8 * 2
    assert [line["provenance"]["model"] for line in lines[1:3]] == ["popi-mini-base", "popi-mini-writer"]
    signals = [signal["id"] for signal in lines[0]["signals"]]
    assert lines[2]["claims"][0]["evidence"] == [signals[1], signals[0]]
    assert (lines[3]["plain"], lines[3]["personalized"]) == ("Plain.", "Told.")


def test_an_answer_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(request: ChatRequest) -> str | ChatResult:
        text = request.messages[-1].content
        failed = ChatResult.failed("no memory", "server", model="m")
        return "- bullet points" if "Signals of one user" in text else failed

    monkeypatch.setattr("popi.registry.backend", lambda name: lambda model: ScriptedBackend(fail, model=model))
    assert main(["quickstart"]) == 1
    assert capsys.readouterr().err == "popi: no response: no memory\n"
