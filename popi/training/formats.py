"""The formats of the two roles in training: those of the classes that serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from popi import registry
from popi.backends.base import Backend
from popi.errors import ConfigError
from popi.roles import AnswerFormat, PreferenceInference, SummaryFormat

Made = TypeVar("Made")

SET_BY_RECIPE = ("max_tokens", "temperature", "seed", "attempts")
"""Options of an inference that training sets."""


def summary_format(name: str, backend: Backend, *, max_tokens: int, options: Mapping[str, Any]) -> SummaryFormat:
    """Returns the format of an inference: it renders the writer's prompts and parses its replies.

    Args:
        name: Registry name or ``module:Class`` of the inference.
        backend: The writer.
        max_tokens: Maximum number of tokens of a summary.
        options: Further options of the inference.

    Raises:
        ConfigError: If the inference is unknown or has no format, or an option is wrong.
        ModelError: If the model cannot be used for it.
    """
    for option in options:
        if option in SET_BY_RECIPE:
            fix = "set writer.max_tokens or writer.temperature" if option in SET_BY_RECIPE[:2] else "remove it"
            raise ConfigError("is set by the recipe", field=f"writer.options.{option}", fix=fix)
    given = dict(options)
    if registry.takes(registry.inference(name), "max_tokens"):
        given["max_tokens"] = max_tokens
    inference = _make("writer", "inference", lambda: registry.make_inference(name, backend, **given))
    if inference.format is None:
        what = f"{name} has no format and cannot be trained"
        raise ConfigError(what, field="writer.inference", fix="use llm, or a class with a format")
    return inference.format


def answer_format(name: str, backend: Backend, *, options: Mapping[str, Any]) -> AnswerFormat:
    """Returns the format of a generator: it renders the generator's prompts.

    Args:
        name: Registry name or ``module:Class`` of the generator.
        backend: The generator's model.
        options: Options of the generator.

    Raises:
        ConfigError: If the generator is unknown or has no format, or an option is wrong.
        ModelError: If the model cannot be used for it.
    """
    registry.generator(name)  # the error of an unknown name is not one of its options
    generator = _make("generator", "generator", lambda: registry.make_generator(name, backend, **options))
    if generator.format is None:
        what = f"{name} has no format and cannot be trained"
        raise ConfigError(what, field="generator.generation", fix="use prompted, or a class with a format")
    return generator.format


def summarizer(
    format: SummaryFormat, backend: Backend, *, max_tokens: int, temperature: float, seed: int
) -> PreferenceInference:
    """Makes an inference that requests each summary once, in a given format.

    Args:
        format: Renders the prompts and parses the replies.
        backend: The writer.
        max_tokens: Maximum number of tokens of a summary.
        temperature: Sampling temperature; 0 is greedy.
        seed: Seed for sampling.
    """
    options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    return registry.inference("llm")(backend, format=format, attempts=1, **options)


def _make(section: str, kind: str, make: Callable[[], Made]) -> Made:
    """Names the option of the recipe in the errors of a role."""
    try:
        return make()
    except ConfigError as error:
        option = (error.field or "").removeprefix(f"{kind}_options.")
        raise ConfigError(error.what, field=f"{section}.options.{option}".rstrip("."), fix=error.fix) from error
