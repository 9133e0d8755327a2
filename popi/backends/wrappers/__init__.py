"""Backends that wrap another backend and add one feature. They can be combined in any order."""

from popi.backends.wrappers.base import Wrapper
from popi.backends.wrappers.breaker import Breaker
from popi.backends.wrappers.cache import Cache
from popi.backends.wrappers.cost import Cost
from popi.backends.wrappers.fallback import Fallback, Route
from popi.backends.wrappers.limit import Limit
from popi.backends.wrappers.retry import Retry

__all__ = ["Breaker", "Cache", "Cost", "Fallback", "Limit", "Retry", "Route", "Wrapper"]
