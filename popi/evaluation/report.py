"""Formats results as tables, for a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from popi.evaluation.results import Cell, Control, Faithfulness, Results
from popi.evaluation.rows import REFERENCES, UNTRAINED
from popi.evaluation.statistics import LEVEL, QUANTILES, Estimate

FIGURE = "accuracy_vs_context.png"

Share = Callable[[Estimate | None, str], str]
"""Formats a share in percent with its interval. The second argument is the sign option, as in format strings."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts.

    Attributes:
        title: The title.
        records: The lines. All have the same keys, the names of the columns.
    """

    title: str
    records: Sequence[dict[str, str]]


def tables(results: Results, *, narrow: bool = False) -> Iterator[Table]:
    """The tables of an evaluation: one for each generator, then those about the summaries.

    Args:
        results: The figures.
        narrow: Whether to format an interval as half its width, which fits a terminal, or else as its ends.
    """
    share = _short if narrow else _percent
    for column in dict.fromkeys(cell.column for cell in results.cells):
        cells = [cell for cell in results.cells if cell.column == column]
        controls = [control for control in results.controls if control.column in (None, column)]
        references = [name for name in REFERENCES if any(cell.row == name for cell in cells)]
        yield Table(
            f"{column}: preference accuracy in %, with {LEVEL:.0%} intervals by user",
            [
                *(_cell_record(cell, references, share) for cell in cells),
                *(_control_record(control, references, share) for control in controls),
            ],
        )
    if any(report.truth for report in results.summaries):
        yield Table("Summaries: faithfulness of the claimed tastes in %", list(_faithfulness_records(results, share)))
        yield Table("Summaries: what is claimed, in %", list(_claim_records(results)))
    if spread := list(_spread_records(results)):
        yield Table(f"The {_words(UNTRAINED)}: percentiles of single users and summaries", spread)


def markdown(results: Results, *, figure: bool) -> str:
    """The whole report.

    Args:
        results: The figures.
        figure: Whether to show :data:`FIGURE`, a file in the same folder.
    """
    settings = ", ".join(f"{name} {value}" for name, value in results.settings.items() if value is not None)
    parts = ["# Evaluation", f"{results.users} users. Settings: {settings}."]
    parts += [f"> {remark}" for remark in remarks(results)]
    for table in tables(results):
        parts += [f"## {table.title}", _markdown_table(table.records)]
    if figure:
        parts.append(f"![Preference accuracy against context tokens]({FIGURE})")
    return "\n\n".join(parts) + "\n"


def remarks(results: Results) -> list[str]:
    """The notes and the rows that were left out, one line each."""
    return [*results.notes, *(f"{_words(row)} is left out: {why}." for row, why in results.left_out.items())]


def _cell_record(cell: Cell, references: Sequence[str], share: Share) -> dict[str, str]:
    return {
        "row": _words(cell.row),
        "accuracy": share(cell.accuracy, "") if cell.unavailable is None else "unavailable",
        **{f"minus {_words(name)}": share(cell.differences.get(name), "+") for name in references},
        "win rate": share(cell.win_rate, ""),
        "context tokens": "" if cell.context_tokens is None else f"{cell.context_tokens:.1f}",
    }


def _control_record(control: Control, references: Sequence[str], share: Share) -> dict[str, str]:
    return {
        "row": f"({_words(control.name)})",
        "accuracy": share(control.accuracy, ""),
        **{f"minus {_words(name)}": "" for name in references},
        "win rate": "",
        "context tokens": "",
    }


def _faithfulness_records(results: Results, share: Share) -> Iterator[dict[str, str]]:
    for report in results.summaries:
        yield {
            "row": _words(report.row),
            **_faithfulness("truth", report.truth, share),
            **_faithfulness("evidence", report.evidence, share),
            "not enough evidence": f"{100 * report.not_enough_evidence:.1f}",
        }


def _faithfulness(what: str, found: Faithfulness | None, share: Share) -> dict[str, str]:
    return {
        f"precision ({what})": share(found.precision if found else None, ""),
        f"recall ({what})": share(found.recall if found else None, ""),
    }


def _claim_records(results: Results) -> Iterator[dict[str, str]]:
    for report in results.summaries:
        yield {
            "row": _words(report.row),
            **{name: f"{100 * share:.1f}" for name, share in report.claims.items()},
        }


def _spread_records(results: Results) -> Iterator[dict[str, str]]:
    for report in results.summaries:
        if report.row == UNTRAINED:
            if report.claims_quantiles:
                yield _spread("claims of a summary", report.claims_quantiles)
            if report.precision_quantiles:
                yield _spread("precision of a summary, %", [100 * value for value in report.precision_quantiles])
    for cell in results.cells:
        if cell.row == UNTRAINED:
            if cell.context_quantiles:
                yield _spread(f"tokens of a summary ({cell.column})", cell.context_quantiles)
            if cell.accuracy_quantiles:
                yield _spread(
                    f"accuracy of a user, % ({cell.column})", [100 * share for share in cell.accuracy_quantiles]
                )


def _spread(what: str, values: Sequence[float]) -> dict[str, str]:
    heads = ("median" if quantile == 0.5 else f"{100 * quantile:.0f}th" for quantile in QUANTILES)
    return {"of": what, **{head: f"{value:.4g}" for head, value in zip(heads, values, strict=True)}}


def _percent(estimate: Estimate | None, sign: str) -> str:
    if estimate is None:
        return ""
    value, low, high = (f"{100 * number:{sign}.1f}" for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def _short(estimate: Estimate | None, sign: str) -> str:
    if estimate is None:
        return ""
    return f"{100 * estimate.value:{sign}.1f} ±{50 * (estimate.high - estimate.low):.1f}"


def _words(name: str) -> str:
    return name.replace("-", " ")


def _markdown_table(records: Sequence[dict[str, str]]) -> str:
    heads = list(records[0])
    lines = [heads, ["---"] * len(heads), *(list(record.values()) for record in records)]
    return "\n".join(f"| {' | '.join(_escape(text) for text in line)} |" for line in lines)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
