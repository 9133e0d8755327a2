"""A backend with what stands around it, as a file describes it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat

from popi.config.section import Name, Section

Arguments = dict[str, Any]
"""Keyword arguments of a part, by the names of its constructor, where they are described and checked."""


class ModelConfig(Section):
    """A model, what runs it, and what stands between it and those who ask.

    Attributes:
        backend: ``transformers``, ``vllm``, ``openai``, or ``module:Class``.
        model: Its name, path or hub id; of a server the name that it goes by there.
        options: For the backend.
        limit: For :class:`popi.backends.wrappers.Limit`.
        price: For :class:`popi.backends.ledger.Price`: what a million tokens costs.
        retry: For :class:`popi.backends.wrappers.Retry`.
    """

    backend: str
    model: str
    options: Arguments = Field(default_factory=dict)
    limit: Arguments | None = None
    price: Arguments | None = None
    retry: Arguments | None = None


class RouteConfig(ModelConfig):
    """One of several models.

    Attributes:
        breaker: For :class:`popi.backends.wrappers.Breaker`.
    """

    breaker: Arguments = Field(default_factory=dict)


class _Run(Section):
    """What holds for all that is asked in a run.

    Attributes:
        cache: An SQLite file that keeps answers.
        budget: The most money of a run.
    """

    cache: Path | None = None
    budget: NonNegativeFloat | None = None


class SingleConfig(_Run, ModelConfig):
    """One model."""


class RoutesConfig(_Run):
    """Several models, of which the first that can serves.

    Attributes:
        routes: By their names in results and logs, in the order in which they are asked where prices are equal.
    """

    routes: Annotated[dict[Name, RouteConfig], Field(min_length=1)]


BackendConfig = SingleConfig | RoutesConfig
