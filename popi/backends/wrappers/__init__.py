"""Backends around a backend, each of which does one thing; they stack in any order."""

from popi.backends.wrappers.base import Wrapper
from popi.backends.wrappers.cache import Cache
from popi.backends.wrappers.limit import Limit
from popi.backends.wrappers.retry import Retry

__all__ = ["Cache", "Limit", "Retry", "Wrapper"]
