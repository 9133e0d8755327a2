"""The command line.

Each command is a function, or a ``typer.Typer`` with subcommands, in a module of this package. These modules import
only typer and the standard library at their top and everything else in their functions, so that ``popi --help`` is
fast. A command raises :class:`popi.errors.PopiError` if it fails. :func:`main` prints the error in one line and returns
the exit code: 0, 1 (failed), 2 (bad input) or 130 (interrupted).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from io import TextIOWrapper
from typing import Annotated

import typer

from popi.cli.output import note, telling_log
from popi.errors import PopiError

COMMANDS = {
    "quickstart": "popi.cli.quickstart:quickstart",
    "summarize": "popi.cli.summarize:summarize",
    "generate": "popi.cli.generate:generate",
    "eval": "popi.cli.evaluate:evaluate",
    "train": "popi.cli.train:train",
    "plan": "popi.cli.plan:plan",
    "models": "popi.cli.models:app",
    "data": "popi.cli.data:app",
    "doctor": "popi.cli.doctor:doctor",
}
"""The function of each command, as ``module:name``."""

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 plus the number of the signal, as in shells."""


class Interrupted(PopiError):
    """Ctrl-C in a command that names the results that it has kept."""

    exit_code = INTERRUPTED


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    words = list(sys.argv[1:] if args is None else args) or ["--help"]
    names = words[:1] if words[0] in COMMANDS else list(COMMANDS)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        with telling_log(logging.WARNING):
            code = _app(names)(args=words, prog_name="popi", standalone_mode=False)
    except PopiError as error:
        for line in (str(error), *getattr(error, "__notes__", ())):
            note(line)
        return error.exit_code
    except typer.TyperException as error:
        words = [*names, "--help"] if len(names) == 1 else ["--help"]
        note(f"{error.format_message()} (see popi {' '.join(words)})")
        return error.exit_code
    except BrokenPipeError:
        sys.stdout = None  # without a reader, flushing at exit would fail again
        return 1
    except OSError as error:
        note(f"{error.filename or 'failed'}: {error.strerror or error}")
        return 1
    if code == INTERRUPTED:
        note("interrupted")
    return code or 0


def _print_version(requested: bool) -> None:
    if requested:
        from popi import __version__

        typer.echo(f"popi {__version__}")
        raise typer.Exit


def _app(names: Iterable[str]) -> typer.Typer:
    app = typer.Typer(
        # In rich's own markup, "[default: 8]" would be a style and disappear.
        rich_markup_mode="markdown",
        help="Personalization through summaries of what a user prefers.",
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    for name in names:
        module, _, attribute = COMMANDS[name].partition(":")
        command = getattr(import_module(module), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The options before the command."""
