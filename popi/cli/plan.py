"""``popi plan``: the memory and the time that a recipe needs, before it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from popi.cli.output import JsonFlag, note, print_json, print_table, wants_json
from popi.errors import ConfigError

if TYPE_CHECKING:
    from popi.config import JointRecipe
    from popi.planning.lengths import Lengths
    from popi.planning.plan import Plan

MOST = 10**6
"""Maximum number of tokens of a text."""


def plan(
    recipe: Annotated[Path, typer.Argument(help="A joint recipe: a YAML file, or a folder with config.yaml.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override a field of the recipe.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, max=10**5, help="Number of GPUs, on all nodes together.")] = 1,
    gpu_memory: Annotated[float, typer.Option(min=1, max=10**5, help="Memory of each in GB (10^9 bytes).")] = 80.0,
    signal_tokens: Annotated[
        int | None,
        typer.Option(min=2, max=MOST, help="Longest prompt of the writer [default: from the data, or 1500]."),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=2, max=MOST, help="Longest prompt of a pair [default: from the data, or 100].")
    ] = None,
    answer_tokens: Annotated[
        int | None, typer.Option(min=2, max=MOST, help="Longest response of a pair [default: from the data, or 300].")
    ] = None,
    summary_tokens: Annotated[
        int | None, typer.Option(min=2, max=MOST, help="Longest summary [default: writer.max_tokens].")
    ] = None,
    tokens_per_second: Annotated[
        float | None,
        typer.Option(min=0.001, help="Tokens that a GPU reads per second. An update costs three readings."),
    ] = None,
    new_tokens_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Tokens that a GPU samples per second. Else sampling is left out.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Estimate the memory of each GPU and the time of a recipe, from the configurations of its models.

    Neither weights nor a GPU are needed: the steps are computed with tensors that have shapes and no numbers.
    """
    from popi.config import JointRecipe, load, parse_overrides

    resolved = load(recipe, parse_overrides(set_ or []))
    if not isinstance(resolved, JointRecipe):
        raise ConfigError(f"is {resolved.task}, but only joint recipes are planned", file=recipe, field="task")
    from popi.planning.lengths import Lengths, given, measure
    from popi.planning.plan import Machine, Planner, check_ranks

    check_ranks(resolved, gpus)
    measured = measure(resolved)
    lengths = {"signals": signal_tokens, "prompt": prompt_tokens, "answer": answer_tokens, "summary": summary_tokens}
    usual = Lengths(summary=resolved.writer.max_tokens)
    longest = given(usual if measured is None else measured.longest, **lengths)
    mean = longest if measured is None else given(measured.mean, **lengths)
    note(f"tokens: {_told(longest)}; {'assumed' if measured is None else 'measured'} where no option gives them")
    planner = Planner(resolved, Machine(gpus, gpu_memory * 10**9), longest)
    found = planner.plan()
    verdict = _verdict(found, planner.advice(found))
    spent = _time(resolved, mean, gpus, tokens_per_second, new_tokens_per_second)
    if wants_json(json):
        for record in (*_records(found), {**spent, "fits": found.fits, "verdict": verdict}):
            print_json(record)
        return
    print_table(_table(found), title="GB on each GPU at the peak of each phase")
    print_table([{"tokens and time": name, "": _figure(value)} for name, value in spent.items()])
    typer.echo(verdict)


def _told(lengths: Lengths) -> str:
    return f"signals {lengths.signals}, prompt {lengths.prompt}, summary {lengths.summary}, answer {lengths.answer}"


def _records(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "phase": phase.phase,
            "peak_at": phase.moment,
            "gb": {part: round(size / 1e9, 3) for part, size in phase.peak.most_common() if size},
            "total_gb": round(phase.peak.total() / 1e9, 3),
            "host_gb": round(phase.host / 1e9, 3),
            "moments_gb": {moment: round(parts.total() / 1e9, 3) for moment, parts in phase.peaks.items()},
        }
        for phase in plan.phases
    ]


def _table(plan: Plan) -> list[dict[str, Any]]:
    parts = list(dict.fromkeys(part for phase in plan.phases for part, size in phase.peak.most_common() if size))
    rows = [{"": part, **{phase.phase: f"{phase.peak[part] / 1e9:.1f}" for phase in plan.phases}} for part in parts]
    total = {"": "total", **{phase.phase: f"{phase.peak.total() / 1e9:.1f}" for phase in plan.phases}}
    host = {"": "memory of the host", **{phase.phase: f"{phase.host / 1e9:.1f}" for phase in plan.phases}}
    moment = {"": "peak at", **{phase.phase: phase.moment for phase in plan.phases}}
    return [moment, *rows, total, *([host] if any(phase.host for phase in plan.phases) else [])]


def _verdict(plan: Plan, advice: list[str]) -> str:
    phase = plan.peak
    needed, memory = phase.peak.total() / 1e9, plan.machine.memory / 1e9
    what = f"{needed:.1f} of {memory:.1f} GB on each GPU, in {phase.phase} ({phase.moment})"
    if plan.fits:
        return f"fits: {what}"
    return f"does not fit: {what}" + (f"; use {'; '.join(advice)}" if advice else "")


def _time(
    recipe: JointRecipe, mean: Lengths, gpus: int, reading: float | None, writing: float | None
) -> dict[str, float]:
    from popi.planning.duration import seconds, tokens_of, tokens_of_run

    steps = tokens_of(recipe, mean)
    roles = {"both": ("writer", "generator"), "writer": ("writer",), "generator": ("generator",)}[recipe.train]
    if recipe.train == "both" and recipe.schedule == "interleaved":
        roles = ("writer",)
    named = {role: step for role, step in zip(("writer", "generator"), steps, strict=True) if role in roles}
    found: dict[str, float] = {}
    for role, step in named.items():
        found |= {
            f"{role} step: tokens written": step.written,
            f"{role} step: tokens read": step.read,
            f"{role} step: tokens of updates": step.updated,
        }
        if reading is not None:
            found[f"{role} step: seconds"] = seconds(step, recipe, ranks=gpus, reading=reading, writing=writing)
    if reading is not None:
        whole = seconds(tokens_of_run(recipe, mean), recipe, ranks=gpus, reading=reading, writing=writing)
        found["run: hours" if writing else "run: hours without sampling"] = whole / 3600
    return found


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
