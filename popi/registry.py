"""Names of parts, and where the parts live.

A name stands for a ``module:Class`` string that is imported only when it is asked for, so a part costs
nothing until it is used and this package knows the parts above it by name alone. Wherever a name is taken, a
``module:Class`` of one's own works as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from popi.backends.base import Backend
from popi.errors import ConfigError, MissingExtra, did_you_mean
from popi.roles import ConditionedGenerator, PreferenceInference

BACKENDS = {
    "openai": "popi.backends.openai:OpenAIBackend",
    "transformers": "popi.backends.transformers:TransformersBackend",
    "vllm": "popi.backends.vllm:VLLMBackend",
}

INFERENCES = {
    "llm": "popi_inference:LLMSummarizer",
    "raw": "popi_inference:RawSignals",
    "empty": "popi_inference:Empty",
    "another-user": "popi_inference:AnotherUsers",
    "oracle": "popi_inference:Oracle",
}

GENERATORS = {
    "prompted": "popi_generators:PromptedGenerator",
}

EXTRAS = {
    "torch": "local",
    "transformers": "local",
    "safetensors": "local",
    "numpy": "local",
    "datasets": "train",
    "accelerate": "train",
    "peft": "train",
    "trl": "train",
    "deepspeed": "train",
    "matplotlib": "bench",
    "vllm": "vllm",
}
"""The extra that brings each optional module."""


def load(target: str) -> Any:
    """Imports ``module`` or ``module:name``.

    Raises:
        MissingExtra: If an optional dependency that it needs is not installed.
    """
    module, _, name = target.partition(":")
    try:
        loaded = import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        raise MissingExtra(missing, EXTRAS[missing]) from error
    return getattr(loaded, name) if name else loaded


def backend(name: str) -> Callable[..., Backend]:
    """The backend class of this name.

    Raises:
        ConfigError: If there is none.
        MissingExtra: If what it needs is not installed.
    """
    found: Callable[..., Backend] = _resolve("backend", name, BACKENDS, Backend)
    return found


def inference(name: str) -> Callable[..., PreferenceInference]:
    """The preference inference class of this name.

    Raises:
        ConfigError: If there is none.
        MissingExtra: If what it needs is not installed.
    """
    found: Callable[..., PreferenceInference] = _resolve("inference", name, INFERENCES, PreferenceInference)
    return found


def generator(name: str) -> Callable[..., ConditionedGenerator]:
    """The conditioned generator class of this name.

    Raises:
        ConfigError: If there is none.
        MissingExtra: If what it needs is not installed.
    """
    found: Callable[..., ConditionedGenerator] = _resolve("generator", name, GENERATORS, ConditionedGenerator)
    return found


def inference_options(name: str, **given: Any) -> dict[str, Any]:
    """The options with which an inference would be made: those given, and the defaults of the others.

    Raises:
        ConfigError: If the name is unknown, or an option is unknown or missing.
        MissingExtra: If what it needs is not installed.
    """
    parameters = inspect.signature(inference(name)).parameters.values()
    takes = {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.name not in ("backend", "format")
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    for option in given:
        if option not in takes and not takes_any:
            raise ConfigError(
                f"the inference {name!r} has no option {option!r}", fix=f"its options: {', '.join(takes) or 'none'}"
            )
    options = takes | given
    for option, value in options.items():
        if value is inspect.Parameter.empty:
            raise ConfigError(f"the inference {name!r} cannot be made without {option!r}")
    return options


def make_inference(name: str, backend: Backend, **given: Any) -> PreferenceInference:
    """Makes an inference by name; the backend goes to one that takes it.

    Raises:
        ConfigError: If the name is unknown, or an option is unknown, missing or out of range.
        ModelError: If the model of the backend cannot play this part.
        MissingExtra: If what it needs is not installed.
    """
    make, options = inference(name), inference_options(name, **given)
    if "backend" in inspect.signature(make).parameters:
        options["backend"] = backend
    return make(**options)


def _resolve(kind: str, name: str, known: Mapping[str, str], base: type) -> Any:
    if name not in known and ":" not in name:
        raise ConfigError(f"unknown {kind} {name!r}", fix=did_you_mean(name, known))
    try:
        found = load(known.get(name, name))
    # A name without a module is a ValueError or a TypeError.
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the {kind} {name!r} cannot be imported ({error})",
            fix="give module:Class of an installed module",
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{name!r} is no {kind} class", fix=f"it has to be a subclass of {base.__name__}")
    return found
