"""Prints which tests ran, which did not, and why: the end of the last line of ``make test``.

Reads the JUnit reports of pytest, one for each suite and named after it::

    python .ci/suites.py .reports/fast.xml .reports/slow.xml
    312 fast tests, 14 slow tests; did not run: 6 (no CUDA device)
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree


def outcome(report: Path) -> tuple[int, Counter[str]]:
    """Counts the tests of one report.

    Returns:
        The number of tests that ran, and the number of skipped tests for each reason.
    """
    ran, skipped = 0, Counter[str]()
    for case in ElementTree.parse(report).iter("testcase"):
        skip = case.find("skipped[@type='pytest.skip']")
        if skip is None:
            ran += 1
        else:
            skipped[" ".join(skip.get("message", "no reason given").split())] += 1
    return ran, skipped


def describe(reports: Sequence[Path]) -> str:
    """Describes all reports in one line."""
    ran, skipped = [], Counter[str]()
    for report in reports:
        count, reasons = outcome(report)
        ran.append(f"{count} {report.stem} tests")
        skipped += reasons
    missing = "; ".join(f"{count} ({reason})" for reason, count in sorted(skipped.items())) or "nothing"
    return f"{', '.join(ran)}; did not run: {missing}"


if __name__ == "__main__":
    print(describe([Path(argument) for argument in sys.argv[1:]]))
