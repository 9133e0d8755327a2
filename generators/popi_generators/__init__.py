"""Conditioned generation: what answers a prompt under a summary."""

from popi_generators.prompted import PromptedGenerator

__all__ = ["PromptedGenerator"]
