"""The schema of recipes and backend files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from popi.config.backend import BackendConfig, ModelConfig, RouteConfig, RoutesConfig, SingleConfig
from popi.config.joint import JointRecipe, Users
from popi.config.pretrain import Dilution, Dimension, Phase, PretrainRecipe
from popi.errors import ConfigError, InputError, did_you_mean
from popi.io import validate

__all__ = [
    "FILES",
    "BackendConfig",
    "Dilution",
    "Dimension",
    "JointRecipe",
    "ModelConfig",
    "Phase",
    "PretrainRecipe",
    "Recipe",
    "RouteConfig",
    "RoutesConfig",
    "SingleConfig",
    "Users",
    "load",
    "load_backend",
    "parse_overrides",
    "read_yaml",
]

FILES = ".yaml", ".yml"
"""Endings of the names of files, by which a file differs from the name of a model or a prompt set."""

Recipe = PretrainRecipe | JointRecipe
_RECIPES: dict[str, type[Recipe]] = {"pretrain": PretrainRecipe, "joint": JointRecipe}


def load(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Reads a recipe.

    Example:
        >>> load(Path("recipes/mini_base"), {"phases.0.steps": 2}).phases[0].steps
        2

    Args:
        path: A YAML file, or a folder that contains a ``config.yaml``.
        overrides: Values that replace those of the file, by dotted name of the field.

    Raises:
        InputError: If the file cannot be read, or a field is unknown, missing or invalid.
    """
    file = path / "config.yaml" if path.is_dir() else path
    tree = read_yaml(file)
    for name, value in (overrides or {}).items():
        _replace(tree, name, value, file)
    task = tree.get("task") if isinstance(tree, dict) else None
    if isinstance(tree, dict) and str(task) not in _RECIPES:
        fix = did_you_mean(str(task), _RECIPES)
        raise ConfigError(f"unknown task {task!r}" if task else "field required", file=file, field="task", fix=fix)
    return validate(_RECIPES.get(str(task), PretrainRecipe), tree, file=file)


def load_backend(file: Path) -> BackendConfig:
    """Reads a backend file.

    Raises:
        InputError: If the file cannot be read, or a field is unknown, missing or invalid.
    """
    tree = read_yaml(file)
    several = isinstance(tree, dict) and "routes" in tree
    return validate(RoutesConfig, tree, file=file) if several else validate(SingleConfig, tree, file=file)


def read_yaml(file: Path) -> Any:
    """Reads a YAML file.

    Raises:
        InputError: If it cannot be read, or is not YAML in UTF-8.
    """
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", file=file, fix="give a YAML file") from error
    # Invalid dates and bytes that are not UTF-8 are a ValueError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = error.problem_mark.line + 1 if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark else None
        raise ConfigError("is not YAML in UTF-8", file=file, line=line, fix="fix the syntax") from error


def _replace(tree: Any, name: str, value: Any, file: Path) -> None:
    *path, last = name.split(".")
    try:
        for part in path:
            # A section that the file leaves out has its defaults.
            tree = tree[int(part)] if isinstance(tree, list) else tree.setdefault(part, {})
        if isinstance(tree, list):
            tree[int(last)] = value
        else:
            tree[last] = value
    except (AttributeError, IndexError, ValueError, TypeError) as error:
        raise ConfigError("cannot be overridden: unknown field", file=file, field=name) from error


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Parses ``field=value`` words. Values are YAML.

    Example:
        >>> parse_overrides(["seed=3", "phases.0.signals=[1, 2]"])
        {'seed': 3, 'phases.0.signals': [1, 2]}

    Raises:
        ConfigError: If a word has no field or no ``=``, or its value is not YAML.
    """
    parsed = {}
    for word in words:
        name, equals, value = word.partition("=")
        try:
            if not name or not equals:
                raise ValueError
            parsed[name] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            raise ConfigError(f"invalid override {word!r}", fix="write FIELD=VALUE, as in phases.0.steps=2") from error
    return parsed
