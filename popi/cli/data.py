"""``popi data``: users of the mini world, and files of several formats converted to users' signals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from popi.cli.output import JsonFlag, Progress, note, print_json, print_records, progress, wants_json
from popi.errors import InputError

if TYPE_CHECKING:
    from popi.data.convert import Conversion
    from popi.data.example import PersonalizationExample
    from popi.io import BadRows

app = typer.Typer(help="Make data, and convert files to it.")
convert = typer.Typer(help="Convert files to users' signals and held-out pairs.")
app.add_typer(convert, name="convert")

Out = Annotated[Path, typer.Option(help="The JSON lines file to write, one user per line.")]
SkipBadRows = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Continue without bad rows, and report them as dropped.")
]

MaxWords = Annotated[
    int | None,
    typer.Option(min=1, help="Cut answers that have more words, at the end of a sentence."),
]
EvalOut = Annotated[Path | None, typer.Option(help="A second file to write: users for evaluation.")]

EVAL_FRACTION = 0.2


class Format(StrEnum):
    """File formats of users."""

    JSONL = "jsonl"
    DATASET = "dataset"


@app.command()
def miniworld(
    out: Annotated[Path, typer.Option(help="The file, or for a data set the folder, to write.")],
    users: Annotated[int, typer.Option(min=1, help="Number of users.")],
    split: Annotated[
        str, typer.Option(help="train, validation, unseen-users, unseen-combinations or unseen-topics.")
    ] = "train",
    seed: Annotated[int, typer.Option(min=0, help="Each seed gives different users.")] = 0,
    signals: Annotated[int | None, typer.Option(min=0, help="Number of signals per user [default: 8].")] = None,
    tests: Annotated[int | None, typer.Option(min=0, help="Number of held-out pairs per user [default: 4].")] = None,
    form: Annotated[Format, typer.Option("--format", help="JSON lines, or a datasets.Dataset.")] = Format.JSONL,
    json: JsonFlag = False,
) -> None:
    """Make users of the mini world, whose preferences are known.

    The same options make the same users, and the first users do not depend on the number of users.
    """
    from popi import registry
    from popi.io import write_jsonl

    world = registry.load("popi.data.miniworld")
    sizes = {name: size for name, size in (("signals", signals), ("tests", tests)) if size is not None}
    with progress("users", users) as shown:
        made = _counting(world.generate(split=split, users=users, seed=seed, **sizes), shown)
        if form is Format.DATASET:
            registry.load("popi.data.dataset").save(made, out)
        else:
            write_jsonl(out, made)
    print_records([{"users": users, "split": split, "seed": seed, **sizes, "out": str(out)}], json_flag=json)


def _counting(examples: Iterable[PersonalizationExample], shown: Progress) -> Iterator[PersonalizationExample]:
    for example in examples:
        yield example
        shown.advance()


@convert.command()
def csv(
    path: Annotated[Path, typer.Argument(help="The table: one signal or held-out pair per row, column names first.")],
    out: Out,
    max_words: MaxWords = None,
    skip_bad_rows: SkipBadRows = False,
    json: JsonFlag = False,
) -> None:
    """A table of signals as CSV, with commas, semicolons or tabs.

    Each row has a user_id and fills the columns of its kind; others are empty.

    - pair: prompt, chosen, rejected
    - rating: prompt, response, score; best and worst unless 5 and 1
    - edit: prompt, original, edited
    - statement: text
    - comment: text, and about or prompt
    - demographics: facts.NAME, a column for each fact
    - held_out: prompt, chosen, rejected; a held-out pair

    The column kind is needed only for held_out. More columns, for every kind:
    id, time, origin, said_by.
    """
    from popi.data.csv_table import convert_csv
    from popi.io import BadRows

    _refuse_overwriting(path, out)
    bad_rows = BadRows(skip=skip_bad_rows)
    _finish(path, {out: convert_csv(path, bad_rows=bad_rows)}, json, max_words=max_words, bad_rows=bad_rows)


@convert.command()
def chat(
    path: Annotated[Path, typer.Argument(help='JSON lines, or a JSON list, of {"messages": [...], "user": ID}.')],
    out: Out,
    skip_bad_rows: SkipBadRows = False,
    json: JsonFlag = False,
) -> None:
    """A chat log in the format of OpenAI's API, one conversation per record.

    The user is named in user_id, user, metadata.user_id or metadata.user.
    The time is in time, created_at, created or timestamp.
    Only the text of the roles user and assistant is converted.
    """
    from popi.data.chat_log import convert_chat
    from popi.io import BadRows

    _refuse_overwriting(path, out)
    bad_rows = BadRows(skip=skip_bad_rows)
    _finish(path, {out: convert_chat(path, bad_rows=bad_rows)}, json, bad_rows=bad_rows)


@convert.command()
def dsp(
    path: Annotated[
        Path, typer.Argument(help="domain_specific_preference.*.json of Linear95/DSP, or a folder with such files.")
    ],
    out: Out,
    signals: Annotated[int, typer.Option(min=1, help="Number of pairs in a user's signals.")] = 4,
    tests: Annotated[int, typer.Option(min=0, help="Number of queries in a user's held-out pairs.")] = 4,
    rejected: Annotated[
        int, typer.Option(min=1, max=3, help="Number of held-out pairs of a query, each with another rejected answer.")
    ] = 1,
    eval_out: EvalOut = None,
    eval_fraction: Annotated[
        float | None, typer.Option(help=f"Fraction of the queries for evaluation; {EVAL_FRACTION} if not given.")
    ] = None,
    max_words: MaxWords = None,
    seed: Annotated[int, typer.Option(help="Each seed divides the queries differently.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Domain-Specific Preference: an audience is a user, who prefers what was written for it.

    With --eval-out, no query of that file occurs in OUT, for any audience.
    """
    from popi.data.dsp import convert_dsp, split_dsp

    fraction = _check_outputs(path, out, eval_out, eval_fraction)
    sizes = {"signals_per_user": signals, "tests_per_user": tests, "rejected_per_test": rejected, "seed": seed}
    if eval_out is None:
        made = {out: convert_dsp(path, **sizes)}
    else:
        train, evaluation = split_dsp(path, fraction=fraction, **sizes)
        made = {out: train, eval_out: evaluation}
    _finish(path, made, json, max_words=max_words)


