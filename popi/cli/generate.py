"""``popi generate``: responds to one prompt or to many, under summaries or without."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from popi.cli.output import JsonFlag, note, print_json, shown, wants_json
from popi.errors import ConfigError, InputError, did_you_mean

if TYPE_CHECKING:
    from popi.personalizer import Personalizer
    from popi.response import Response
    from popi.summary import PreferenceSummary


def generate(
    model: Annotated[str, typer.Option(help="The model: a shipped name, path, hub id, or YAML file of a backend.")],
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    summary: Annotated[str | None, typer.Option(help="The text of a summary.")] = None,
    summaries: Annotated[Path | None, typer.Option(help="JSON lines, as popi summarize writes them.")] = None,
    user: Annotated[str | None, typer.Option(help="The user whose summary to take from SUMMARIES.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the response while it is generated.")] = False,
    prompts: Annotated[Path | None, typer.Option(help='Many prompts: JSON lines of {"user_id", "prompt"}.')] = None,
    out: Annotated[Path | None, typer.Option(help="JSON lines: the responses to PROMPTS.")] = None,
    generation: Annotated[str, typer.Option(help="The generator class: prompted, or module:Class.")] = "prompted",
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of tokens of a response [default: 256].")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy [default: 0].")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling [default: 0].")] = None,
    prompt_set: Annotated[
        str | None,
        typer.Option(help="A prompt set: its name, or a YAML file [default: the one that the model was trained with]."),
    ] = None,
    max_concurrency: Annotated[int, typer.Option(min=1, help="Maximum number of prompts at the same time.")] = 64,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Continue without the bad rows of PROMPTS, and print their number.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Respond to a prompt, or to many with --prompts and --out, under summaries or without.

    With --prompts, each response is written as soon as it is finished, and the same command resumes an interrupted run.
    The settings are recorded in a file next to OUT, .meta.json; an OUT that was made with other settings is refused.
    """
    for name, text in {"--prompt": prompt, "--summary": summary, "--user": user}.items():
        if text is not None and not is_utf8(text):
            raise ConfigError(f"{name} is not UTF-8 text")
    options = _options(
        generation, {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "prompts": prompt_set}
    )
    if prompts is not None and out is not None:
        _refuse({"--prompt": prompt, "--summary": summary, "--user": user, "--stream": stream}, other="--prompts")
        from popi.cli.answers import answer_all

        answer_all(
            prompts,
            out,
            model,
            generation,
            options,
            summaries=summaries,
            max_concurrency=max_concurrency,
            skip_bad_rows=skip_bad_rows,
            json=json,
        )
    elif prompt is not None:
        _refuse({"--prompts": prompts, "--out": out}, other="--prompt")
        _respond(
            prompt, _choose_summary(summary, summaries, user), model, generation, options, stream=stream, json=json
        )
    else:
        raise ConfigError("no prompt given", fix="give --prompt TEXT, or --prompts FILE and --out FILE")


def is_utf8(text: str) -> bool:
    """Whether an argument of the command line was UTF-8. Other bytes arrive as lone surrogates."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _options(generation: str, named: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, and a fixed seed."""
    from popi.registry import generator_options

    given = {name: value for name, value in named.items() if value is not None}
    known = generator_options(generation, **given)
    return {"seed": 0, **given} if "seed" in known else given


def _refuse(options: dict[str, object], *, other: str) -> None:
    given = next((name for name, value in options.items() if value not in (None, False)), None)
    if given is not None:
        raise ConfigError(f"{given} cannot be combined with {other}", fix="remove one of them")


def _choose_summary(text: str | None, path: Path | None, user: str | None) -> PreferenceSummary | None:
    from popi.cli.answers import load_summaries
    from popi.signals import as_user_id
    from popi.summary import Author, PreferenceSummary, Provenance

    if (path is None) != (user is None):
        raise ConfigError("--summaries and --user need each other", fix="give both or neither")
    if path is None or user is None:
        made = Provenance(author=Author.EDITED)
        return None if text is None else PreferenceSummary(user_id="", text=text, provenance=made)
    if text is not None:
        raise ConfigError("--summary cannot be combined with --summaries", fix="remove one of them")
    known, user_id = load_summaries(path), as_user_id(user)
    if user_id not in known:
        raise InputError(f"no summary of user {user_id!r}", file=path, fix=did_you_mean(user_id, known))
    return known[user_id]


def _respond(
    prompt: str,
    summary: PreferenceSummary | None,
    model: str,
    generation: str,
    options: dict[str, Any],
    *,
    stream: bool,
    json: bool,
) -> None:
    import asyncio

    from popi.cli.batches import identity, reporting_cost
    from popi.personalizer import Personalizer
    from popi.response import incompleteness

    personalizer = Personalizer.load(identity(model), inference=None, generation=generation, generator_options=options)
    [ledger] = personalizer.ledgers
    with reporting_cost(ledger):
        respond = _stream(personalizer, prompt, summary, json=json) if stream else _whole(personalizer, prompt, summary)
        response = asyncio.run(respond)
    if json or (wants_json(json) and not stream):
        print_json(_record(prompt, summary, response))
    elif not stream:
        typer.echo(shown(response.text))
    if not response.is_complete:
        note(f"the response is incomplete: {incompleteness(response)}")


def _record(prompt: str, summary: PreferenceSummary | None, response: Response) -> dict[str, object]:
    return {
        "prompt": prompt,
        "summary": None if summary is None else summary.text,
        "response": response.text,
        "finish_reason": response.finish_reason,
        "prompt_tokens": response.prompt_tokens,
        "completion_tokens": response.completion_tokens,
        "model": response.model,
        "route": response.route,
    }


async def _whole(personalizer: Personalizer, prompt: str, summary: PreferenceSummary | None) -> Response:
    async with personalizer:
        return await personalizer.respond(_user_of(summary), prompt, interface=summary)


async def _stream(
    personalizer: Personalizer, prompt: str, summary: PreferenceSummary | None, *, json: bool
) -> Response:
    """Prints the pieces: as text, also when piped, or as JSON lines."""
    responses: list[Response] = []
    text = False
    async with personalizer:
        try:
            pieces = personalizer.stream(_user_of(summary), prompt, responses.append, interface=summary)
            async for piece in pieces:
                if json:
                    print_json({"piece": piece})
                else:
                    sys.stdout.write(shown(piece) if sys.stdout.isatty() else piece)
                    sys.stdout.flush()
                    text = True
        finally:
            if text:
                sys.stdout.write("\n")
    return responses[0]


def _user_of(summary: PreferenceSummary | None) -> str | None:
    return None if summary is None else summary.user_id or None
