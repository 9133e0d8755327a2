from __future__ import annotations

import sys
from pathlib import Path

import pytest

from popi import registry
from popi.errors import ConfigError, MissingExtra
from popi.testing import ScriptedBackend
from popi_generators import PromptedGenerator
from popi_inference import Empty, LLMSummarizer, RawSignals


@pytest.mark.parametrize("name", registry.INFERENCES)
def test_every_inference_is_where_its_name_leads(name: str) -> None:
    assert registry.inference(name).__name__ == registry.INFERENCES[name].partition(":")[2]


@pytest.mark.parametrize("name", registry.GENERATORS)
def test_every_generator_is_where_its_name_leads(name: str) -> None:
    assert registry.generator(name).__name__ == registry.GENERATORS[name].partition(":")[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.BACKENDS)
def test_every_backend_is_where_its_name_leads(name: str) -> None:
    assert registry.backend(name).__name__ == registry.BACKENDS[name].partition(":")[2]


def test_takes_a_class_of_ones_own() -> None:
    assert registry.backend("popi.testing:ScriptedBackend") is ScriptedBackend
    assert registry.generator("popi_generators:PromptedGenerator") is PromptedGenerator


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lm", "unknown inference 'lm'; did you mean llm?"),
        ("xyz", "known names: another-user, empty, llm, oracle, raw"),
        ("no_such_module:Thing", "cannot be imported"),
        ("popi_inference:NoSuchThing", "cannot be imported"),
        ("popi.testing:ScriptedBackend", "is no inference class; it has to be a subclass of PreferenceInference"),
        ("popi.io:as_line", "subclass of PreferenceInference"),
        (":Thing", "cannot be imported"),
        (".relative:Thing", "cannot be imported"),
    ],
)
def test_an_unknown_name_is_told_with_what_to_do(name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.inference(name)
    assert says in str(caught.value)


def test_a_missing_optional_module_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_vllm.py").write_text("import vllm.entrypoints\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtra, match=r"vllm is not installed; install it with: pip install 'popi\[vllm\]'"):
        registry.load("needs_vllm")


def test_another_missing_module_is_a_defect_and_not_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "is_broken.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError):
        registry.load("is_broken")


def test_options_are_those_given_and_the_defaults_of_the_rest() -> None:
    assert registry.inference_options("llm", budget=100, seed=3) == {
        "max_tokens": 256,
        "temperature": 0.0,
        "budget": 100,
        "seed": 3,
        "language": "auto",
        "attempts": 2,
        "prompts": None,
    }
    assert registry.inference_options("empty") == {}


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("empty", {"budget": 5}, "'empty' has no option 'budget'; its options: none"),
        ("raw", {"seed": 5}, "'raw' has no option 'seed'; its options: budget"),
        ("oracle", {}, "'oracle' cannot be made without 'texts'"),
        ("another-user", {}, "cannot be made without 'inner'"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(name: str, options: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.make_inference(name, ScriptedBackend(), **options)
    assert says in str(caught.value)


def test_makes_an_inference_with_the_backend_if_it_takes_one() -> None:
    backend = ScriptedBackend(model="m")
    assert isinstance(registry.make_inference("llm", backend, max_tokens=5), LLMSummarizer)
    assert isinstance(registry.make_inference("raw", backend, budget=5), RawSignals)
    assert isinstance(registry.make_inference("empty", backend), Empty)


class TakesAnything(Empty):
    def __init__(self, backend: object, **options: int) -> None:
        self.options = options


def test_a_class_that_takes_any_option_gets_them_all() -> None:
    made = registry.make_inference("tests.test_registry:TakesAnything", ScriptedBackend(), colour=3)
    assert isinstance(made, TakesAnything)
    assert made.options == {"colour": 3}
