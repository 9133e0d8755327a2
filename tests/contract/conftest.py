"""Nothing under contract leaves this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from popi.testing import no_network


@pytest.fixture(autouse=True)
def offline() -> Iterator[None]:
    with no_network():
        yield
