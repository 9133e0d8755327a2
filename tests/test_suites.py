"""The last line of ``make test`` counts every test, and the vLLM tests cannot be left out in continuous integration."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import needs_vllm

ROOT = Path(__file__).resolve().parent.parent

FAST = """<testsuites><testsuite name="pytest">
<testcase name="a"/>
<testcase name="b"><skipped type="pytest.xfail" message="known"/></testcase>
<testcase name="c"><skipped type="pytest.skip" message="no CUDA
device"/></testcase>
</testsuite></testsuites>"""
SLOW = """<testsuites><testsuite name="pytest">
<testcase name="d"><skipped type="pytest.skip" message="no CUDA device"/></testcase>
<testcase name="e"/>
</testsuite></testsuites>"""


def last_line(folder: Path, **reports: str) -> str:
    for name, text in reports.items():
        (folder / f"{name}.xml").write_text(text)
    command = [sys.executable, ROOT / ".ci" / "suites.py", *(folder / f"{name}.xml" for name in reports)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_skips_are_counted_by_reason_over_all_suites(tmp_path: Path) -> None:
    line = last_line(tmp_path, fast=FAST, slow=SLOW)
    assert line == "2 fast tests, 1 slow tests; did not run: 2 (no CUDA device)\n"


def test_a_full_run_misses_nothing(tmp_path: Path) -> None:
    full = '<testsuites><testsuite name="pytest"><testcase name="a"/></testsuite></testsuites>'
    assert last_line(tmp_path, fast=full) == "1 fast tests; did not run: nothing\n"


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find_spec(name))


@pytest.mark.usefixtures("without_vllm")
def test_a_vllm_test_is_skipped_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="vLLM is not installed"):
        needs_vllm()


@pytest.mark.usefixtures("without_vllm")
def test_a_vllm_test_fails_without_vllm_in_continuous_integration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="vLLM is not installed"):
        needs_vllm()


def test_continuous_integration_runs_make_test_with_vllm_required() -> None:
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert script.index("export CI=true") < script.index("make test")
