"""``popi quickstart``: the main job, done for real with the models that ship."""

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
    from popi.roles import PreferenceInference
    from popi.summary import PreferenceSummary

WRITER, GENERATOR, READER, BASE = "popi-mini-writer", "popi-mini-generator", "popi-mini-reader", "popi-mini-base"
SPLIT, SEED = "unseen-combinations", 0

USERS, PROMPTS, JUDGED = 150, 2, 40
"""Users, test prompts of each, users with a judged answer: intervals that say something, in less than three minutes."""

INTRODUCTION = (
    "This is popi in miniature: made-up users whose tastes are known, and language models of a few megabytes that were "
    "trained on their world alone. What they do is real, what they score says nothing of real users or models."
)

NEXT = """\
Where to go next:
  popi eval --world miniworld --seeds 3 --out FOLDER        the same table on 3,000 users, with all that it rests on
  popi summarize --signals USERS.jsonl --model MODEL --out SUMMARIES.jsonl
                                                            your own users; MODEL is any Hugging Face causal LM
  popi generate --prompt "..." --summaries SUMMARIES.jsonl --user ID --model MODEL
  popi data convert dsp|prefeval PATH --out USERS.jsonl     published data
  popi doctor                                               what is installed, and what is missing"""


class Answers(NamedTuple):
    """One prompt, answered by the same model without and with the summary."""

    prompt: str
    plain: str
    personalized: str


def quickstart(json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False) -> None:
    """Watch it work: a user's signals, their summary before and after training, answers, and the gain, measured."""
    import asyncio

    from popi.registry import load

    load("numpy")  # the base installation has none, and the error has to name the extra
    from popi.data.miniworld import world
    from popi.evaluation.samples import Sample

    start = time.monotonic()
    sample = Sample(SEED, list(world.generate(split=SPLIT, users=USERS, seed=SEED, tests=PROMPTS)))
    asyncio.run(_run(sample, as_json=json))
    if not json:
        typer.echo(NEXT)
    note(f"all of this took {time.monotonic() - start:.0f} s")


async def _run(sample: Sample, *, as_json: bool) -> None:
    from popi.cli.evaluate import opened, show
    from popi.registry import inference

    example = sample.examples[0]
    async with opened((WRITER, GENERATOR, READER, BASE)) as models:
        trained, untrained = (inference("llm")(models[name]) for name in (WRITER, BASE))
        [[before], [after]] = [await writer.infer([example.user]) for writer in (untrained, trained)]
        answers = await _answer_twice(example, after, models[GENERATOR])
        (_print_lines if as_json else _print_story)(example, (before, after), answers)
        results = await _measure(sample, trained, untrained, models)
    show(results, as_json=as_json)


async def _answer_twice(example: PersonalizationExample, summary: PreferenceSummary, backend: Backend) -> list[Answers]:
    """Answers the user's test prompts.

    Raises:
        BackendError: If an answer fails.
    """
    from popi.errors import BackendError
    from popi.registry import generator
    from popi.roles import Conditioned

    prompts = [pair.prompt for pair in example.tests]
    asked = [Conditioned(prompt, given) for prompt in prompts for given in (None, summary)]
    results = await generator("prompted")(backend).respond(asked)
    for result in results:
        if result.error is not None:
            raise BackendError(f"no answer: {result.error}")
    texts = iter([result.text for result in results])
    return [Answers(prompt, next(texts), next(texts)) for prompt in prompts]


async def _measure(
    sample: Sample, trained: PreferenceInference, untrained: PreferenceInference, models: Mapping[str, Backend]
) -> Results:
    from popi.cli.evaluate import column
    from popi.evaluation.folder import Folder
    from popi.evaluation.rows import choose
    from popi.evaluation.run import evaluate

    rows = choose([], trained=True)
    columns = [column(models[GENERATOR], models[BASE]), column(models[READER])]
    with (
        TemporaryDirectory(prefix="popi-quickstart-") as folder,
        progress("the table", len(sample.examples) * len(rows) * len(columns)) as shown,
    ):
        return await evaluate(
            [sample],
            rows=rows,
            columns=columns,
            writer=trained,
            untrained=untrained,
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
    console.print(panel("What one user has shown of their preferences", shown))
    before, after = (_with_evidence(summary, number) for summary in summaries)
    sides = Table.grid(expand=True)
    for _ in summaries:
        sides.add_column(ratio=1)
    sides.add_row(panel(f"{BASE} infers, untrained", before), panel(f"{WRITER} infers, trained", after))
    console.print(sides)
    truth = "The truth, which is known in this world and which no model has seen"
    console.print(panel(truth, example.oracles["truth"]))
    table = Table("prompt", "plain answer", "answer under the summary", title=f"{GENERATOR} answers", show_lines=True)
    for pair in answers:
        table.add_row(*map(Text, pair))
    console.print(table)


def _with_evidence(summary: PreferenceSummary, number: Mapping[str, int]) -> str:
    """The claims, each with the numbers of the signals that the writer gave for it."""
    if not summary.claims:
        return summary.text
    lines = []
    for claim in summary.claims:
        cited = ", ".join(map(str, sorted(number[signal_id] for signal_id in claim.evidence)))
        lines.append(f"- {claim.text}  ({f'from {cited}' if cited else 'cites nothing'})")
    return "\n".join(lines)
