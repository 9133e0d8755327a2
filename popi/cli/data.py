"""``popi data``: users of the mini world, and a publisher's files as users' signals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from popi.cli.output import JsonFlag, Progress, print_json, print_records, progress, wants_json
from popi.errors import InputError

if TYPE_CHECKING:
    from popi.data.convert import Conversion
    from popi.data.example import PersonalizationExample

app = typer.Typer(help="Make data, and convert a publisher's files.")
convert = typer.Typer(help="Turn a publisher's files into users' signals and test pairs.")
app.add_typer(convert, name="convert")

Out = Annotated[Path, typer.Option(help="JSON lines: where the users go, one a line.")]


class Format(StrEnum):
    """How users are saved."""

    JSONL = "jsonl"
    DATASET = "dataset"


@app.command()
def miniworld(
    out: Annotated[Path, typer.Option(help="The file or, for a data set, the folder to make.")],
    users: Annotated[int, typer.Option(min=1, help="How many users.")],
    split: Annotated[
        str, typer.Option(help="train, validation, unseen-users, unseen-combinations or unseen-topics.")
    ] = "train",
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives other users.")] = 0,
    signals: Annotated[int | None, typer.Option(min=0, help="Signals of each user [default: 8].")] = None,
    tests: Annotated[int | None, typer.Option(min=0, help="Test pairs of each user [default: 4].")] = None,
    form: Annotated[Format, typer.Option("--format", help="JSON lines, or a datasets.Dataset.")] = Format.JSONL,
    json: JsonFlag = False,
) -> None:
    """Make users of the mini world, whose tastes are known.

    The same options make the same users, and the first of many are the same as few.
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
def dsp(
    path: Annotated[Path, typer.Argument(help="domain_specific_preference.*.json of Linear95/DSP.")],
    out: Out,
    signals: Annotated[int, typer.Option(min=1, help="Pairs that a user shows.")] = 4,
    tests: Annotated[int, typer.Option(min=0, help="Pairs that a user is tested on.")] = 4,
    seed: Annotated[int, typer.Option(help="Another seed deals the queries otherwise.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Domain-Specific Preference: an audience is a user, who prefers what was written for it.

    Says how many users, signals and tests there are, and what was dropped and why.
    """
    from popi.data.dsp import convert_dsp

    _refuse_overwriting(path, out)
    _finish(convert_dsp(path, signals_per_user=signals, tests_per_user=tests, seed=seed), out, json)


@convert.command()
def prefeval(
    path: Annotated[Path, typer.Argument(help="Folder of amazon-science/PrefEval, one in it, or one file of these.")],
    out: Out,
    seed: Annotated[int, typer.Option(help="Another seed chooses other dispreferred options.")] = 0,
    json: JsonFlag = False,
) -> None:
    """PrefEval: a user has one preference, stated, shown by a choice or told in a dialogue.

    Says how many users, signals and tests there are, and what was dropped and why.
    """
    from popi.data.prefeval import convert_prefeval

    _refuse_overwriting(path, out)
    _finish(convert_prefeval(path, seed=seed), out, json)


def _refuse_overwriting(path: Path, out: Path) -> None:
    if path.exists() and out.exists() and path.samefile(out):
        raise InputError("is the file to be converted", file=out, fix="give another --out")


def _finish(conversion: Conversion, out: Path, json: bool) -> None:
    """Writes the examples and prints the report: on a terminal by reason, else everything that was dropped."""
    from popi.io import write_jsonl

    write_jsonl(out, conversion.examples)
    print_records([{**conversion.summary(), "out": str(out)}], json_flag=json)
    if wants_json(json):
        for dropped in conversion.dropped:
            print_json(asdict(dropped))
    elif conversion.dropped:
        print_records(conversion.reasons(), json_flag=json, title="dropped")
