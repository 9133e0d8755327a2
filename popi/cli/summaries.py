"""Reading the summaries that ``popi summarize`` writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from popi.errors import InputError
from popi.io import read_jsonl
from popi.prompts import check_template_hash
from popi.summary import Author, PreferenceSummary


def read_summaries(path: Path) -> Iterator[tuple[int, PreferenceSummary]]:
    """Reads one summary a user, with its line number.

    Raises:
        InputError: If a line is broken, a user appears twice, or a summary was made with other templates and no
            person has edited it since.
    """
    seen: dict[str, int] = {}
    for number, summary in read_jsonl(path, PreferenceSummary):
        if summary.user_id in seen:
            raise InputError(
                f"user {summary.user_id!r} stands in line {seen[summary.user_id]} already",
                file=path,
                line=number,
                field="user_id",
                fix="take one of the lines out",
            )
        if summary.provenance.author is not Author.EDITED:
            check_template_hash(summary.provenance.template_hash, where=f"{path}:{number}")
        seen[summary.user_id] = number
        yield number, summary
