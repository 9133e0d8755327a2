"""The last line of ``make test``: every test is counted, and why some did not run is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "suites.py"

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
    files = [str(folder / f"{name}.xml") for name in reports]
    return subprocess.run([sys.executable, SCRIPT, *files], check=True, capture_output=True, text=True).stdout


def test_skips_are_counted_by_reason_over_all_suites(tmp_path: Path) -> None:
    told = last_line(tmp_path, fast=FAST, slow=SLOW)
    assert told == "2 fast tests, 1 slow tests; did not run: 2 (no CUDA device)\n"


def test_a_full_run_says_that_nothing_is_missing(tmp_path: Path) -> None:
    full = '<testsuites><testsuite name="pytest"><testcase name="a"/></testsuite></testsuites>'
    assert last_line(tmp_path, fast=full) == "1 fast tests; did not run: nothing\n"
