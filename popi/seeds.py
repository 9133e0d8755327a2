"""Seeds that depend on what is drawn and not on what was drawn before, so that a resumed run draws the same."""

from __future__ import annotations

import hashlib


def seed_of(*parts: int | str) -> int:
    """A seed of 63 bits for this combination of a run's seed, a purpose, a step and a place."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
