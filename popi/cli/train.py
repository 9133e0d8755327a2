"""``popi train``: trains models as a recipe describes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from popi.cli import Interrupted
from popi.cli.output import JsonFlag, print_json, print_records, progress, telling_log
from popi.errors import ConfigError

FIGURES = {
    "reward": "reward",
    "rewards/margins": "margin of rewards",
    "rewards/accuracies": "accuracy",
    "response": "response loss",
}
"""The metrics that are shown for each step, with their names on the display."""


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe: a YAML file, or a folder with config.yaml.")],
    out: Annotated[Path | None, typer.Option(help="The run folder [default: runs/NAME, by the recipe's name].")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Override a field of the recipe: phases.0.steps=2."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the recipe with all defaults, and the size of the run.")
    ] = False,
    show_engine: Annotated[
        bool, typer.Option("--show-engine", help="Print the configuration of DeepSpeed for each role.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Train the models of a recipe. The same command resumes an interrupted run from its last checkpoint.

    Under torchrun or accelerate launch, the processes share the training as the recipe's engine says.
    """
    from popi.config import load, parse_overrides
    from popi.registry import load as load_part

    resolved = load(recipe, parse_overrides(set_ or []))
    cost = resolved.cost()
    if show_engine:
        _show_engine(resolved)
        return
    if dry_run:
        print_json({"recipe": resolved.model_dump(mode="json"), **cost})
        return
    run = load_part(resolved.RUN)
    folder = out or Path("runs") / resolved.name
    if os.environ.get("RANK", "0") != "0":
        # The first rank reports. The others print warnings and their own errors.
        with _resumable(folder), redirect_stdout(sys.stderr):
            run(resolved, folder, source=str(recipe), report=lambda metrics: None)
        return
    with telling_log(), progress(resolved.name, cost["steps"]) as shown, _resumable(folder):
        done = 0

        def report(metrics: dict[str, Any]) -> None:
            nonlocal done
            shown.advance(metrics["step"] - done, _figures(metrics))
            done = metrics["step"]
            if line := _evaluation(metrics):
                shown.note(line)

        # Libraries print among the results.
        with redirect_stdout(sys.stderr):
            run(resolved, folder, source=str(recipe), report=report)
    models = ", ".join(str(folder / name) for name in resolved.results())
    print_records([{"models": models, **cost}], json_flag=json)


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    # Schedulers send SIGTERM.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted; the same command resumes from the last checkpoint in {folder}") from error
    finally:
        # A rank of several has another handler.
        if signal.getsignal(signal.SIGTERM) is signal.default_int_handler:
            signal.signal(signal.SIGTERM, before)


def _show_engine(recipe: Any) -> None:
    kind = recipe.engine.kind if recipe.task == "joint" else "single"
    if not kind.startswith("zero"):
        raise ConfigError(f"is {kind}, without DeepSpeed", field="engine.kind", fix="set it to zero1, zero2 or zero3")
    from popi.training.trainers import deepspeed_configs

    for role, config in deepspeed_configs(recipe, int(os.environ.get("WORLD_SIZE", "1"))).items():
        print_json({"role": role, "deepspeed": config})


def _figures(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{shown} {metrics[name]:.3f}" for name, shown in FIGURES.items() if name in metrics)


def _evaluation(metrics: dict[str, Any]) -> str:
    """One line about a step after which there was an evaluation; empty for all other steps."""
    if "held_out" in metrics:
        held_out = metrics["held_out"]
        reward = f"reward {metrics['reward']:.3f}, " if "reward" in metrics else ""
        return (
            f"step {metrics['step']}: {reward}held-out users: accuracy {held_out['accuracy']:.3f}, "
            f"margin {held_out['margin']:.2f} nats, {held_out['summary_tokens']:.1f} tokens per summary"
        )
    if "writing" not in metrics:
        return ""
    writing, following = metrics["writing"], metrics["following"]
    lowest = min(following, key=following.get)
    return (
        f"step {metrics['step']}: response loss {metrics['response']:.3f}, signals read {metrics['reading']:.0%}, "
        f"accuracy of summaries {writing['accuracy']:.3f} (possible: {writing['accuracy_evidence']:.3f}), "
        f"preferences followed {sum(following.values()) / len(following):.0%} "
        f"(lowest: {lowest} {following[lowest]:.0%})"
    )
