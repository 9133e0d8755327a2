"""The schema of backend files: a backend and its wrappers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat

from popi.config.section import Name, Section

Arguments = dict[str, Any]
"""Keyword arguments of a part. Its constructor documents and checks them."""


class ModelConfig(Section):
    """A model, the backend that runs it, and its wrappers.

    Attributes:
        backend: ``transformers``, ``vllm``, ``openai``, or ``module:Class``.
        model: Its name, path or hub id; for a server, the server's name of the model.
        options: Arguments of the backend.
        limit: Arguments of :class:`popi.backends.wrappers.Limit`.
        price: Arguments of :class:`popi.backends.ledger.Price`: the price of a million tokens.
        retry: Arguments of :class:`popi.backends.wrappers.Retry`.
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
        breaker: Arguments of :class:`popi.backends.wrappers.Breaker`.
    """

    breaker: Arguments = Field(default_factory=dict)


class _Run(Section):
    """Settings for all requests of a run.

    Attributes:
        cache: An SQLite file that keeps results.
        budget: Maximum amount of money for a run, in the currency of the prices. Needs the price of every model.
    """

    cache: Path | None = None
    budget: NonNegativeFloat | None = None


class SingleConfig(_Run, ModelConfig):
    """One model.

    Example:
        >>> config = SingleConfig(backend="openai", model="gpt-4.1-mini", retry={"attempts": 5}, cache="results.sqlite")
        >>> config.model, config.retry
        ('gpt-4.1-mini', {'attempts': 5})
    """


class RoutesConfig(_Run):
    """Several models with failover.

    Example:
        >>> own = {"backend": "openai", "model": "my-model", "breaker": {"failures": 3}}
        >>> api = {"backend": "openai", "model": "gpt-4.1-mini"}
        >>> list(RoutesConfig.model_validate({"routes": {"own": own, "api": api}}).routes)
        ['own', 'api']

    Attributes:
        routes: The models, by their names in results and logs. The cheapest is tried first if all have a price; else
            they are tried in this order.
    """

    routes: Annotated[dict[Name, RouteConfig], Field(min_length=1)]


BackendConfig = SingleConfig | RoutesConfig
