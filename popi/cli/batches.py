"""Parts of the commands that process a file: settings that must not change, costs, interruptions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from popi.cli import Interrupted
from popi.cli.output import note
from popi.errors import InputError, PopiError
from popi.provenance import check_unchanged, now, versions

if TYPE_CHECKING:
    from popi.backends.base import Backend
    from popi.backends.ledger import Ledger

Item = TypeVar("Item")


def load_backend(model: str, role: str) -> tuple[Backend, Ledger]:
    """Opens the backend of a model, and the accounts of the requests of a role.

    Args:
        model: The model: its name, path or hub id, or a YAML file.
        role: The role that sends the requests.

    Raises:
        ConfigError: If the file does not describe a backend.
        ModelError: If the model cannot be found or used.
        MissingExtra: If the packages that run it are not installed.
    """
    from popi.assembly import open_backend

    return open_backend(identity(model), role=role)


def identity(model: str) -> str:
    """The model as recorded in settings and provenance: a path is made absolute."""
    from popi.models import downloaded, shipped

    return str(Path(model).resolve()) if model not in (*shipped(), *downloaded()) and Path(model).exists() else model


def check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Checks that the content of ``out`` was made with these settings. An empty file may have any.

    Raises:
        InputError: If it was made with others.
    """
    path = _settings_file(out)
    if path.exists() and _has_content(out):
        known = _read_settings(path)
        fix = "give the same options, or name another file with --out"
        check_unchanged({name: known.get(name) for name in settings}, _as_read(settings), file=out, fix=fix)


def keep_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings of ``out`` and the versions into a file next to it, ``.meta.json``, if they are new.

    To be called when the work can start: settings with which it cannot start are not recorded.

    Raises:
        PopiError: If the file cannot be written.
    """
    from popi.io import write_text

    path = _settings_file(out)
    if not path.exists() or not _has_content(out):
        meta = {"settings": _as_read(settings), "versions": versions(), "started": now()}
        write_text(path, json.dumps(meta, indent=2, ensure_ascii=False) + "\n")


def _has_content(out: Path) -> bool:
    return out.exists() and out.stat().st_size > 0


def _settings_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.meta.json")


def _as_read(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as read back from the file."""
    read: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return read


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        return dict(settings)
    except (OSError, ValueError, LookupError, TypeError) as error:
        fix = "restore it, or name another file with --out"
        raise InputError(f"cannot be read ({error})", file=path, fix=fix) from error


@contextmanager
def reporting_cost(ledger: Ledger, model: str = "") -> Iterator[None]:
    """Prints the cost of the requests inside the block, also if it fails.

    Args:
        ledger: The accounts.
        model: The model, if there are several.

    Raises:
        PopiError: If the budget has ended the work.
    """
    try:
        yield
    finally:
        if (spent := ledger.total).requests:
            unsure = f", and at most {spent.unsure:.4f} for tokens that no server reported" if spent.unsure else ""
            requests = "1 request" if spent.requests == 1 else f"{spent.requests:,} requests"
            note(
                f"{model and f'{model}: '}{requests} read {spent.prompt_tokens:,} tokens and wrote "
                f"{spent.completion_tokens:,}: {spent.money:.4f}{unsure}"
            )
    if ledger.refused:
        raise PopiError(f"the next request might exceed the budget of {ledger.cap:g}, which is for one command")


def within_budget(items: Iterable[Item], ledger: Ledger) -> Iterator[Item]:
    """The items, until the budget has refused a request."""
    return takewhile(lambda _: not ledger.refused, items)


@contextmanager
def explaining_errors(kept: str) -> Iterator[None]:
    """Adds a sentence about kept results to the message of an interruption or a failure."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {kept}") from None
    except InputError:
        raise
    except PopiError as error:
        raise PopiError(f"{error}; {kept}") from error
