"""``popi train``: run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from popi.cli.output import JsonFlag, note, print_json, print_records, progress, telling_log


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
    from popi.registry import load as load_part

    resolved = load(recipe, parse_overrides(set_ or []))
    cost = resolved.cost()
    if dry_run:
        print_json({"recipe": resolved.model_dump(mode="json"), **cost})
        return
    run = load_part(resolved.RUN)
    folder = out or Path("runs") / resolved.name
    with telling_log(), progress(resolved.name, cost["steps"]) as shown:
        done = 0

        def report(measured: dict[str, Any]) -> None:
            nonlocal done
            shown.advance(measured["step"] - done, _figures(measured))
            done = measured["step"]
            if line := _look(measured):
                shown.note(line)

        try:
            run(resolved, folder, source=str(recipe), report=report)
        except KeyboardInterrupt:
            note(f"stopped at step {done}; the same command goes on from the last checkpoint in {folder}")
            raise
    models = ", ".join(str(folder / name) for name in resolved.results())
    print_records([{"models": models, **cost}], json_flag=json)


def _figures(measured: dict[str, Any]) -> str:
    """What is shown of every step."""
    names = {"reward": "reward", "accuracy": "accuracy", "response": "response loss"}
    return ", ".join(f"{text} {measured[name]:.3f}" for name, text in names.items() if name in measured)


def _look(measured: dict[str, Any]) -> str:
    """A line on a step at which held-out users were looked at, else nothing."""
    if "held_out" in measured:
        held_out = measured["held_out"]
        reward = f"reward {measured['reward']:.3f}, " if "reward" in measured else ""
        return (
            f"step {measured['step']}: {reward}held-out users: accuracy {held_out['accuracy']:.3f}, "
            f"margin {held_out['margin']:.2f} nats, {held_out['summary_tokens']:.1f} tokens a summary"
        )
    if "writing" not in measured:
        return ""
    writing, following = measured["writing"], measured["following"]
    weakest = min(following, key=following.get)
    return (
        f"step {measured['step']}: response loss {measured['response']:.3f}, signals read {measured['reading']:.0%}, "
        f"summaries {writing['accuracy']:.3f} of {writing['accuracy_evidence']:.3f}, "
        f"followed {sum(following.values()) / len(following):.0%}, least {weakest} {following[weakest]:.0%}"
    )
