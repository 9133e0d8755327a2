"""Opens models: one by its name, or a file's description of a backend and what stands around it."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, create_model

from popi import registry
from popi.backends.base import Backend
from popi.backends.ledger import Ledger, Price
from popi.backends.wrappers import Breaker, Cache, Cost, Fallback, Limit, Retry, Route
from popi.config import ModelConfig, RouteConfig, RoutesConfig, load_backend
from popi.errors import ConfigError, InputError, ModelError, did_you_mean
from popi.io import validate
from popi.models import shipped

Part = TypeVar("Part")

FILES = ".yaml", ".yml"

HOW = {"timeout", "concurrency", "key", "cache_gib"}
"""Options of backends that change no answer."""


def open_backend(model: str, *, role: str = "") -> tuple[Backend, Ledger]:
    """Opens a model, and the accounts of what it will cost.

    Args:
        model: A model's name, path or hub id, which runs in this process by transformers; or a YAML file that describes
            a backend (:mod:`popi.config.backend`). What is asked passes the parts of such a file in this order: the
            cache, the choice of a route, retries, limits, the budget, the model.
        role: Whose requests they are, in the accounts.

    Raises:
        ConfigError: If the file describes no backend; the field is named.
        ModelError: If the model cannot be found or used.
        MissingExtra: If what runs it is not installed.
    """
    if not model.endswith(FILES):
        return registry.backend("transformers")(model), Ledger()
    file = Path(model)
    config = load_backend(file)
    ledger = Ledger(config.budget)
    opened = _Opening(file, ledger, role)
    try:
        if isinstance(config, RoutesConfig):
            found: Backend = Fallback([opened.route(name, route) for name, route in config.routes.items()])
        else:
            found = opened.model(config, opened.made(Price, config.price or {}, "price"))
        return (found if config.cache is None else Cache(found, config.cache)), ledger
    except BaseException:
        opened.close()
        raise


def answers_rest_on(file: Path) -> tuple[str, list[str]]:
    """What of a backend's file its answers depend on, and the models that it names, as far as they lie in folders.

    How the model is asked, by whom, how often and at what price is no part of it.

    Raises:
        ConfigError: If the file describes no backend.
    """
    config = load_backend(file)
    models = list(config.routes.values()) if isinstance(config, RoutesConfig) else [config]
    asked = [
        [model.backend, model.model, {name: model.options[name] for name in sorted(model.options.keys() - HOW)}]
        for model in models
    ]
    named = sorted({*_texts(asked)})
    return json.dumps(asked), [name for name in named if name in shipped() or Path(name).expanduser().is_dir()]


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)


class _Opening:
    """Makes the parts that a file describes, and says of those that cannot be made where they stand in it."""

    def __init__(self, file: Path, ledger: Ledger, role: str) -> None:
        self._file, self._ledger, self._role = file, ledger, role
        self._models: list[Backend] = []

    def route(self, name: str, config: RouteConfig) -> Route:
        """A model among others."""
        at = f"routes.{name}."
        price = self.made(Price, config.price or {}, f"{at}price")
        breaker = self.made(Breaker, config.breaker, f"{at}breaker")
        return Route(name, self.model(config, price, at), price, breaker)

    def model(self, config: ModelConfig, price: Price, at: str = "") -> Backend:
        """A model with what stands around it."""
        kind = self.made(registry.backend, {}, f"{at}backend", config.backend)
        found: Backend = self.made(kind, config.options, f"{at}options", config.model)
        self._models.append(found)
        found = Cost(found, price=price, ledger=self._ledger, role=self._role)
        if config.limit is not None:
            found = self.made(Limit, config.limit, f"{at}limit", found)
        return found if config.retry is None else self.made(Retry, config.retry, f"{at}retry", found)

    def close(self) -> None:
        """Closes the models that were opened before a part could not be made."""

        async def close() -> None:
            for model in self._models:
                await model.close()

        # A loop may run in this thread.
        with ThreadPoolExecutor(1) as elsewhere:
            elsewhere.submit(asyncio.run, close()).result()

    def made(self, make: Callable[..., Part], given: Mapping[str, Any], at: str, *first: object) -> Part:
        """A part of these keyword arguments."""
        try:
            return make(*first, **_checked(make, given, skip=len(first)))
        except (ConfigError, ModelError) as error:
            field = ".".join(part for part in (at, error.field) if part)
            raise type(error)(error.what, file=self._file, field=field, fix=error.fix) from error


def _checked(make: Callable[..., Any], given: Mapping[str, Any], *, skip: int) -> dict[str, Any]:
    """Keyword arguments as the signature wants them, those behind the first few.

    Raises:
        ConfigError: If one is unknown, missing or of another type.
    """
    takes = list(inspect.signature(make, eval_str=True).parameters.values())[skip:]
    fields: dict[str, Any] = {
        each.name: (
            Any if each.annotation is each.empty else each.annotation,
            ... if each.default is each.empty else each.default,
        )
        for each in takes
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    }
    takes_any = any(each.kind is each.VAR_KEYWORD for each in takes)
    for name in given:
        if name not in fields and not takes_any:
            raise ConfigError("there is no such argument", field=name, fix=did_you_mean(name, fields))
    schema = create_model("Arguments", __config__=ConfigDict(extra="allow", arbitrary_types_allowed=True), **fields)
    try:
        checked = validate(schema, dict(given))
    except InputError as error:
        raise ConfigError(error.what, field=error.field, fix=error.fix) from error
    return {name: getattr(checked, name) for name in given}
