"""``popi quickstart``: signals, summaries and responses of one user, and what the summaries gain, measured."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from popi.cli.output import note, print_json, progress

if TYPE_CHECKING:
    from popi.backends.base import Backend
    from popi.data.example import PersonalizationExample
    from popi.evaluation.results import Results
    from popi.evaluation.samples import Sample
    from popi.personalizer import Personalizer
    from popi.summary import PreferenceSummary

WRITER, GENERATOR, READER, BASE = "popi-mini-writer", "popi-mini-generator", "popi-mini-reader", "popi-mini-base"
SPLIT, SEED = "unseen-combinations", 0

USERS, PROMPTS, JUDGED = 150, 2, 40
"""Number of users, of prompts per user, and of users whose responses are judged: enough for useful confidence
intervals, in less than three minutes."""

INTRODUCTION = (
    "This is popi in miniature: users whose preferences are made up and known, and language models of a few megabytes "
    "that were trained for their world. The models run for real. Their figures say nothing about real users or models."
)

NEXT = """\
Where to go next:
  popi eval --world miniworld --seeds 3 --out FOLDER        the same table for 3,000 users, with all measurements
  popi summarize --signals USERS.jsonl --model MODEL --out SUMMARIES.jsonl
                                                            your own users; MODEL is any Hugging Face causal LM
  popi generate --prompt "..." --summaries SUMMARIES.jsonl --user ID --model MODEL
  popi data convert csv|chat|dsp|prefeval PATH --out USERS.jsonl
                                                            your own tables and chat logs, and published data
  popi doctor                                               what is installed, and what is missing"""


class Answers(NamedTuple):
    """Two responses of the same model to a prompt, without and with the summary."""

    prompt: str
    plain: str
    personalized: str


def quickstart(json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False) -> None:
    """Show how popi works: the signals of a user, the summaries before and after training, responses, and the gain."""
    import asyncio

    from popi.registry import load

    load("numpy")  # not in the base installation: the error names the extra
    from popi.data.miniworld import world
    from popi.evaluation.samples import Sample

    start = time.monotonic()
    sample = Sample(SEED, list(world.generate(split=SPLIT, users=USERS, seed=SEED, tests=PROMPTS)))
    asyncio.run(_run(sample, as_json=json))
    if not json:
        typer.echo(NEXT)
    note(f"finished in {time.monotonic() - start:.0f} s")


async def _run(sample: Sample, *, as_json: bool) -> None:
    from popi.cli.evaluate import opened, show
    from popi.personalizer import Personalizer
    from popi.registry import make_generator, make_inference

    example = sample.examples[0]
    async with opened((WRITER, GENERATOR, READER, BASE)) as models:
        generator = make_generator("prompted", models[GENERATOR])
        trained = Personalizer(make_inference("llm", models[WRITER]), generator)
        untrained = Personalizer(make_inference("llm", models[BASE]), None)
        summaries = [await _infer(personalizer, example) for personalizer in (untrained, trained)]
        answers = await _answer_twice(example, trained)
        (_print_lines if as_json else _print_story)(example, summaries, answers)
        results = await _measure(sample, trained, untrained, models)
    show(results, as_json=as_json)


async def _infer(personalizer: Personalizer, example: PersonalizationExample) -> PreferenceSummary:
    from popi.summary import PreferenceSummary

    personalizer.observe(example.user.user_id, *example.user.signals)
    summary = await personalizer.infer(example.user.user_id)
    assert isinstance(summary, PreferenceSummary)
    return summary


async def _answer_twice(example: PersonalizationExample, personalizer: Personalizer) -> list[Answers]:
    """Responds to the user's prompts without and with the summary."""
    return [
        Answers(
            pair.prompt,
            str(await personalizer.respond(None, pair.prompt)),
            str(await personalizer.respond(example.user.user_id, pair.prompt)),
        )
        for pair in example.tests
    ]


async def _measure(
    sample: Sample, trained: Personalizer, untrained: Personalizer, models: Mapping[str, Backend]
) -> Results:
    from popi.cli.evaluate import column
    from popi.evaluation.folder import Folder
    from popi.evaluation.rows import choose
    from popi.evaluation.run import evaluate

    assert trained.inference is not None
    rows = choose([], trained=True)
    columns = [column(models[GENERATOR], models[BASE]), column(models[READER])]
    with (
        TemporaryDirectory(prefix="popi-quickstart-") as folder,
        progress("evaluation", len(sample.examples) * len(rows) * len(columns)) as shown,
    ):
        return await evaluate(
            [sample],
            rows=rows,
            columns=columns,
            writer=trained.inference,
            untrained=untrained.inference,
            folder=Folder(Path(folder)),
            judged=JUDGED,
            settings={"world": "miniworld", "split": SPLIT, "seeds": [SEED]},
            advance=shown.advance,
        )


def _print_lines(
    example: PersonalizationExample, summaries: Sequence[PreferenceSummary], answers: Sequence[Answers]
) -> None:
    print_json({"kind": "user", **example.user.model_dump(mode="json")})
    for summary in summaries:
        print_json({"kind": "summary", **summary.model_dump(mode="json")})
    for pair in answers:
        print_json({"kind": "answers", **pair._asdict()})


def _print_story(
    example: PersonalizationExample, summaries: Sequence[PreferenceSummary], answers: Sequence[Answers]
) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from popi.render import describe

    console = Console(highlight=False)
    console.print(INTRODUCTION)

    def panel(title: str, body: str) -> Panel:
        return Panel(Text(body), title=title, title_align="left")

    number = {signal.id: place for place, signal in enumerate(example.user.signals, start=1)}
    shown = "\n".join(f"[{number[signal.id]}] {describe(signal)}" for signal in example.user.signals)
    console.print(panel("The signals of one user", shown))
    before, after = (_with_evidence(summary, number) for summary in summaries)
    sides = Table.grid(expand=True)
    for _ in summaries:
        sides.add_column(ratio=1)
    sides.add_row(panel(f"{BASE} infers, untrained", before), panel(f"{WRITER} infers, trained", after))
    console.print(sides)
    truth = "The true preferences, which no model has seen"
    console.print(panel(truth, example.oracles["truth"]))
    table = Table(
        "prompt", "plain response", "response with the summary", title=f"{GENERATOR} responds", show_lines=True
    )
    for pair in answers:
        table.add_row(*map(Text, pair))
    console.print(table)


def _with_evidence(summary: PreferenceSummary, number: Mapping[str, int]) -> str:
    """The claims, each with the numbers of the signals that the writer cites."""
    if not summary.claims:
        return summary.text
    lines = []
    for claim in summary.claims:
        cited = ", ".join(map(str, sorted(number[signal_id] for signal_id in claim.evidence)))
        lines.append(f"- {claim.text}  ({f'from {cited}' if cited else 'no citation'})")
    return "\n".join(lines)
