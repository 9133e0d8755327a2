"""``popi doctor``: installed packages, problems, and the commands that fix them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from popi.cli.output import JsonFlag, print_records
from popi.errors import PopiError

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
"""CPU features that affect the speed of a model. Computing in bfloat16 is fast with ``avx512_bf16``, ``amx_bf16`` or
``bf16``."""

FOR_DEVELOPERS = ("dev",)
"""Extras that are not checked."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        part: The part that was checked.
        found: The installed version or device.
        state: ``ok``, or the problem.
        fix: The command that fixes the problem, or empty.
    """

    part: str
    found: str
    state: str = "ok"
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Requirement:
    """A distribution that popi needs: its name, the tested versions, and the extra that requires it."""

    name: str
    versions: str
    extra: str


def doctor(json: JsonFlag = False) -> None:
    """Report installed packages and hardware, problems, and the commands that fix them."""
    needed = _requirements()
    base = _check_group("base", needed.get("", []), "pip install popi")
    extras = (
        _check_group(f"extra {extra}", group, f"pip install 'popi[{extra}]'")
        for extra, group in needed.items()
        if extra and extra not in FOR_DEVELOPERS
    )
    packages = [base, *extras] if needed else []
    findings = [_popi(), *packages, _device(), *_auto_dtype(), _cpu(), _compiler(), _models()]
    print_records(map(asdict, findings), json_flag=json, title="popi doctor")
    if base.state != "ok":
        raise PopiError(f"the base installation is incomplete: {base.state}; fix it with: {base.fix}")


def _requirements() -> Mapping[str, list[Requirement]]:
    """The requirements that popi's distribution declares, by extra; ``""`` is the base installation."""
    from importlib import metadata

    try:
        declared = metadata.requires("popi") or []
    except metadata.PackageNotFoundError:
        return {}
    groups: dict[str, list[Requirement]] = {}
    for requirement in map(parse_requirement, declared):
        if requirement.name != "popi":
            groups.setdefault(requirement.extra, []).append(requirement)
    return groups


def parse_requirement(text: str) -> Requirement:
    """Reads a line such as ``torch<2.14,>=2.13; extra == "local"``."""
    what, _, marker = text.partition(";")
    name = re.match(r"[\w.-]+", what.strip())
    extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
    return Requirement(
        name=name.group() if name else what.strip(),
        versions=re.sub(r"^[\w.-]+\s*(\[[^\]]*\])?", "", what.strip()).strip(" ()"),
        extra=extra.group(1) if extra else "",
    )


def is_within(version: str, bounds: str) -> bool:
    """Whether a version lies within bounds such as ``>=2.13,<2.14``; only release numbers are compared."""
    compare = {
        ">=": lambda found, bound: found >= bound,
        "<": lambda found, bound: found < bound,
        "==": lambda found, bound: found == bound,
        "!=": lambda found, bound: found != bound,
        "<=": lambda found, bound: found <= bound,
        ">": lambda found, bound: found > bound,
    }
    clauses = re.findall(r"(>=|<=|==|!=|<|>)\s*([\d.]+)", bounds)
    return all(compare[sign](_release(version), _release(bound)) for sign, bound in clauses)


def _release(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    release = [int(number) for number in numbers.group().split(".")] if numbers else []
    while release and release[-1] == 0:
        release.pop()
    return tuple(release)


def _check_group(part: str, group: list[Requirement], fix: str) -> Finding:
    from importlib import metadata

    found, wrong = [], []
    for requirement in group:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        found.append(f"{requirement.name} {version}")
        if not is_within(version, requirement.versions):
            wrong.append(f"{requirement.name} {version} is outside the tested range {requirement.versions}")
    return Finding(part, ", ".join(found), ", ".join(wrong) or "ok", fix if wrong else "")


def _popi() -> Finding:
    from importlib import metadata

    from popi import __version__

    here = Path(__file__).parents[1]
    found = f"{__version__} in {here}, Python {platform.python_version()}"
    try:
        metadata.version("popi")
    except metadata.PackageNotFoundError:
        return Finding("popi", found, "not installed, so its dependencies are unknown", f"pip install -e {here.parent}")
    return Finding("popi", found)


def _device() -> Finding:
    fix = "pip install 'popi[local]'"
    if find_spec("torch") is None:
        return Finding("device", "", "torch is missing, so no model runs in this process", fix)
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        return Finding("device", "", f"torch cannot be imported: {error}", f"{fix} --force-reinstall")
    if torch.cuda.is_available():
        return Finding("device", f"cuda, {torch.cuda.get_device_name()}")
    return Finding("device", f"cpu, {torch.get_num_threads()} threads")


def _auto_dtype() -> Iterator[Finding]:
    """What ``dtype: auto`` selects, and why; nothing if the packages that compute are missing or broken."""
    try:
        import torch

        from popi.engine.loading import has_bfloat16
    # The device reports it.
    except (ImportError, OSError, RuntimeError):
        return
    if torch.cuda.is_available():
        found = "bfloat16: models run on the GPU"
    elif has_bfloat16(torch.device("cpu")):
        found = "bfloat16 for models in half precision, else float32: the processor multiplies in bfloat16"
    else:
        found = "float32: the processor has neither AMX nor AVX512-BF16"
    yield Finding("dtype auto", found)


def _cpu() -> Finding:
    has = _flags()
    features = [feature for feature in CPU_FEATURES if feature in has] if has else ["features unknown"]
    return Finding("cpu", ", ".join([platform.machine(), f"{os.cpu_count()} cores", *features]))


def _flags() -> set[str]:
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", info, re.MULTILINE)
    return set(flags.group(1).split()) if flags else set()


def _compiler() -> Finding:
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    found = next((path for path in map(shutil.which, filter(None, names)) if path), None)
    if found is None:
        fix = "xcode-select --install" if sys.platform == "darwin" else "apt-get install g++"
        return Finding("C++ compiler", "", "missing: DeepSpeed builds its operators with one", fix)
    return Finding("C++ compiler", found)


def _models() -> Finding:
    from popi.models import shipped

    if not shipped():
        return Finding("shipped models", "", "missing", "pip install --force-reinstall popi")
    return Finding("shipped models", ", ".join(shipped()))
