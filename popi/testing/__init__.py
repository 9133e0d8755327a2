"""For tests and benchmarks: a scripted backend, tiny models, a vLLM server, and a block without network calls."""

from __future__ import annotations

from popi.testing.network import NetworkForbidden, no_network
from popi.testing.scripted import ScriptedBackend
from popi.testing.serving import VLLMServer, free_port, vllm_server
from popi.testing.tiny import FAMILIES, tiny_model

__all__ = [
    "FAMILIES",
    "NetworkForbidden",
    "ScriptedBackend",
    "VLLMServer",
    "free_port",
    "no_network",
    "tiny_model",
    "vllm_server",
]
