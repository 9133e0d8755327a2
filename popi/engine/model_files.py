"""Finds out why the files of a model cannot be loaded."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from popi.errors import ModelError, one_line

FORMATS = "supported are safetensors and PyTorch's .bin, next to config.json and the tokenizer, and GGUF"

TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json")

INDEX = "model.safetensors.index.json"

LFS = b"version https://git-lfs"
"""Start of a file that Git LFS left in place of the real one."""


def diagnose(folder: Path, *, tokenizer_only: bool = False) -> ModelError | None:
    """Names what is wrong with the files in the folder of a model.

    Args:
        folder: The folder.
        tokenizer_only: Whether only the tokenizer was to be loaded.

    Returns:
        The error to raise, or ``None`` if no problem was found.
    """
    broken = next((problem for file in sorted(folder.glob("*.json")) if (problem := _invalid_json(file))), None)
    if broken is not None:
        return broken
    return (None if tokenizer_only else _problem_of_model(folder)) or _missing_tokenizer(folder)


def _invalid_json(file: Path) -> ModelError | None:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return ModelError(f"{file} is damaged: {error}", fix="download or copy the file again")
    return None


def _problem_of_model(folder: Path) -> ModelError | None:
    files, config = [*folder.glob("*.safetensors"), *folder.glob("*.bin")], folder / "config.json"
    if (folder / "adapter_config.json").is_file() and not config.is_file():
        return ModelError(f"{folder} is an adapter, not a model", fix="merge it into its base model")
    if not files and config.is_file() and any(folder.glob("*.gguf")):
        return ModelError(f"{folder} has a config.json, but its weights are GGUF only", fix="name the .gguf file")
    if not config.is_file():
        return ModelError(f"{folder} contains no config.json", fix=f"check the path; {FORMATS}")
    return _problem_of_type(config) or _problem_of_weights(folder, files)


def _problem_of_type(file: Path) -> ModelError | None:
    from transformers import CONFIG_MAPPING, __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config: Any = json.loads(file.read_text(encoding="utf-8"))
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not kind:
        return ModelError(f"{file} has no model_type", fix="use the config.json that belongs to the model")
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    if kind in CONFIG_MAPPING:
        return ModelError(f"{file}: models of type {kind!r} do not generate text", fix="use a causal language model")
    if "auto_map" in config:
        why = "is defined by code that comes with the model, which is not executed"
        return ModelError(f"{file}: the model type {kind!r} {why}", fix="use a model that transformers supports")
    why = f"is not known to transformers {__version__}"
    return ModelError(f"{file}: the model type {kind!r} {why}", fix="upgrade transformers, or use another model")


def _problem_of_weights(folder: Path, files: list[Path]) -> ModelError | None:
    if not files:
        return ModelError(f"{folder} contains no weights", fix=f"download the model again; {FORMATS}")
    for file in sorted(files):
        if damage := _damage(file):
            return ModelError(f"{file} {damage}", fix="download or copy the file again")
    if (folder / INDEX).is_file():
        listed: Any = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        missing = sorted(set(listed.get("weight_map", {}).values()) - {file.name for file in files})
        if missing:
            return ModelError(f"the weights file {missing[0]} is missing in {folder}", fix="download the model again")
    return None


def _damage(file: Path) -> str | None:
    from safetensors import safe_open

    try:
        with file.open("rb") as stream:
            if stream.read(len(LFS)) == LFS:
                return "is a pointer of Git LFS, not the file itself (git lfs pull)"
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                return None
        return None if zipfile.is_zipfile(file) else "is damaged: it is not a file of torch.save"
    # safetensors raises its own exceptions.
    except Exception as error:
        return f"is damaged: {one_line(str(error))}"


def _missing_tokenizer(folder: Path) -> ModelError | None:
    if any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        return None
    return ModelError(f"{folder} contains no tokenizer", fix="copy tokenizer.json and tokenizer_config.json there")
