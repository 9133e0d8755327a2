from __future__ import annotations

import subprocess
import sys

import pytest

import popi


def test_the_public_names_are_these() -> None:
    assert popi.__all__ == [
        "BackendError",
        "Claim",
        "Comment",
        "ConfigError",
        "Conversation",
        "Demographics",
        "Edit",
        "Failure",
        "InMemoryStore",
        "InputError",
        "Interface",
        "MissingExtra",
        "ModelError",
        "Personalizer",
        "PopiError",
        "PreferencePair",
        "PreferenceSummary",
        "Rating",
        "Response",
        "Signal",
        "Speaker",
        "Statement",
        "Store",
        "Turn",
        "UserEmbedding",
        "UserSignals",
    ]


@pytest.mark.parametrize("name", popi.__all__)
def test_each_can_be_had_and_is_listed(name: str) -> None:
    assert getattr(popi, name) is not None
    assert name in dir(popi)


def test_what_is_not_public_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = popi.Nothing  # type: ignore[attr-defined]


def test_importing_popi_and_its_names_loads_nothing_heavy() -> None:
    code = """
import sys, popi
light = not {"pydantic", "typer", "rich"} & sys.modules.keys()
popi.Personalizer, popi.UserSignals
heavy = {"torch", "transformers", "openai", "numpy", "trl", "vllm", "datasets"} & sys.modules.keys()
print(light, sorted(heavy))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "True []\n"
