from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

import popi
from popi import cli
from popi.errors import BackendError, InputError

Put = Callable[[Callable[[], None]], None]


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        """Fail."""
        raise error

    return command


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Adds a command ``made-up``."""

    def put(command: Callable[[], None]) -> None:
        module = ModuleType("made_up")
        module.command = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "made_up", module)
        monkeypatch.setitem(cli.COMMANDS, "made-up", "made_up:command")

    return put


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (BackendError("the model is gone"), 1, "popi: the model is gone\n"),
        (InputError("is odd", file="a.jsonl", line=3), 2, "popi: a.jsonl:3: is odd\n"),
        (cli.Interrupted("interrupted; 3 are kept"), 130, "popi: interrupted; 3 are kept\n"),
        (KeyboardInterrupt(), 130, "popi: interrupted\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "popi: /x: Permission denied\n"),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    error: BaseException, code: int, says: str, put: Put, capsys: pytest.CaptureFixture[str]
) -> None:
    put(raising(error))
    stdout = sys.stdout
    try:
        assert cli.main(["made-up"]) == code
    finally:
        sys.stdout = stdout
    assert capsys.readouterr().err == says


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["sumarize"], "popi: No such command 'sumarize'. Did you mean 'summarize'? (see popi --help)\n"),
        (["summarize", "--modl", "x"], "(see popi summarize --help)\n"),
        (["summarize", "--model", "x"], "popi: Missing option '--signals'. (see popi summarize --help)\n"),
        (["summarize", "--max-concurrency", "0"], "(see popi summarize --help)\n"),
    ],
)
def test_a_wrong_word_is_one_line_and_exit_code_2(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(args) == 2
    error = capsys.readouterr().err
    assert error.endswith(says)
    assert error.count("\n") == 1


def test_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"popi {popi.__version__}\n"


def test_without_a_word_it_tells_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("summarize", "generate", "doctor"))


def commands(group: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands below a group, with the words that call them."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


def letters(text: str) -> str:
    return re.sub(r"[^\w\[\]:.]", "", text)


def test_the_help_of_every_option_is_shown_as_it_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    known = list(commands(get_command(cli._app(cli.COMMANDS))))
    assert len(known) > 8
    for words, command in known:
        assert cli.main([*words, "--help"]) == 0
        shown = letters(capsys.readouterr().out)
        for option in command.params:
            assert letters(option.help or "") in shown, f"{' '.join(words)} {option.name}: {option.help}"


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
from popi.cli import main
main(["--help"])
print(sorted({"torch", "transformers", "numpy", "openai", "httpx2", "pydantic"} & sys.modules.keys()), file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr == "[]\n"


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run([sys.executable, "-m", "popi", "--version"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (1, "")


def test_warnings_of_the_library_are_notes(put: Put, capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("popi.backends")

    def warn() -> None:
        log.warning("the circuit of %r opens", "own")
        log.info("not shown")
        raise BackendError("the response is empty; raise max_tokens")

    put(warn)
    assert cli.main(["made-up"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "popi: the circuit of 'own' opens",
        "popi: the response is empty; raise --max-tokens",
    ]
    assert logging.getLogger("popi").handlers == []
