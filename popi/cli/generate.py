"""``popi generate``: an answer under a summary, or many."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from popi.cli.output import JsonFlag, print_json, shown, wants_json
from popi.errors import BackendError, ConfigError, InputError, did_you_mean

if TYPE_CHECKING:
    from popi.backends.base import ChatResult
    from popi.roles import Conditioned, ConditionedGenerator
    from popi.summary import PreferenceSummary


def generate(
    model: Annotated[str, typer.Option(help="Name of a shipped model, path, hub id, or a backend's YAML file.")],
    prompt: Annotated[str | None, typer.Option(help="What is asked.")] = None,
    summary: Annotated[str | None, typer.Option(help="The summary to answer under, in words.")] = None,
    summaries: Annotated[Path | None, typer.Option(help="JSON lines, as popi summarize writes them.")] = None,
    user: Annotated[str | None, typer.Option(help="Whose summary of these.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it is made.")] = False,
    prompts: Annotated[Path | None, typer.Option(help='Many prompts: JSON lines of {"user_id", "prompt"}.')] = None,
    out: Annotated[Path | None, typer.Option(help="JSON lines: where the answers to many prompts go.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once, of many.")] = 64,
    json: JsonFlag = False,
) -> None:
    """Answer a prompt, or with --prompts and --out many, under summaries or without.

    Many: the same command again goes on where it stopped. Beside the answers lies a file .meta.json with the
    settings; a file made with others is refused.
    """
    for name, text in {"--prompt": prompt, "--summary": summary}.items():
        if text is not None and not is_utf8(text):
            raise ConfigError(f"{name} is not UTF-8 text")
    options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    if prompts is not None and out is not None:
        _refuse({"--prompt": prompt, "--summary": summary, "--user": user, "--stream": stream}, beside="--prompts")
        from popi.cli.answers import answer_all

        answer_all(prompts, out, model, options, summaries=summaries, batch_size=batch_size, json=json)
    elif prompt is not None:
        _refuse({"--prompts": prompts, "--out": out}, beside="--prompt")
        _answer(prompt, _choose_summary(summary, summaries, user), model, options, stream=stream, json=json)
    else:
        raise ConfigError("nothing is asked", fix="give --prompt TEXT, or --prompts FILE and --out FILE")


def is_utf8(text: str) -> bool:
    """Whether a word of the command line came as UTF-8: other bytes arrive as halves of surrogate pairs."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _refuse(options: dict[str, object], *, beside: str) -> None:
    given = next((name for name, value in options.items() if value not in (None, False)), None)
    if given is not None:
        raise ConfigError(f"{given} means nothing beside {beside}", fix="leave one of them out")


def _choose_summary(text: str | None, path: Path | None, user: str | None) -> PreferenceSummary | None:
    from popi.cli.answers import load_summaries
    from popi.summary import Author, PreferenceSummary, Provenance

    if (path is None) != (user is None):
        raise ConfigError("--summaries and --user belong together", fix="give both or neither")
    if path is None or user is None:
        made = Provenance(author=Author.EDITED)
        return None if text is None else PreferenceSummary(user_id="", text=text, provenance=made)
    if text is not None:
        raise ConfigError("--summary means nothing beside --summaries", fix="leave one of them out")
    known = load_summaries(path)
    if user not in known:
        raise InputError(f"no summary of user {user!r}", file=path, fix=did_you_mean(user, known))
    return known[user]


def _answer(
    prompt: str,
    summary: PreferenceSummary | None,
    model: str,
    options: dict[str, int | float],
    *,
    stream: bool,
    json: bool,
) -> None:
    import asyncio

    from popi.cli.batches import accounted, closing, load_backend
    from popi.registry import generator
    from popi.roles import Conditioned

    backend, ledger = load_backend(model, "generator")
    answering = generator("prompted")(backend, **options)
    item = Conditioned(prompt, summary)
    with accounted(ledger):
        if stream:
            asyncio.run(closing(backend, _stream(answering, item, json=json)))
            return
        [result] = asyncio.run(closing(backend, answering.respond([item])))
    if result.error is not None:
        raise BackendError(f"no answer: {result.error}")
    if wants_json(json):
        print_json(_record(item, result))
    else:
        typer.echo(shown(result.text))


def _record(item: Conditioned, result: ChatResult) -> dict[str, object]:
    from popi.summary import PreferenceSummary

    return {
        "prompt": item.prompt,
        "summary": item.interface.text if isinstance(item.interface, PreferenceSummary) else None,
        "response": result.text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "model": result.model,
        "route": result.route,
    }


async def _stream(answering: ConditionedGenerator, item: Conditioned, *, json: bool) -> None:
    """Prints the pieces: as text, which is what a stream is for also when piped, or as JSON lines, the answer last."""

    def on_complete(result: ChatResult) -> None:
        if json:
            print_json(_record(item, result))

    async for piece in answering.stream(item, on_complete):
        if json:
            print_json({"piece": piece})
        else:
            sys.stdout.write(shown(piece) if sys.stdout.isatty() else piece)
            sys.stdout.flush()
    if not json:
        sys.stdout.write("\n")
