"""The models that ship with popi, and how models are found by name.

Each folder next to this file that contains a ``config.json`` is a model, with its card in ``README.md``.
"""

from __future__ import annotations

import re
from pathlib import Path

from popi import provenance
from popi.errors import ModelError, did_you_mean
from popi.models import cache
from popi.models.downloads import DOWNLOADS

FOLDER = Path(__file__).parent
GGUF = ".gguf"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".onnx")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def shipped() -> list[str]:
    """The names of the models that ship with popi, sorted."""
    return sorted(config.parent.name for config in FOLDER.glob("*/config.json"))


def downloaded() -> list[str]:
    """The names of the models that ``popi models get`` has downloaded, sorted."""
    return sorted(entry.name for entry in cache.entries() if entry.name in DOWNLOADS)


def find(name_or_path: str) -> str:
    """Finds a model: the folder of a shipped or a downloaded one, an existing folder, or a hub id, unchanged.

    A GGUF file is itself, and also stands for a folder that contains it and no ``config.json``.
    ``popi.engine.gguf.located`` converts it.

    Raises:
        ModelError: If it is none of these. Whether a hub id exists is checked when the model is loaded.
    """
    if name_or_path in shipped():
        return str(FOLDER / name_or_path)
    if name_or_path in downloaded():
        return str(cache.root() / name_or_path)
    path = Path(name_or_path).expanduser()
    if name_or_path and path.is_file():
        return _file(name_or_path, path)
    if name_or_path and path.exists():
        return str(_only_gguf(path) or path)
    if HUB_ID.fullmatch(name_or_path):
        return name_or_path
    if name_or_path in DOWNLOADS:
        raise ModelError(
            f"the model {name_or_path!r} has not been downloaded",
            fix=f"download it with: popi models get {name_or_path}",
        )
    raise ModelError(
        f"model {name_or_path!r} not found: it is not shipped with popi, not a folder or a .gguf file, and not a hub id"
        " (org/name)",
        fix=did_you_mean(name_or_path, [*shipped(), *DOWNLOADS]),
    )


def _file(name: str, path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == GGUF:
        return str(path)
    kind = "weights file" if suffix in WEIGHTS else "file"
    raise ModelError(
        f"{name} is a {kind}, not the folder of a model", fix="give the folder that contains it and its config.json"
    )


def _only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that has no other model."""
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == GGUF and file.is_file())
    if len(files) > 1:
        raise ModelError(f"{folder} contains {len(files)} GGUF files", fix=f"name one of them, such as {files[0]}")
    return files[0] if files else None


def is_local(name_or_path: str) -> bool:
    """Whether a text is the name of a model on this machine, its folder, or a GGUF file; hub ids are not."""
    path = Path(name_or_path).expanduser()
    return (
        name_or_path in (*shipped(), *downloaded()) or path.is_dir() or (path.suffix.lower() == GGUF and path.is_file())
    )


def folder_of(name_or_path: str) -> Path | None:
    """The folder of a model's files; ``None`` if a hub id has not been downloaded, or a GGUF file not been converted.

    Raises:
        ModelError: If the model does not exist.
    """
    where = Path(find(name_or_path))
    if where.is_file():
        entry = cache.entry_of(where)
        return entry if entry.is_dir() else None
    if where.exists():
        return where
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    cached = try_to_load_from_cache(str(where), "config.json")
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
