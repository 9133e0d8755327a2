"""``popi train``: run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from popi.cli.output import JsonFlag, note, print_json, print_records, progress


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe: a YAML file, or a folder with a config.yaml.")],
    out: Annotated[Path | None, typer.Option(help="The run folder [default: runs/NAME of the recipe].")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Replace a value: phases.0.steps=2.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and what it costs.")] = False,
    json: JsonFlag = False,
) -> None:
    """Train what a recipe says, or go on where the same command was stopped."""
    from popi.config import load, parse_overrides

    resolved = load(recipe, parse_overrides(set_ or []))
    steps = sum(phase.steps for phase in resolved.phases)
    lessons = sum(phase.steps * sum(phase.lessons.values()) for phase in resolved.phases)
    if dry_run:
        print_json({"recipe": resolved.model_dump(mode="json"), "steps": steps, "lessons": lessons})
        return
    from popi.registry import load as load_part

    run = load_part("popi.training.pretrain:run")
    folder = out or Path("runs") / resolved.name
    with progress(resolved.name, steps) as shown:
        done = 0

        def report(measured: dict[str, Any]) -> None:
            nonlocal done
            shown.advance(measured["step"] - done)
            done = measured["step"]
            if "writing" in measured:
                shown.note(_look(measured))

        try:
            run(resolved, folder, source=str(recipe), report=report)
        except KeyboardInterrupt:
            note(f"stopped at step {done}; the same command goes on from the last checkpoint in {folder}")
            raise
    result = {"model": str(folder / resolved.phases[-1].name), "steps": steps, "lessons": lessons}
    print_records([result], json_flag=json)


def _look(measured: dict[str, Any]) -> str:
    writing, following = measured["writing"], measured["following"]
    weakest = min(following, key=following.get)
    return (
        f"step {measured['step']}: response loss {measured['response']:.3f}, signals read {measured['reading']:.0%}, "
        f"summaries {writing['accuracy']:.3f} of {writing['accuracy_evidence']:.3f}, "
        f"followed {sum(following.values()) / len(following):.0%}, least {weakest} {following[weakest]:.0%}"
    )
