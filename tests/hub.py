"""A model in the cache of the Hugging Face hub, as if it had been fetched."""

import shutil
from pathlib import Path


def in_hub_cache(cache: Path, hub_id: str, commit: str, model: Path) -> None:
    """Puts a copy of a model's folder into the cache, as what the hub has of this name now."""
    entry = cache / f"models--{hub_id.replace('/', '--')}"
    shutil.copytree(model, entry / "snapshots" / commit)
    (entry / "refs").mkdir(exist_ok=True)
    (entry / "refs" / "main").write_text(commit)
