"""The exception hierarchy of popi.

::

    PopiError                     exit code 1: something failed
    |-- BackendError              a backend is not available; one failed item is data in its result
    |-- LockedError               another process writes the same file
    `-- InputError                exit code 2: bad input that the caller can fix
        |-- ConfigError           invalid recipe or option
        |-- ModelError            a model was not found or cannot be used
        `-- MissingExtra          an optional dependency is not installed
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

LONGEST = 1000
"""Maximum number of characters of a message. The middle of a longer one is left out."""


class PopiError(Exception):
    """Base class of all errors that popi raises on purpose.

    A message may quote text from outside. It is reduced to one line, and control characters are escaped. Errors that
    concern several places carry the further ones as notes (``__notes__``), one line each.

    Args:
        message: What went wrong.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class BackendError(PopiError):
    """A backend as a whole is not available: unreachable, out of memory, or different from its configuration.

    Args:
        message: What went wrong.
        failure: The kind of failure, a :data:`popi.backends.base.FailureKind`; ``None`` if unknown.
        retry_after: Seconds to wait before a retry, if the server sent them.
    """

    def __init__(self, message: str = "", *, failure: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.failure, self.retry_after = failure, retry_after


class LockedError(PopiError):
    """Another process writes the same file. It can be written when that process has ended."""


class InputError(PopiError):
    """Bad input. The message says what is wrong, where, and how to fix it.

    Example:
        >>> print(InputError("field required", file="users.jsonl", line=3, field="user_id", fix="name the user"))
        users.jsonl:3, field user_id: field required; name the user

    Args:
        what: What is wrong, in a few words.
        file: The file that contains the error, if there is one.
        line: Its line number, starting at 1.
        field: The field, as a dotted path.
        fix: What to do about it.
        skippable: Whether a reader that skips bad rows may continue without this one. ``False`` if the row shows that
            other rows may have been misread.
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
        skippable: bool = True,
    ) -> None:
        self.what, self.file, self.line, self.field, self.fix = what, file, line, field, fix
        self.skippable = skippable
        place = ":".join(str(part) for part in (file, line) if part is not None)
        where = ", ".join(part for part in (place, f"field {field}" if field else "") if part)
        message = f"{where}: {what}" if where else what
        super().__init__(f"{message}; {fix}" if fix else message)


class ConfigError(InputError):
    """An invalid recipe or option."""


class ModelError(InputError):
    """A model that was not found, cannot be loaded, or does not support what was requested."""


class MissingExtra(InputError):
    """An optional dependency is needed but not installed.

    Args:
        module: The module that could not be imported.
        extra: The extra of the ``popi`` distribution that installs it.
    """

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed", fix=f"install it with: pip install 'popi[{extra}]'")
        self.module, self.extra = module, extra

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str]]:
        return MissingExtra, (self.module, self.extra)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggests how to fix an unknown name: the most similar known names, or all of them.

    Example:
        >>> did_you_mean("trian", ["train", "eval"])
        'did you mean train?'
    """
    names = sorted(known)
    near = get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"known names: {', '.join(names) or '(none)'}"


def one_line(message: str) -> str:
    """Makes any text printable on one line of a terminal: no line breaks or control characters, limited length."""
    line = " ".join(part for part in map(str.strip, message.splitlines()) if part)
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in line)
