"""Names of backends, inferences and generators.

A name refers to a ``module:Class`` string, which is imported when it is first used. Wherever popi takes such a name, a
``module:Class`` of your code works too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from pydantic import ConfigDict, create_model

from popi.backends.base import Backend
from popi.errors import ConfigError, InputError, MissingExtra, did_you_mean
from popi.io import validate
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
    "ray": "ray",
    "gguf": "gguf",
}
"""The extra that installs each optional module."""


def load(target: str) -> Any:
    """Imports ``module`` or ``module:name``.

    Raises:
        MissingExtra: If an optional dependency of the module is not installed.
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
    """Returns the backend class with this name.

    Raises:
        ConfigError: If the class does not exist.
        MissingExtra: If an optional dependency of the class is not installed.
    """
    resolved: Callable[..., Backend] = _resolve("backend", name, BACKENDS, Backend)
    return resolved


def inference(name: str) -> Callable[..., PreferenceInference[Any]]:
    """Returns the inference class with this name.

    Raises:
        ConfigError: If the class does not exist.
        MissingExtra: If an optional dependency of the class is not installed.
    """
    resolved: Callable[..., PreferenceInference[Any]] = _resolve("inference", name, INFERENCES, PreferenceInference)
    return resolved


def generator(name: str) -> Callable[..., ConditionedGenerator]:
    """Returns the generator class with this name.

    Raises:
        ConfigError: If the class does not exist.
        MissingExtra: If an optional dependency of the class is not installed.
    """
    resolved: Callable[..., ConditionedGenerator] = _resolve("generator", name, GENERATORS, ConditionedGenerator)
    return resolved


def inference_options(name: str, /, **given: Any) -> dict[str, Any]:
    """Returns all options that an inference is made with: the given ones, and the defaults of the others.

    Its arguments ``backend`` and ``format`` are not options.

    Raises:
        ConfigError: If the name is unknown, or an option is unknown, missing or of another type.
        MissingExtra: If an optional dependency of the class is not installed.
    """
    return _options("inference", name, inference(name), given)


def generator_options(name: str, /, **given: Any) -> dict[str, Any]:
    """Returns all options that a generator is made with. The same as :func:`inference_options` otherwise."""
    return _options("generator", name, generator(name), given)


def takes(make: Callable[..., Any], option: str) -> bool:
    """Whether a function or a class takes a keyword argument of this name."""
    parameters = _parameters(make)
    return _takes_any(parameters) or any(parameter.name == option for parameter in _named(parameters))


def make_inference(name: str, backend: Backend, /, **given: Any) -> PreferenceInference[Any]:
    """Makes an inference by name. The class gets the backend if it accepts one.

    Raises:
        ConfigError: If the name is unknown, or an option is unknown, missing, of another type or out of range.
        ModelError: If the model of the backend cannot be used for it.
        MissingExtra: If an optional dependency of the class is not installed.
    """
    made: PreferenceInference[Any] = _make("inference", name, inference(name), backend, given)
    return made


def make_generator(name: str, backend: Backend, /, **given: Any) -> ConditionedGenerator:
    """Makes a generator by name. The same as :func:`make_inference` otherwise."""
    made: ConditionedGenerator = _make("generator", name, generator(name), backend, given)
    return made


def check_arguments(make: Callable[..., Any], given: Mapping[str, Any], *, skip: int = 0) -> dict[str, Any]:
    """Checks keyword arguments against a signature, and converts them to the annotated types.

    Args:
        make: A function or a class.
        given: The arguments.
        skip: Number of leading parameters that are not given here.

    Raises:
        ConfigError: If one is unknown, missing or has another type. The error names the argument as its field.
    """
    return _check(_parameters(make)[skip:], given)


def _make(kind: str, name: str, make: Callable[..., Any], backend: Backend, given: Mapping[str, Any]) -> Any:
    options = _options(kind, name, make, given)
    if any(parameter.name == "backend" for parameter in _parameters(make)):
        options["backend"] = backend
    try:
        return make(**options)
    except TypeError as error:
        # The class passes its options on to another class, which has other options.
        if "unexpected keyword argument" not in str(error):
            raise
        raise ConfigError(f"the {kind} {name!r} cannot be made: {error}") from error


def _options(kind: str, name: str, make: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    parameters = [parameter for parameter in _parameters(make) if parameter.name not in ("backend", "format")]
    defaults = {named.name: named.default for named in _named(parameters)}
    for option in given:
        if option not in defaults and not _takes_any(parameters):
            fix = f"its options: {', '.join(defaults) or '(none)'}"
            raise ConfigError(f"the {kind} {name!r} has no option {option!r}", fix=fix)
    for option, default in defaults.items():
        if default is inspect.Parameter.empty and option not in given:
            raise ConfigError(f"the {kind} {name!r} needs the option {option!r}")
    try:
        return defaults | _check(parameters, given)
    except ConfigError as error:
        raise ConfigError(error.what, field=f"{kind}_options.{error.field}", fix=error.fix) from error


def _check(parameters: Sequence[inspect.Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        named.name: (
            Any if named.annotation is named.empty else named.annotation,
            ... if named.default is named.empty else named.default,
        )
        for named in _named(parameters)
    }
    for name in given:
        if name not in fields and not _takes_any(parameters):
            raise ConfigError("unknown argument", field=name, fix=did_you_mean(name, fields))
    schema = create_model("Arguments", __config__=ConfigDict(extra="allow", arbitrary_types_allowed=True), **fields)
    try:
        checked = validate(schema, dict(given))
    except InputError as error:
        raise ConfigError(error.what, field=error.field, fix=error.fix) from error
    return {name: getattr(checked, name) for name in given}


def _parameters(make: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(make, eval_str=True).parameters.values())
    # An annotation may be a name that is imported for type checkers only.
    except NameError:
        parameters = inspect.signature(make).parameters.values()
        return [parameter.replace(annotation=parameter.empty) for parameter in parameters]


def _named(parameters: Sequence[inspect.Parameter]) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter for parameter in parameters if parameter.kind in kinds]


def _takes_any(parameters: Sequence[inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _resolve(kind: str, name: str, known: Mapping[str, str], base: type) -> Any:
    if name not in known and ":" not in name:
        raise ConfigError(f"unknown {kind} {name!r}", fix=did_you_mean(name, known))
    try:
        resolved = load(known.get(name, name))
    # A name without a module is a ValueError or a TypeError.
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the {kind} {name!r} cannot be imported ({error})",
            fix="give module:Class of an installed module",
        ) from error
    if not (isinstance(resolved, type) and issubclass(resolved, base)):
        raise ConfigError(f"the {kind} {name!r} is not a subclass of {base.__name__}")
    if missing := sorted(getattr(resolved, "__abstractmethods__", ())):
        raise ConfigError(f"the {kind} {name!r} is abstract", fix=f"implement its methods: {', '.join(missing)}")
    return resolved
