"""popi: personalization through summaries of what a user prefers.

The public names are imported when they are first used, so ``import popi`` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from popi.errors import BackendError, ConfigError, InputError, MissingExtra, ModelError, PopiError
    from popi.interface import Interface, UserEmbedding
    from popi.personalizer import Personalizer
    from popi.response import Response
    from popi.roles import Failure
    from popi.signals import (
        Comment,
        Conversation,
        Demographics,
        Edit,
        PreferencePair,
        Rating,
        Signal,
        Speaker,
        Statement,
        Turn,
        UserSignals,
    )
    from popi.store import InMemoryStore, Store
    from popi.summary import Claim, PreferenceSummary

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Claim",
    "Comment",
    "ConfigError",
    "Conversation",
    "Demographics",
    "Edit",
    "Failure",
    "InMemoryStore",
    "InputError",
    "Interface",
    "MissingExtra",
    "ModelError",
    "Personalizer",
    "PopiError",
    "PreferencePair",
    "PreferenceSummary",
    "Rating",
    "Response",
    "Signal",
    "Speaker",
    "Statement",
    "Store",
    "Turn",
    "UserEmbedding",
    "UserSignals",
]

_HOMES = (
    "popi.errors",
    "popi.signals",
    "popi.summary",
    "popi.interface",
    "popi.roles",
    "popi.response",
    "popi.store",
    "popi.personalizer",
)
"""The modules of the public names; those that import little come first."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'popi' has no attribute {name!r}")
    homes = map(import_module, _HOMES)
    globals()[name] = value = next(getattr(home, name) for home in homes if hasattr(home, name))
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
