"""Examples in docstrings: all of them run, and every class that users name has one."""

from __future__ import annotations

import ast
import doctest
import pkgutil
from collections.abc import Iterator
from enum import Enum
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import popi
from popi import registry
from popi.backends import wrappers
from popi.errors import MissingExtra, PopiError

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("popi", "popi_inference", "popi_generators")


def is_class(value: object) -> bool:
    """Whether users make objects of it: not a union of classes, an error or an enumeration."""
    return isinstance(value, type) and not issubclass(value, PopiError | Enum)


PUBLIC = sorted(
    {
        *(f"popi:{name}" for name in popi.__all__ if is_class(getattr(popi, name))),
        *registry.BACKENDS.values(),
        *registry.INFERENCES.values(),
        *registry.GENERATORS.values(),
        *(f"popi.backends.wrappers:{name}" for name in wrappers.__all__),
        "popi.backends.base:Backend",
        "popi.backends.base:Capabilities",
        "popi.backends.base:ChatRequest",
        "popi.backends.base:ScoreRequest",
        "popi.backends.ledger:Ledger",
        "popi.backends.ledger:Price",
        "popi.config:PretrainRecipe",
        "popi.config:RoutesConfig",
        "popi.config:SingleConfig",
        "popi.data.example:HeldOutPair",
        "popi.data.example:PersonalizationExample",
        "popi.prompts:Message",
        "popi.prompts:PromptSet",
        "popi.roles:AnswerFormat",
        "popi.roles:ConditionedGenerator",
        "popi.roles:PreferenceInference",
        "popi.roles:SummaryFormat",
        "popi.testing:ScriptedBackend",
        "popi.testing:VLLMServer",
        "popi_generators.prompted:QuotedSummary",
        "popi_inference.format:PromptedSummary",
    }
)
"""The classes that users name in Python or YAML, as ``module:Class``."""

EXEMPT = {
    "popi.backends.vllm:VLLMBackend": "starts an engine",
    "popi.backends.wrappers:Wrapper": "the base class of wrappers",
    "popi.testing:VLLMServer": "starts a server",
}
"""Classes without an example, and why."""


def modules() -> Iterator[str]:
    for package in PACKAGES:
        yield package
        for module in pkgutil.walk_packages(import_module(package).__path__, f"{package}."):
            yield module.name


def source_of(module: str) -> str:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return Path(spec.origin).read_text(encoding="utf-8")


def docstring_of(target: str) -> str:
    """The docstring of a class; it is imported only if its module re-exports it."""
    module, _, name = target.partition(":")
    for node in ast.parse(source_of(module)).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return ast.get_docstring(node) or ""
    return registry.load(target).__doc__ or ""


@pytest.mark.parametrize("module", [name for name in modules() if ">>> " in source_of(name)])
def test_the_examples_of_a_module_run(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    try:
        loaded = registry.load(module)
    except MissingExtra as error:
        pytest.skip(str(error))
    failed, attempted = doctest.testmod(loaded, verbose=False, report=True)
    assert attempted > 0
    assert failed == 0


@pytest.mark.parametrize("target", [target for target in PUBLIC if target not in EXEMPT])
def test_a_public_class_has_an_example(target: str) -> None:
    assert ">>> " in docstring_of(target)


def test_only_classes_without_an_example_are_exempt() -> None:
    assert set(EXEMPT) <= set(PUBLIC)
    assert [target for target in EXEMPT if ">>> " in docstring_of(target)] == []