@convert.command()
def prefeval(
    path: Annotated[
        Path, typer.Argument(help="The folder of amazon-science/PrefEval, a folder in it, or one of its files.")
    ],
    out: Out,
    eval_out: EvalOut = None,
    eval_fraction: Annotated[
        float | None,
        typer.Option(help=f"Fraction of the users for evaluation, in whole topics; {EVAL_FRACTION} if not given."),
    ] = None,
    max_words: MaxWords = None,
    seed: Annotated[int, typer.Option(help="Each seed chooses different rejected options and topics.")] = 0,
    json: JsonFlag = False,
) -> None:
    """PrefEval: a user has one preference, stated, shown by a choice or mentioned in a dialogue.

    With --eval-out, no topic, question or preference of that file occurs in OUT.
    """
    from popi.data.prefeval import convert_prefeval, split_prefeval

    fraction = _check_outputs(path, out, eval_out, eval_fraction)
    if eval_out is None:
        made = {out: convert_prefeval(path, seed=seed)}
    else:
        train, evaluation = split_prefeval(path, fraction=fraction, seed=seed)
        made = {out: train, eval_out: evaluation}
    _finish(path, made, json, max_words=max_words)


def _check_outputs(path: Path, out: Path, eval_out: Path | None, fraction: float | None) -> float:
    """Checks the options of a division, and returns the fraction for evaluation."""
    _refuse_overwriting(path, out)
    if eval_out is None:
        if fraction is not None:
            raise InputError("--eval-fraction divides the data, but only one file is written", fix="give --eval-out")
    else:
        _refuse_overwriting(path, eval_out, "--eval-out")
        if out.resolve() == eval_out.resolve():
            raise InputError("is also the file of --out", file=eval_out, fix="name another file with --eval-out")
    return EVAL_FRACTION if fraction is None else fraction


def _refuse_overwriting(path: Path, out: Path, option: str = "--out") -> None:
    if path.exists() and out.exists() and path.samefile(out):
        raise InputError("is the file to convert", file=out, fix=f"name another file with {option}")


def _finish(
    path: Path,
    made: Mapping[Path, Conversion],
    json: bool,
    *,
    max_words: int | None = None,
    bad_rows: BadRows | None = None,
) -> None:
    """Cuts answers, writes the files, and prints what was dropped: by reason on a terminal, else every item."""
    from popi.data.convert import Conversion
    from popi.data.cutting import AnswerCutter
    from popi.io import write_jsonl_together

    cuts = []
    if max_words is not None:
        whole, made = made, {}
        for out, conversion in whole.items():
            cutter = AnswerCutter(max_words)
            made[out] = cutter.cut(conversion, path.name)
            cuts += [{**record, "out": str(out)} for record in cutter.summary()]
    write_jsonl_together({out: conversion.examples for out, conversion in made.items()})
    if bad_rows is not None and bad_rows.count:
        note(bad_rows.summary())
    print_records([{**conversion.summary(), "out": str(out)} for out, conversion in made.items()], json_flag=json)
    if cuts:
        print_records(cuts, json_flag=json, title="answers")
    if wants_json(json):
        for out, conversion in made.items():
            for dropped in conversion.dropped:
                print_json(dropped.as_record() | ({"out": str(out)} if len(made) > 1 else {}))
    elif items := tuple(item for conversion in made.values() for item in conversion.dropped):
        print_records(Conversion((), items).reasons(), json_flag=json, title="dropped")
