"""popi: personalization through summaries of what a user prefers."""

from __future__ import annotations

__version__ = "0.1.0"
