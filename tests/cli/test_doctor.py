from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popi.cli.doctor import is_within, parse_requirement

from .conftest import Ran

DECLARED = [
    "pydantic<3,>=2.10",
    "popi[local]; extra == 'train'",
    'torch<2.14,>=2.13; extra == "local"',
    'numpy<3,>=2; extra == "local"',
    'trl<1.17,>=1.16; extra == "train"',
    'ruff<1; extra == "dev"',
]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The distributions that seem to be installed, and their versions."""
    versions = {"popi": "0.1.0", "pydantic": "2.11.0", "torch": "2.13.0+cpu", "numpy": "2.1"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: DECLARED)
    return versions


def findings(ran: Ran) -> dict[str, dict[str, str]]:
    return {record["part"]: record for record in map(json.loads, ran.out.splitlines())}


def test_tells_what_is_there_and_what_is_missing(popi: Callable[..., Ran], installed: dict[str, str]) -> None:
    ran = popi("doctor", "--json")
    found = findings(ran)
    assert ran.code == 0
    assert list(found)[:4] == ["popi", "base", "extra local", "extra train"]
    assert {"device", "dtype auto", "cpu", "C++ compiler", "shipped models"} <= found.keys()
    assert found["extra local"] == {
        "part": "extra local",
        "found": "torch 2.13.0+cpu, numpy 2.1",
        "state": "ok",
        "fix": "",
    }
    assert found["extra train"]["state"] == "trl is missing"
    assert found["extra train"]["fix"] == "pip install 'popi[train]'"


@pytest.mark.parametrize(
    ("native", "why"),
    [
        (True, "bfloat16 for models in half precision, else float32: the processor multiplies in bfloat16"),
        (False, "float32: the processor has neither AMX nor AVX512-BF16"),
    ],
)
def test_tells_the_dtype_that_auto_selects_and_why(
    native: bool, why: str, popi: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("popi.engine.loading.has_bfloat16", lambda device: native)
    assert findings(popi("doctor"))["dtype auto"]["found"] == why


def test_tells_a_version_that_was_not_tested(popi: Callable[..., Ran], installed: dict[str, str]) -> None:
    installed["torch"] = "2.14.1"
    local = findings(popi("doctor"))["extra local"]
    assert local["state"] == "torch 2.14.1 is outside the tested range <2.14,>=2.13"
    assert local["fix"] == "pip install 'popi[local]'"


def test_a_broken_base_is_a_failure(popi: Callable[..., Ran], installed: dict[str, str]) -> None:
    del installed["pydantic"]
    ran = popi("doctor")
    assert ran.code == 1
    assert ran.err == "popi: the base installation is incomplete: pydantic is missing; fix it with: pip install popi\n"


def test_a_folder_that_was_never_installed_is_no_failure(
    popi: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nothing)
    monkeypatch.setattr(metadata, "requires", nothing)
    ran = popi("doctor")
    assert ran.code == 0
    assert "pip install -e" in findings(ran)["popi"]["fix"]


@pytest.mark.parametrize(
    ("text", "name", "versions", "extra"),
    [
        ("httpx<1,>=0.27", "httpx", "<1,>=0.27", ""),
        ("torch<2.14,>=2.13; extra == 'local'", "torch", "<2.14,>=2.13", "local"),
        ('types-PyYAML<7,>=6; extra == "dev"', "types-PyYAML", "<7,>=6", "dev"),
        ("uvicorn[standard] (>=0.5) ; extra == 'serve'", "uvicorn", ">=0.5", "serve"),
        ("rich", "rich", "", ""),
    ],
)
def test_reads_requirements(text: str, name: str, versions: str, extra: str) -> None:
    requirement = parse_requirement(text)
    assert (requirement.name, requirement.versions, requirement.extra) == (name, versions, extra)


@pytest.mark.parametrize(
    ("version", "bounds", "within"),
    [
        ("2.13.0+cpu", ">=2.13,<2.14", True),
        ("2.14.0", ">=2.13,<2.14", False),
        ("2.9", ">=2.10", False),
        ("3.0.0rc1", "<3", False),
        ("1.0", "==1.0.0", True),
        ("1.0.1", "==1.0.0", False),
        ("1.0.1", "!=1.0.0", True),
        ("2", "<=2,>1", True),
        ("0.1", "", True),
    ],
)
def test_compares_versions_by_number(version: str, bounds: str, within: bool) -> None:
    assert is_within(version, bounds) is within


releases = st.lists(st.integers(0, 30), min_size=1, max_size=3)


@given(releases, releases)
def test_a_version_is_within_the_bounds_that_it_spans(low: list[int], high: list[int]) -> None:
    first, second = (".".join(map(str, release)) for release in (low, high))
    assert is_within(first, f">={first}")
    assert not is_within(first, f"<{first}")
    assert is_within(second, f">={first}") != is_within(second, f"<{first}")
