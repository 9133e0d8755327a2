"""Running an evaluation: every row under every column, for every sample of users."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from popi.errors import BackendError, InputError
from popi.evaluation.folder import Folder
from popi.evaluation.judges import World, world_of
from popi.evaluation.measure import (
    ITEM_FAILURES,
    Column,
    Context,
    Measured,
    Plain,
    measure,
    measure_plain,
    measured_as_reference,
)
from popi.evaluation.notes import notes
from popi.evaluation.results import Results
from popi.evaluation.rows import REFERENCES, Materials, Row, RowUnavailable, Written, WrittenOnce
from popi.evaluation.samples import Sample
from popi.evaluation.tabulate import MeasuredUser, Tabulator
from popi.roles import Failure, PreferenceInference
from popi.summary import PreferenceSummary


async def evaluate(
    samples: Sequence[Sample],
    *,
    rows: Sequence[Row],
    columns: Sequence[Column],
    writer: PreferenceInference,
    untrained: PreferenceInference | None = None,
    folder: Folder,
    judged: int,
    settings: Mapping[str, object],
    advance: Callable[[int], None] = lambda users: None,
) -> Results:
    """Measures what has not been measured yet, and computes the table.

    Args:
        samples: The users. No user is in two of them.
        rows: The rows of the table. A row that cannot be made from the data is left out and named in the results.
        columns: The generators. A cell whose generator does not accept the interface of its row is unavailable.
        writer: The inference under test.
        untrained: The inference that it was trained from; ``None`` if it was not trained.
        folder: Keeps the measurements. Those that it contains already are not repeated.
        judged: Number of users per sample whose responses are judged, if their world has a judge.
        settings: Settings to add to the results.
        advance: Called after each row of each column with the number of users. The total over a sample is
            ``len(rows) * len(columns)`` times its users.

    Raises:
        BackendError: If a backend is not available.
        InputError: If the folder contains broken pieces, or none of the rows can be made from the data.
        PopiError: If the folder cannot be written.
    """
    world = world_of([example for sample in samples for example in sample.examples])
    benches = [_Bench(sample, writer, untrained, folder, world, judged if world else 0) for sample in samples]
    left_out = {row.name: why for row in rows if (why := _why_not(row, benches, columns))}
    made = [row for row in rows if row.name not in left_out]
    if not made:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise InputError(f"none of the rows can be made from these data ({reasons})", fix="choose other rows")
    for bench in benches:
        for column in columns:
            await bench.measure(made, column, advance)
            advance(len(bench.users) * len(left_out))
        await bench.collect([row for row in made if row.claims], columns[0])

    table = Tabulator([user for bench in benches for user in bench.users])
    names = [column.name for column in columns]
    cells = table.cells([row.name for row in made], names, REFERENCES, refused=_refused(made, columns))
    summaries = [table.summaries(row.name, world) for row in made if row.claims]
    models = [writer.name, *(column.backend.model for column in columns)]
    return Results(
        settings=dict(settings),
        users=sum(len(sample.examples) for sample in samples),
        cells=cells,
        controls=table.controls(names),
        summaries=summaries,
        left_out=left_out,
        notes=notes(cells, summaries, world, models, table.clusters),
    )


class _Bench:
    """Measures one sample of users."""

    def __init__(
        self,
        sample: Sample,
        writer: PreferenceInference,
        untrained: PreferenceInference | None,
        folder: Folder,
        world: World | None,
        judged: int,
    ) -> None:
        self.users = [MeasuredUser(sample.seed, example) for example in sample.examples]
        self._examples = sample.examples
        self._signals = [example.user for example in sample.examples]
        self._keep = partial(folder.piece, f"seed-{sample.seed}")
        self._world = world
        self._judged = min(judged, len(sample.examples))
        self._writer = self._written_once(writer)
        self._untrained = None if untrained is None else self._written_once(untrained)

    def _written_once(self, writer: PreferenceInference) -> WrittenOnce:
        async def write() -> list[Written]:
            outcomes = await writer.try_infer(self._signals)
            for outcome in outcomes:
                if isinstance(outcome, Failure) and outcome.failure not in ITEM_FAILURES:
                    error = f"no summary of user {outcome.user_id!r}: {outcome.error}"
                    raise BackendError(error, failure=outcome.failure)
            return [Written.of(outcome) for outcome in outcomes]

        return WrittenOnce(writer.name, partial(self._keep, "summaries", writer.name, model=Written, make=write))

    def materials(self, column: Column) -> Materials:
        return Materials(self._writer, self._untrained, column.backend, self._examples)

    async def measure(self, rows: Sequence[Row], column: Column, advance: Callable[[int], None]) -> None:
        """Measures the cells of one column."""
        plain = await self._keep(
            column.name,
            "plain",
            model=Plain,
            make=partial(measure_plain, column, self._examples, judged=self._judged),
        )
        for user, bare in zip(self.users, plain, strict=True):
            user.plain[column.name] = bare
        for row in rows:
            if row.accepted_by(column.backend):
                cells = await self._measure_row(row, column, plain)
                for user, measured in zip(self.users, cells, strict=True):
                    user.cells[row.name, column.name] = measured
            advance(len(self.users))

    async def collect(self, rows: Sequence[Row], column: Column) -> None:
        """Adds the summaries of rows whose claims can be checked."""
        for row in rows:
            for user, summary in zip(self.users, await self._contexts(row, column), strict=True):
                if isinstance(summary, PreferenceSummary):
                    user.summaries[row.name] = summary

    async def _measure_row(self, row: Row, column: Column, plain: Sequence[Plain]) -> list[Measured]:
        if row.build is None and column.reference is None:
            return measured_as_reference(plain, judged=self._judged)

        async def make() -> list[Measured]:
            contexts = await self._contexts(row, column)
            return await measure(column, self._examples, contexts, plain, judge=self._world, judged=self._judged)

        return await self._keep(column.name, row.name, model=Measured, make=make)

    async def _contexts(self, row: Row, column: Column) -> Sequence[Context]:
        if row.build is None:
            return [None] * len(self._signals)
        return await row.build(self.materials(column)).try_infer(self._signals)


def _why_not(row: Row, benches: Sequence[_Bench], columns: Sequence[Column]) -> str | None:
    """Why a row cannot be made, or ``None``."""
    try:
        for bench in benches:
            for column in columns:
                if row.build is not None:
                    row.build(bench.materials(column))
    except RowUnavailable as reason:
        return str(reason)
    return None


def _refused(rows: Sequence[Row], columns: Sequence[Column]) -> dict[tuple[str, str], str]:
    """Why cells cannot be measured, by row and column."""
    return {
        (row.name, column.name): f"{column.name} does not accept the interface {row.interface}"
        for row in rows
        for column in columns
        if not row.accepted_by(column.backend)
    }
