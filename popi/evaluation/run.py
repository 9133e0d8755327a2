"""Running an evaluation: every row under every column, for every sample of users."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

from popi.errors import InputError
from popi.evaluation.folder import Folder
from popi.evaluation.judges import World, world_of
from popi.evaluation.measure import Column, Measured, Plain, measure, measure_nothing, measure_plain
from popi.evaluation.results import Cell, Results
from popi.evaluation.rows import NO_CONTEXT, REFERENCES, Materials, Row, RowUnavailable, WrittenOnce
from popi.evaluation.samples import Sample
from popi.evaluation.tabulate import MeasuredUser, Tabulator
from popi.models import shipped
from popi.roles import PreferenceInference
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
    """Measures what is not measured yet, and makes the table.

    Args:
        samples: The users; nobody is in two of them.
        rows: What the generators are told. A row that the data cannot have is left out and named in the results.
        columns: The generators.
        writer: The inference under test.
        untrained: What it was before it was trained; ``None`` if it was not.
        folder: Keeps what is measured; what it holds already is not measured again.
        judged: How many users of each sample get an answer that is judged, where their world has a judge.
        settings: Goes into the results.
        advance: Told after each row of each column how many users are done; a sample has
            ``len(rows) * len(columns)`` times its users.

    Raises:
        BackendError: If a model cannot serve.
        InputError: If the folder holds broken pieces, or the data can have none of the rows.
        PopiError: If the folder cannot be written.
    """
    world = world_of([example for sample in samples for example in sample.examples])
    benches = [_Bench(sample, writer, untrained, folder, world, judged if world else 0) for sample in samples]
    left_out = {row.name: why for row in rows if (why := _why_not(row, benches, columns))}
    made = [row for row in rows if row.name not in left_out]
    if not made:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise InputError(f"none of the rows can be had of these data ({reasons})", fix="ask for other rows")
    for bench in benches:
        for column in columns:
            await bench.measure(made, column, advance)
            advance(len(bench.users) * len(left_out))
        await bench.collect([row for row in made if row.claims], columns[0])

    table = Tabulator([user for bench in benches for user in bench.users])
    names = [column.name for column in columns]
    cells = table.cells([row.name for row in made], names, REFERENCES)
    return Results(
        settings=dict(settings),
        users=sum(len(sample.examples) for sample in samples),
        cells=cells,
        controls=table.controls(names),
        summaries=[table.summaries(row.name, world) for row in made if row.claims],
        left_out=left_out,
        notes=_notes(cells, world, [writer.name, *(column.backend.model for column in columns)], _clusters(samples)),
    )


class _Bench:
    """One sample of users under measurement."""

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
        def have() -> Awaitable[list[PreferenceSummary]]:
            make = partial(writer.infer, self._signals)
            return self._keep("summaries", writer.name, model=PreferenceSummary, make=make)

        return WrittenOnce(writer.name, have)

    def materials(self, column: Column) -> Materials:
        return Materials(self._writer, self._untrained, column.backend, self._examples)

    async def measure(self, rows: Sequence[Row], column: Column, advance: Callable[[int], None]) -> None:
        """Fills one column."""
        plain = await self._keep(
            column.name,
            "plain",
            model=Plain,
            make=partial(measure_plain, column, self._examples, judged=self._judged),
        )
        for user, bare in zip(self.users, plain, strict=True):
            user.plain[column.name] = bare
        for row in rows:
            if row.build is None and column.reference is None:
                cells = measure_nothing(plain, judged=self._judged)
            else:
                cells = await self._keep(
                    column.name,
                    row.name,
                    model=Measured,
                    make=partial(self._measure_row, row, column, plain),
                )
            for user, measured in zip(self.users, cells, strict=True):
                user.cells[row.name, column.name] = measured
            advance(len(self.users))

    async def collect(self, rows: Sequence[Row], column: Column) -> None:
        """Gets the summaries of rows whose claims can be checked."""
        for row in rows:
            for user, summary in zip(self.users, await self._told(row, column), strict=True):
                if summary is not None:
                    user.summaries[row.name] = summary

    async def _measure_row(self, row: Row, column: Column, plain: Sequence[Plain]) -> list[Measured]:
        told = await self._told(row, column)
        return await measure(column, self._examples, told, plain, judge=self._world, judged=self._judged)

    async def _told(self, row: Row, column: Column) -> Sequence[PreferenceSummary | None]:
        if row.build is None:
            return [None] * len(self._signals)
        return await row.build(self.materials(column)).infer(self._signals)


def _why_not(row: Row, benches: Sequence[_Bench], columns: Sequence[Column]) -> str | None:
    """Why a row cannot be made, if so."""
    try:
        for bench in benches:
            for column in columns:
                if row.build is not None:
                    row.build(bench.materials(column))
    except RowUnavailable as reason:
        return str(reason)
    return None


def _clusters(samples: Sequence[Sample]) -> int | None:
    """How many clusters the users make, if not each is one."""
    examples = [example for sample in samples for example in sample.examples]
    count = len({example.cluster for example in examples})
    return count if count < len(examples) else None


def _notes(cells: Sequence[Cell], world: World | None, models: Sequence[str], clusters: int | None) -> list[str]:
    """What a reader of the table has to know."""
    miniatures = sorted(set(models) & set(shipped()))
    notes = [world.remark] if world else []
    if world is None and miniatures:
        notes.append(f"{' and '.join(miniatures)} know the mini world alone: their scores mean nothing on these data.")
    bare = [cell.accuracy for cell in cells if cell.row == NO_CONTEXT and cell.accuracy is not None]
    if any(accuracy.low == accuracy.high == 0.5 for accuracy in bare):
        notes.append(
            "No context is 50 % by construction where a generator is its own reference: with the same prompt on both "
            "sides of the margin every pair ties, and a tie counts one half."
        )
    texts = [cell.column for cell in cells if cell.accuracy is None]
    if texts:
        notes.append(f"{' and '.join(dict.fromkeys(texts))} gives text alone: win rates, no accuracy.")
    unscored = [f"{cell.unscored} of {cell.pairs} in {cell.row} ({cell.column})" for cell in cells if cell.unscored]
    if unscored:
        notes.append(
            f"Pairs that could not be scored, most likely for their length, count as ties: {', '.join(unscored)}."
        )
    if clusters is not None:
        notes.append(f"These users do not witness independently: they make {clusters} clusters, which are resampled.")
    if world is None:
        notes.append("Nothing is known of the truth behind these data: no win rate, no faithfulness.")
    elif cells and cells[0].judged:
        notes.append(
            "The win rate is that of the answer to a user's first test prompt against the same generator's answer to "
            f"the bare prompt, for {cells[0].judged} users, in random order; a tie counts one half."
        )
    return notes
