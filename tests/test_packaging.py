"""The distribution: what the wheel holds, and that it works where only its own dependencies are installed."""

from __future__ import annotations

import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import popi
from tests.clean import run

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("popi", "popi_inference", "popi_generators")
# Importing popi costs none of these; the first two are installed wherever the tests run.
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


def test_constraints_pin_versions_within_the_declared_bounds() -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line]
    versions = {}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==", f"{pin} is no pin"
        versions[canonicalize_name(pin.name)] = specifier.version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    installed_by_make = [*project["dependencies"], *extras["local"], *extras["bench"], *extras["dev"]]
    for requirement in map(Requirement, installed_by_make):
        if requirement.name != "popi":
            assert versions[canonicalize_name(requirement.name)] in requirement.specifier, str(requirement)


def test_citation_names_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == popi.__version__
