"""An environment with the wheel and its base dependencies only."""

from __future__ import annotations

import email
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command outside the checkout, which would otherwise be importable, and returns its output."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def build_wheel(folder: Path) -> Path:
    """Builds the wheel."""
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def install(wheel: Path, folder: Path) -> Path:
    """Creates the environment and returns its interpreter."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    link_distributions(base_requirements(wheel), Path(purelib.strip()))
    return python


def base_requirements(wheel: Path) -> Iterator[Requirement]:
    """The requirements of the wheel without extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        declared = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    yield from applicable(declared, {""})


def applicable(declared: Iterable[str], extras: set[str]) -> Iterator[Requirement]:
    for requirement in map(Requirement, declared):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
            yield requirement


def link_distributions(requirements: Iterable[Requirement], site: Path) -> None:
    """Links the installed distributions that meet the requirements, and their own requirements, into a folder."""
    pending, seen = list(requirements), set[str]()
    while pending:
        requirement = pending.pop()
        key = str(requirement)
        if key in seen:
            continue
        seen.add(key)
        distribution = metadata.distribution(requirement.name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
        pending.extend(applicable(distribution.requires or [], {"", *requirement.extras}))
