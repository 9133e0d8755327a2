"""The models that ship with popi, and how models are found by name.

Each folder next to this file that contains a ``config.json`` is a model, with its card in ``README.md``.
"""

from __future__ import annotations

import re
from pathlib import Path

from popi import provenance
from popi.errors import ModelError, did_you_mean

FOLDER = Path(__file__).parent
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def shipped() -> list[str]:
    """The names of the models that ship with popi, sorted."""
    return sorted(config.parent.name for config in FOLDER.glob("*/config.json"))


def find(name_or_path: str) -> str:
    """Finds a model: the folder of a shipped one, an existing folder, or a Hugging Face hub id, unchanged.

    Raises:
        ModelError: If it is none of these. Whether a hub id exists is checked when the model is loaded.
    """
    if name_or_path in shipped():
        return str(FOLDER / name_or_path)
    path = Path(name_or_path).expanduser()
    if name_or_path and path.is_file():
        kind = "weights file" if path.suffix.lower() in WEIGHTS else "file"
        raise ModelError(f"{name_or_path} is a {kind}, not the folder of a model", fix=_fix_of_file(path))
    if name_or_path and path.exists():
        return str(path)
    if HUB_ID.fullmatch(name_or_path):
        return name_or_path
    raise ModelError(
        f"model {name_or_path!r} not found: it is not shipped with popi, not a folder, and not a hub id (org/name)",
        fix=did_you_mean(name_or_path, shipped()),
    )


def _fix_of_file(path: Path) -> str:
    if path.suffix.lower() == ".gguf":
        return (
            "GGUF is not supported yet; give a folder with config.json, the tokenizer and safetensors or .bin weights"
        )
    return "give the folder that contains it and its config.json"


def folder_of(name_or_path: str) -> Path | None:
    """The folder of a model's files; for a hub id in the cache, ``None`` if they have not been downloaded.

    Raises:
        ModelError: If the model does not exist.
    """
    where = find(name_or_path)
    if Path(where).exists():
        return Path(where)
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    cached = try_to_load_from_cache(where, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def fingerprint(name_or_path: str) -> str | None:
    """Identifies the weights of a model: 16 hex digits from its files, or the commit of a hub id.

    ``None`` if its files have not been downloaded.

    Raises:
        ModelError: If the model does not exist.
    """
    where = Path(find(name_or_path))
    if where.exists():
        return provenance.fingerprint_files(where)
    folder = folder_of(name_or_path)
    return None if folder is None else folder.name
