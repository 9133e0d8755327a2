"""Notes that a reader of the table needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from popi.evaluation.judges import World
from popi.evaluation.results import Cell, SummaryReport
from popi.evaluation.rows import NO_CONTEXT
from popi.models import shipped


def notes(
    cells: Sequence[Cell],
    summaries: Sequence[SummaryReport],
    world: World | None,
    models: Sequence[str],
    clusters: int | None,
) -> list[str]:
    """The notes, one sentence or two each.

    Args:
        cells: The cells of the table.
        summaries: The reports on the summaries.
        world: The world that the users are from, if any.
        models: Names of the models of the writer and the generators.
        clusters: Number of clusters of users; ``None`` if every user is one.
    """
    return [*_about_data(cells, world, models, clusters), *_about_cells(cells), *_about_summaries(summaries)]


def _about_data(cells: Sequence[Cell], world: World | None, models: Sequence[str], clusters: int | None) -> list[str]:
    miniatures = sorted(set(models) & set(shipped()))
    found = [world.remark] if world else []
    if world is None and miniatures:
        known = f"{' and '.join(miniatures)} know only the mini world"
        found.append(f"{known}: their scores mean nothing on these data.")
    if clusters is not None:
        found.append(f"The users are not independent: they form {clusters} clusters, and whole clusters are resampled.")
    judged = max((cell.judged for cell in cells), default=0)
    if world is None:
        found.append("The true preferences of these users are unknown: no win rate, no faithfulness.")
    elif judged:
        found.append(
            "The win rate compares the response to a user's first held-out prompt with the same generator's response "
            f"to the plain prompt, for {judged} users, in random order; a tie counts one half."
        )
    return found


def _about_cells(cells: Sequence[Cell]) -> Iterator[str]:
    bare = [cell.accuracy for cell in cells if cell.row == NO_CONTEXT and cell.accuracy is not None]
    if any(accuracy.low == accuracy.high == 0.5 for accuracy in bare):
        yield (
            "No context is 50 % by construction where a generator is its own reference: both sides of the margin have "
            "the same prompt, so every pair ties, and a tie counts one half."
        )
    texts = dict.fromkeys(cell.column for cell in cells if not cell.pairs and cell.unavailable is None)
    if texts:
        yield f"{' and '.join(texts)} cannot score responses: win rates, no accuracy."
    for reason in dict.fromkeys(cell.unavailable for cell in cells if cell.unavailable is not None):
        names = ", ".join(f"{cell.row} ({cell.column})" for cell in cells if cell.unavailable == reason)
        yield f"Unavailable, because {reason}: {names}."
    failed = [cell for cell in cells if cell.unavailable is None and cell.unscored]
    if failed:
        counts = ", ".join(f"{cell.unscored} of {cell.pairs} in {cell.row} ({cell.column})" for cell in failed)
        yield f"Pairs that could not be scored count as ties: {counts}. The first reason: {failed[0].error}."


def _about_summaries(summaries: Sequence[SummaryReport]) -> Iterator[str]:
    failed = [report for report in summaries if report.failed]
    if failed:
        counts = ", ".join(f"{report.failed} in {report.row}" for report in failed)
        yield f"Users without a summary, because writing it failed: {counts}."
