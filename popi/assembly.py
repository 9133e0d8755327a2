"""Opens models: by name, or by a file that describes a backend and its wrappers."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from popi import registry
from popi.backends.base import Backend
from popi.backends.ledger import FREE, Ledger, Price
from popi.backends.wrappers import Breaker, Cache, Cost, Fallback, Limit, Retry, Route
from popi.config import FILES, BackendConfig, ModelConfig, RouteConfig, RoutesConfig, load_backend
from popi.errors import ConfigError, ModelError
from popi.models import fingerprint, is_local

Part = TypeVar("Part")


NEUTRAL = {"timeout", "max_concurrency", "key", "cache_gib"}
"""Options of backends that do not change responses."""


def open_backend(model: str, *, role: str = "") -> tuple[Backend, Ledger]:
    """Opens a model, and the accounts of its cost.

    Args:
        model: A model's name, its folder, a GGUF file, or a hub id, which runs in this process with transformers; or a
            YAML file that describes a backend (:mod:`popi.config.backend`). Requests pass the parts of such a file in
            this order: the cache, the choice of a route, retries, limits, the budget, the model.
        role: The role that sends the requests, for the accounts.

    Raises:
        ConfigError: If the file does not describe a backend; the field is named.
        ModelError: If the model cannot be found or used.
        MissingExtra: If the packages that run it are not installed.
    """
    if not model.endswith(FILES):
        return registry.backend("transformers")(model), Ledger()
    file = Path(model)
    config = load_backend(file)
    _check_prices(config, file)
    ledger = Ledger(config.budget)
    opening = _Opening(file, ledger, role)
    try:
        if isinstance(config, RoutesConfig):
            backend: Backend = Fallback([opening.route(name, route) for name, route in config.routes.items()])
        else:
            backend = opening.model(config, opening.price(config))
        return (backend if config.cache is None else Cache(backend, config.cache)), ledger
    except BaseException:
        opening.close()
        raise


def fingerprint_model(model: str) -> str | None:
    """The fingerprint of a model's files; for a backend file, of everything in it that affects responses.

    Raises:
        ConfigError: If a file does not describe a backend.
        ModelError: If a model does not exist.
    """
    if not model.endswith(FILES):
        return fingerprint(model)
    what, models = response_fingerprint(Path(model))
    return hashlib.sha256(repr([what, *map(fingerprint, models)]).encode()).hexdigest()[:16]


def response_fingerprint(file: Path) -> tuple[str, list[str]]:
    """Returns a fingerprint of everything in a backend file that affects responses, and the local models that it names.

    The fingerprint does not depend on concurrency, retries, prices and the key.

    Raises:
        ConfigError: If the file does not describe a backend.
    """
    models = [
        [model.backend, model.model, {name: model.options[name] for name in sorted(model.options.keys() - NEUTRAL)}]
        for model in _models(load_backend(file)).values()
    ]
    named = sorted({*_texts(models)})
    # Options may contain secrets.
    digest = hashlib.sha256(json.dumps(models, default=str).encode()).hexdigest()[:16]
    return digest, list(filter(is_local, named))


def _models(config: BackendConfig) -> dict[str, ModelConfig]:
    """The models of a file, by their place in it."""
    if isinstance(config, RoutesConfig):
        return {f"routes.{name}.": route for name, route in config.routes.items()}
    return {"": config}


def _check_prices(config: BackendConfig, file: Path) -> None:
    """Checks that every model has a price if there is a budget. A model without a price would never use it up."""
    for place, model in _models(config).items():
        if config.budget is not None and not model.price:
            raise ConfigError(
                "a budget needs the price of every model",
                file=file,
                field=f"{place}price",
                fix="add price: {prompt: ..., completion: ...} per million tokens, with 0 for a model that is free",
            )


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)


class _Opening:
    """Makes the parts that a file describes; errors name the field."""

    def __init__(self, file: Path, ledger: Ledger, role: str) -> None:
        self._file, self._ledger, self._role = file, ledger, role
        self._models: list[Backend] = []

    def route(self, name: str, config: RouteConfig) -> Route:
        """One of several models."""
        at = f"routes.{name}."
        price = self.price(config, at)
        breaker = self.part(Breaker, config.breaker, f"{at}breaker")
        return Route(name, self.model(config, price, at), price, breaker)

    def price(self, config: ModelConfig, at: str = "") -> Price | None:
        """The price of a model; ``None`` if the file does not say."""
        return self.part(Price, config.price, f"{at}price") if config.price else None

    def model(self, config: ModelConfig, price: Price | None, at: str = "") -> Backend:
        """A model in its wrappers."""
        kind = self.part(registry.backend, {}, f"{at}backend", config.backend)
        backend: Backend = self.part(kind, config.options, f"{at}options", config.model)
        self._models.append(backend)
        backend = Cost(backend, price=price or FREE, ledger=self._ledger, role=self._role)
        if config.limit is not None:
            backend = self.part(Limit, config.limit, f"{at}limit", backend)
        return backend if config.retry is None else self.part(Retry, config.retry, f"{at}retry", backend)

    def close(self) -> None:
        """Closes the models that were opened before a part failed."""

        async def close() -> None:
            for model in self._models:
                await model.close()

        # A loop may run in this thread.
        with ThreadPoolExecutor(1) as elsewhere:
            elsewhere.submit(asyncio.run, close()).result()

    def part(self, make: Callable[..., Part], given: Mapping[str, Any], at: str, *first: object) -> Part:
        """Makes a part from keyword arguments."""
        try:
            return make(*first, **registry.check_arguments(make, given, skip=len(first)))
        except (ConfigError, ModelError) as error:
            field = ".".join(part for part in (at, error.field) if part)
            raise type(error)(error.what, file=self._file, field=field, fix=error.fix) from error
