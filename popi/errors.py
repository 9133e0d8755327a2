"""The tree of errors.

::

    PopiError                     exit code 1: something failed
    |-- BackendError              a backend is dead; one failed item is data in its result
    `-- InputError                exit code 2: the person who typed it can mend it
        |-- ConfigError           a recipe or an option
        |-- ModelError            a model that cannot be found or used
        `-- MissingExtra          an optional dependency is not installed
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

LONGEST = 1000
"""Characters of a message; a longer one loses its middle."""


class PopiError(Exception):
    """Base of every error that popi raises on purpose.

    Args:
        message: What went wrong. It may quote what came from outside, so it is made one line that shows every
            character that a terminal would act on.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class BackendError(PopiError):
    """A backend as a whole cannot serve: it is dead, out of memory, or not what it claims to be.

    Args:
        message: What went wrong.
        failure: Of what kind it is, a :data:`popi.backends.base.FailureKind`, where that is known.
        retry_after: After how many seconds the backend wants to be asked again, if it said so.
    """

    def __init__(self, message: str = "", *, failure: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.failure, self.retry_after = failure, retry_after


class InputError(PopiError):
    """Bad input: says what was wrong, where, and what to do.

    Args:
        what: What was wrong, in a few words.
        file: The file at fault, if there is one.
        line: The line in it, counted from 1.
        field: The field, as a dotted path.
        fix: What to do about it.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        field: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.file, self.line, self.field, self.fix = what, file, line, field, fix
        place = ":".join(str(part) for part in (file, line) if part is not None)
        where = ", ".join(part for part in (place, f"field {field}" if field else "") if part)
        message = f"{where}: {what}" if where else what
        super().__init__(f"{message}; {fix}" if fix else message)


class ConfigError(InputError):
    """A recipe or an option that makes no sense."""


class ModelError(InputError):
    """A model that cannot be found, loaded or used for what was asked."""


class MissingExtra(InputError):
    """An optional dependency is needed and not installed.

    Args:
        module: The module that could not be imported.
        extra: The extra of the ``popi`` distribution that brings it.
    """

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed", fix=f"install it with: pip install 'popi[{extra}]'")
        self.module, self.extra = module, extra

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str]]:
        return MissingExtra, (self.module, self.extra)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What to do about an unknown name, as a ``fix``: the nearest known ones, or all there are."""
    names = sorted(known)
    near = get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(names) or 'none'}"


def one_line(message: str) -> str:
    """A text from anywhere as one line for a terminal: no breaks, no control characters, not too long."""
    line = " ".join(part for part in map(str.strip, message.splitlines()) if part)
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in line)
