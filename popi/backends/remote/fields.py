"""The names of request fields. Servers support different ones, and reject unknown fields."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from popi.backends.remote.failures import Rejected
from popi.engine.forking import ForkLock
from popi.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)

OPTIONAL = ("stream_options", "stop_token_ids", "seed", "top_p", "temperature")
"""Fields that can be dropped with little effect. The first one that an error names is dropped."""

LIMITS = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
"""The two names of the maximum number of new tokens, each with the other one."""

RENAMABLE = ("max_tokens", "stop", *OPTIONAL)
RESERVED = {
    *("model", "messages", "prompt", "stream", "echo", "logprobs", "top_logprobs", "n", "best_of"),
    *LIMITS,
    *RENAMABLE,
}
"""Fields that popi sets itself."""

UNKNOWN = re.compile(r"unsupported|not support|unknown|unrecogni|unexpected|extra inputs|not (permitted|allowed)", re.I)
OUT_OF_RANGE = re.compile(
    r"\b(must|should) be|between|at (most|least)|greater|less than|too (large|small|long|high|low|many)|maximum|minimum"
    r"|exceed|range|invalid value|valid (number|integer|string)",
    re.I,
)
"""Matches an error about the value of a field. Dropping the field would change the meaning of the request."""


class Fields:
    """Renames, drops and adds fields of request bodies, and records which ones the server rejects.

    Args:
        model: The server's name of the model, for the log.
        limit: Name of the field for the maximum number of new tokens.
        names: Other names of fields; ``None`` drops the field.
        extra: Fields to add to each request.

    Raises:
        ConfigError: If a field cannot be renamed, dropped or added.
    """

    def __init__(self, model: str, *, limit: str, names: Mapping[str, str | None], extra: Mapping[str, Any]) -> None:
        for name, other in names.items():
            if name not in RENAMABLE:
                raise ConfigError("cannot be renamed", field=f"fields.{name}", fix=did_you_mean(name, RENAMABLE))
            if other is None and name not in OPTIONAL:
                raise ConfigError("cannot be dropped, only renamed", field=f"fields.{name}", fix="give its other name")
            if other is not None and (not other or (other in RESERVED and LIMITS.get(name) != other)):
                raise ConfigError(
                    f"cannot be renamed to {other!r}", field=f"fields.{name}", fix="give a name that is not in use"
                )
        for name in extra:
            if name in RESERVED or name in names.values():
                raise ConfigError(
                    "is a field that popi sets itself", field=f"extra.{name}", fix="remove it, or rename it in fields"
                )
        try:
            json.dumps(extra, allow_nan=False)
        except (TypeError, ValueError):
            raise ConfigError("must contain only JSON values", field="extra") from None
        self._model, self._extra = model, dict(extra)
        self._names: dict[str, str | None] = {"max_tokens": limit, **names}
        self._learnt: dict[str, str | None] = {}
        self._lock = ForkLock()

    def attempt(self, arguments: Mapping[str, Any]) -> Attempt:
        """Returns the first attempt to send these arguments."""
        sent = {self._names.get(name, name): value for name, value in arguments.items()}
        return Attempt(self, {name: value for name, value in sent.items() if name is not None} | self._extra)

    def adapted(self, body: Mapping[str, Any], changes: Mapping[str, str | None]) -> dict[str, Any]:
        """A body with the changes that the server is known to need, and with further ones."""
        known = {**self._learnt, **changes}
        renamed = {known.get(name, name): value for name, value in body.items()}
        return {name: value for name, value in renamed.items() if name is not None}

    def remember(self, changes: Mapping[str, str | None], reasons: Mapping[str, str]) -> None:
        """Applies changes to all further requests of this process, and logs each once."""
        for name, other in changes.items():
            with self._lock:
                is_new = name not in self._learnt
                self._learnt[name] = other
            if is_new:
                how = f"sending it as {other}" if other else "no longer sending it"
                log.warning("%s rejects %s, %s: %s", self._model, name, how, reasons[name])


class Attempt:
    """A request that may be sent again with other fields if the server rejects one.

    Args:
        fields: The field names of the server.
        body: The body.
    """

    def __init__(self, fields: Fields, body: Mapping[str, Any]) -> None:
        self._fields, self._body, self._sent = fields, body, dict[str, Any]()
        self._changes: dict[str, str | None] = {}
        self._reasons: dict[str, str] = {}
        self._first: Rejected | None = None

    def body(self) -> dict[str, Any]:
        """Returns the body to send."""
        self._sent = self._fields.adapted(self._body, self._changes)
        return self._sent

    def rejected(self, error: Rejected) -> None:
        """Changes the body after a rejection.

        Raises:
            Rejected: If no change of the body can help.
        """
        if self._fields.adapted(self._body, self._changes) != self._sent:
            return  # another request has already found the changes that this body needs
        if self._first is not None and any(_names(error, name) for name in self._touched()):
            raise self._first
        field = _field_to_change(error, self._sent) if error.status in (400, 422) else None
        if field is None:
            if self._changes:
                self.accepted()
            raise error
        self._first = self._first or error
        self._changes[field], self._reasons[field] = LIMITS.get(field), error.message

    def accepted(self) -> None:
        """Records the changes, because the server accepted the changed body."""
        self._fields.remember(self._changes, self._reasons)
        self._changes = {}

    def _touched(self) -> list[str]:
        return [name for change in self._changes.items() for name in change if name is not None]


def _field_to_change(error: Rejected, body: Mapping[str, Any]) -> str | None:
    """The field that an error is about, if the request can do without it or the field has another name."""
    if OUT_OF_RANGE.search(error.message) and not UNKNOWN.search(error.message):
        return None
    changeable = [name for name in (*OPTIONAL, *LIMITS) if name in body]
    pointed = [name for name in changeable if name in error.fields]
    return next((name for name in (*pointed, *changeable) if _names(error, name)), None)


def _names(error: Rejected, field: str) -> bool:
    return field in error.fields or re.search(rf"(?<![\w.]){field}(?!\w)", error.message) is not None
