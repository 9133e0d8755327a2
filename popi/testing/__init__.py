"""Doubles that ship: a scripted backend, tiny models made in memory, and a switch that forbids network calls."""

from __future__ import annotations

from popi.testing.network import NetworkForbidden, no_network
from popi.testing.scripted import ScriptedBackend
from popi.testing.tiny import FAMILIES, tiny_model

__all__ = ["FAMILIES", "NetworkForbidden", "ScriptedBackend", "no_network", "tiny_model"]
