"""Conditioned generation: responses to prompts under a summary."""

from popi_generators.prompted import PromptedGenerator

__all__ = ["PromptedGenerator"]
