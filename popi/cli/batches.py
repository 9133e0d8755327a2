"""What the commands that work through a file share: settings that stay the same, batches, and what is kept."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from popi.cli import Interrupted
from popi.cli.output import note
from popi.errors import InputError, PopiError
from popi.provenance import check_unchanged, now, versions

if TYPE_CHECKING:
    from popi.backends.base import Backend
    from popi.backends.ledger import Ledger
    from popi.cli.growing import GrowingFile
    from popi.cli.output import Progress

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an item.

    Attributes:
        line: What is kept of it, or ``None`` if it failed.
        replaces: The number of the line whose place it takes; ``None`` is the end of the file.
        error: Why it failed.
    """

    line: str | None = None
    replaces: int | None = None
    error: str = ""


def load_backend(model: str, role: str) -> tuple[Backend, Ledger]:
    """The backend of a model, given by name, path, hub id or file, and the accounts of what a role asks of it.

    Raises:
        ConfigError: If a file describes no backend.
        ModelError: If the model cannot be found or used.
        MissingExtra: If what runs it is not installed.
    """
    from popi.assembly import open_backend

    return open_backend(identity(model), role=role)


def identity(model: str) -> str:
    """The model as it stands in settings and provenance: a path whole, wherever the command was typed."""
    from popi.models import shipped

    return str(Path(model).resolve()) if model not in shipped() and Path(model).exists() else model


def check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Finds that ``out``, as far as it was made, was made with these settings; those of an empty one bind nobody.

    Raises:
        InputError: If it was made with others.
    """
    path = _companion(out)
    if path.exists() and _holds_anything(out):
        fix = "give the same options or another --out"
        check_unchanged(_read_settings(path), _as_read(settings), file=out, fix=fix)


def keep_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Writes ``out``'s companion, ``.meta.json``, with its settings and the versions, unless they stand there already.

    For when work begins: settings with which it cannot begin, a model that is not there, bind nobody.

    Raises:
        PopiError: If it cannot be written.
    """
    from popi.io import write_text

    path = _companion(out)
    if not path.exists() or not _holds_anything(out):
        meta = {"settings": _as_read(settings), "versions": versions(), "started": now()}
        write_text(path, json.dumps(meta, indent=2, ensure_ascii=False) + "\n")


def _holds_anything(out: Path) -> bool:
    return out.exists() and out.stat().st_size > 0


def _companion(out: Path) -> Path:
    return out.with_name(f"{out.name}.meta.json")


def _as_read(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come back from the file."""
    read: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return read


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        return dict(settings)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"cannot be read ({error})", file=path, fix="restore it or give another --out") from error


async def closing(backend: Backend, work: Awaitable[Item]) -> Item:
    """Waits for work and closes its backend, however the work ends."""
    async with backend:
        return await work


async def append_batches(
    items: Iterable[Item],
    work: Callable[[list[Item]], Awaitable[list[Outcome]]],
    out: GrowingFile,
    shown: Progress,
    batch_size: int,
) -> tuple[int, int]:
    """Works through items batch by batch; the lines of a batch are on the disk before the next one begins.

    Args:
        items: What is to be done; read as it is needed.
        work: Gives the outcome of each item of a batch.
        out: Where the lines go.
        shown: Told of progress and of each item that failed.
        batch_size: The most items at once.

    Returns:
        How many succeeded and how many failed.

    Raises:
        PopiError: If the work or the writing fails as a whole.
    """
    finished = failed = 0
    rest = iter(items)
    while batch := list(islice(rest, batch_size)):
        outcomes = await work(batch)
        done = [(outcome.line, outcome.replaces) for outcome in outcomes if outcome.line is not None]
        out.replace({number: line for line, number in done if number is not None})
        out.append(line for line, number in done if number is None)
        for outcome in outcomes:
            if outcome.line is None:
                shown.note(outcome.error)
        finished += len(done)
        failed += len(outcomes) - len(done)
        shown.advance(len(outcomes))
    return finished, failed


@contextmanager
def accounted(ledger: Ledger, model: str = "") -> Iterator[None]:
    """Tells what was spent, however the work ends.

    Args:
        ledger: The accounts.
        model: Whose they are, where several are at work.

    Raises:
        PopiError: If the budget has stopped it.
    """
    try:
        yield
    finally:
        if (spent := ledger.total).requests:
            unsure = f", and {spent.unsure:.4f} at most where no server told the tokens" if spent.unsure else ""
            note(
                f"{model and f'{model}: '}{spent.requests:,} requests read {spent.prompt_tokens:,} tokens and wrote "
                f"{spent.completion_tokens:,}: {spent.money:.4f}{unsure}"
            )
    if ledger.refused:
        raise PopiError(f"the next request might pass the budget of {ledger.cap:g}, which is for one command")


def affordable(items: Iterable[Item], ledger: Ledger) -> Iterator[Item]:
    """Items as long as the budget has room."""
    return takewhile(lambda _: not ledger.refused, items)


@contextmanager
def telling(kept: str) -> Iterator[None]:
    """Adds to an interruption or a failure what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {kept}") from None
    except InputError:
        raise
    except PopiError as error:
        raise PopiError(f"{error}; {kept}") from error
