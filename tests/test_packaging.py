"""The distribution: the content of the wheel, its dependencies and extras, and the layers of its modules."""

from __future__ import annotations

import re
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import popi
from popi.registry import EXTRAS
from tests.clean import run

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("popi", "popi_inference", "popi_generators")
# `import popi` loads none of these. openai and torch are installed wherever the tests run.
HEAVY = ("openai", "torch", "transformers", "trl", "vllm")


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def files_under(folder: Path) -> set[str]:
    return {
        str(path.relative_to(ROOT)) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.slow
def test_wheel_puts_only_the_three_packages_at_the_top(names: list[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    info, data = (f"popi-{popi.__version__}.{kind}" for kind in ("dist-info", "data"))
    assert tops == {*PACKAGES, info, data}


@pytest.mark.slow
def test_wheel_is_typed_and_carries_models_and_recipes(names: list[str]) -> None:
    held = set(names)
    assert {f"{package}/py.typed" for package in PACKAGES} <= held
    assert files_under(ROOT / "popi" / "models") <= held
    share = f"popi-{popi.__version__}.data/data/share/popi/"
    recipes = {share + name for name in files_under(ROOT / "recipes")}
    assert recipes == {name for name in held if name.startswith(share)}


@pytest.mark.slow
def test_base_dependencies_suffice_for_import_and_help(clean_python: Path, tmp_path: Path) -> None:
    version = run(clean_python, "-c", "import popi; print(popi.__version__)", cwd=tmp_path)
    assert version.strip() == popi.__version__
    assert "quickstart" in run(clean_python.with_name("popi"), "--help", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inference", "generators", "recipes", "tests", "benchmarks", "torch"])
def test_clean_environment_has_no_module(name: str, clean_python: Path, tmp_path: Path) -> None:
    found = f"import importlib.util; print(importlib.util.find_spec({name!r}))"
    assert run(clean_python, "-c", found, cwd=tmp_path).strip() == "None"


def test_importing_popi_loads_nothing_heavy() -> None:
    loaded = f"import sys, popi; print([name for name in {HEAVY} if name in sys.modules])"
    assert run(sys.executable, "-c", loaded, cwd=ROOT).strip() == "[]"


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_constraints_pin_versions_within_the_declared_bounds(pyproject: dict[str, Any]) -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line]
    versions = {}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==", f"{pin} is not a pin"
        versions[canonicalize_name(pin.name)] = specifier.version

    project = pyproject["project"]
    extras = project["optional-dependencies"]
    installed_by_make = [*project["dependencies"], *extras["local"], *extras["bench"], *extras["dev"]]
    for requirement in map(Requirement, installed_by_make):
        if requirement.name != "popi":
            assert versions[canonicalize_name(requirement.name)] in requirement.specifier, str(requirement)


def test_citation_names_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == popi.__version__


def test_the_registry_names_extras_that_exist(pyproject: dict[str, Any]) -> None:
    extras = pyproject["project"]["optional-dependencies"]
    assert set(EXTRAS.values()) <= set(extras)
    for module, extra in EXTRAS.items():
        if module != "safetensors":  # installed with transformers
            assert module in {Requirement(line).name for line in extras[extra]}, module


def test_the_guide_lists_the_extras_and_the_layers(pyproject: dict[str, Any]) -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    dependencies = guide.partition("## Dependencies")[2].partition("##")[0]
    extras = set(pyproject["project"]["optional-dependencies"])
    assert set(re.findall(r"`([a-z-]+)`", dependencies)) >= extras
    listed = re.findall(r"^    ([a-z_, ]+)$", guide.partition("Imports run downward")[2], re.M)
    contract = pyproject["tool"]["importlinter"]["contracts"][0]
    declared = [re.findall(r"\w+", layer) for layer in contract["layers"] if layer != "(__main__)"]
    assert [sorted(layer.split(", ")) for layer in listed] == [sorted(layer) for layer in declared]


def test_the_guide_names_the_contract_suites() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    suites = {path.parent.name for path in (ROOT / "tests" / "contract").glob("*/test_*.py")}
    assert suites == set(re.findall(r"`tests/contract/(\w+)`", guide))
