"""Every store, for one suite."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from popi.store import InMemoryStore, Store

STORES: dict[str, Callable[[], Store]] = {"memory": InMemoryStore}
"""How to make an empty store of each kind."""


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> Store:
    return STORES[request.param]()
