from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from popi import registry
from popi.backends.base import ChatResult
from popi.errors import ConfigError, MissingExtra
from popi.roles import Conditioned, ConditionedGenerator
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
        ("popi.testing:ScriptedBackend", "the inference 'popi.testing:ScriptedBackend' is not a subclass"),
        ("popi.io:as_line", "subclass of PreferenceInference"),
        (":Thing", "cannot be imported"),
        (".relative:Thing", "cannot be imported"),
    ],
)
def test_an_unknown_name_is_an_error_with_a_fix(name: str, says: str) -> None:
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


def test_the_options_of_a_generator_are_those_of_its_class_without_backend_and_format() -> None:
    assert registry.generator_options("prompted", max_tokens="40") == {
        "max_tokens": 40,
        "temperature": 0.0,
        "seed": None,
        "summary_tokens": None,
        "prompts": None,
    }


Make = Callable[..., object]


@pytest.mark.parametrize(
    ("make", "name", "options", "says"),
    [
        (registry.make_inference, "empty", {"budget": 5}, "'empty' has no option 'budget'; its options: (none)"),
        (registry.make_inference, "raw", {"seed": 5}, "the inference 'raw' has no option 'seed'; its options: budget"),
        (registry.make_inference, "oracle", {}, "the inference 'oracle' needs the option 'texts'"),
        (registry.make_inference, "another-user", {}, "the inference 'another-user' needs the option 'inner'"),
        (registry.make_inference, "llm", {"format": None}, "the inference 'llm' has no option 'format'"),
        (
            registry.make_inference,
            "llm",
            {"seed": "x"},
            "field inference_options.seed: input should be a valid integer",
        ),
        (registry.make_inference, "llm", {"prompts": 3}, "field inference_options.prompts: "),
        (registry.make_generator, "prompted", {"max_token": 5}, "has no option 'max_token'; its options: max_tokens,"),
        (registry.make_generator, "prompted", {"backend": 5}, "the generator 'prompted' has no option 'backend'"),
        (registry.make_generator, "prompted", {"seed": 1.5}, "field generator_options.seed: input should be a valid"),
        (registry.make_generator, f"{__name__}:PassesOn", {"colour": 3}, "unexpected keyword argument 'colour'"),
        (registry.make_generator, f"{__name__}:Unfinished", {}, "is abstract; implement its methods: score, stream"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(make: Make, name: str, options: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(name, ScriptedBackend(), **options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


class PassesOn(PromptedGenerator):
    def __init__(self, backend: ScriptedBackend, **options: Any) -> None:
        super().__init__(backend, **options)


class Unfinished(ConditionedGenerator):
    async def respond(self, items: Sequence[Conditioned]) -> list[ChatResult]:
        return []


class NamesWhatIsNotImported(Empty):
    def __init__(self, backend: NotImported, colour: NotImported = 3) -> None:  # noqa: F821
        self.colour = colour


def test_annotations_of_names_that_are_not_imported_are_not_checked() -> None:
    made = registry.make_inference(f"{__name__}:NamesWhatIsNotImported", ScriptedBackend(), colour="red")
    assert isinstance(made, NamesWhatIsNotImported)
    assert made.colour == "red"


def test_makes_a_role_with_the_backend_if_it_takes_one() -> None:
    backend = ScriptedBackend(model="m")
    assert isinstance(registry.make_inference("llm", backend, max_tokens=5), LLMSummarizer)
    assert isinstance(registry.make_inference("raw", backend, budget=5), RawSignals)
    assert isinstance(registry.make_inference("empty", backend), Empty)
    assert isinstance(registry.make_generator("prompted", backend, max_tokens=5), PromptedGenerator)


class TakesAnything(Empty):
    def __init__(self, backend: object, **options: int) -> None:
        self.options = options


def test_a_class_that_takes_any_option_gets_them_all() -> None:
    made = registry.make_inference(f"{__name__}:TakesAnything", ScriptedBackend(), colour=3)
    assert isinstance(made, TakesAnything)
    assert made.options == {"colour": 3}
