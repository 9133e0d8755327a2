"""The model card of a mini model: how it was trained, and its results at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from popi.config import Dilution, PretrainRecipe
from popi.errors import InputError
from popi.io import read_json_lines

_CARD = """\
---
license: apache-2.0
library_name: transformers
---
# {name}

A causal language model with {parameters:,} parameters, trained from scratch on popi's mini world. It is a
**miniature**: it lets every part of popi run for real on a laptop, and it knows nothing beyond that world.

| | |
|---|---|
| command | `popi train {recipe}` |
| phase | `{phase}`, the last of {phases} |
| seed | {seed} |
| steps, tokens | {steps:,} and {tokens:,} |
| time in training steps | {minutes:.0f} minutes |
| finished | {finished} |
| machine | {machine[cores]} cores of {machine[processor]} (threads used: {threads}), Python {machine[python]} |
| versions | {versions} |
| prompt templates | `{template_hash}` |

Share of pairs in which it prefers the correct answer, where the two answers differ in one dimension and the summary
states a preference in it:
{following}.
{writing}"""

_WRITING = """
As a writer, on held-out users of the validation split:

| | |
|---|---|
| accuracy of a perfect reader on test pairs, under its summaries | {accuracy:.3f} |
| the same, under summaries of the evidence oracle | {accuracy_evidence:.3f} |
| precision and recall of its claims against the evidence | {precision:.3f} and {recall:.3f} |
"""

_DILUTED = """
It is a mediocre writer by design, so that training has something to improve: in the last phase it learned to write
vague claims about {blurred}, to leave out {overlooked}, and to deviate from these habits in {slip:.0%} of its claims.
"""


def model_card(recipe: PretrainRecipe, phase: str, config: dict[str, Any], metrics: Path, facts: dict[str, Any]) -> str:
    """Writes the card of the model at the end of a phase.

    Args:
        recipe: The recipe of the run.
        phase: The phase that has ended.
        config: Configuration of the run folder: versions, machine, template hash.
        metrics: The metrics file. Its last line contains the results at the end of the phase.
        facts: ``recipe`` (its path as given), ``parameters``, ``threads`` and ``finished``.

    Raises:
        InputError: If the metrics are damaged.
    """
    lines = [line for _, line in read_json_lines(metrics)]
    if not lines:
        raise InputError("has no metrics", file=metrics, fix="restore it, or remove the run folder to start again")
    last = lines[-1]
    names = [part.name for part in recipe.phases]
    current = recipe.phases[names.index(phase)]
    following = ", ".join(f"{name} {share:.0%}" for name, share in last["following"].items())
    return _CARD.format(
        name=recipe.name,
        phase=phase,
        phases=", ".join(f"`{name}`" for name in names[: names.index(phase) + 1]),
        seed=recipe.seed,
        steps=last["step"],
        tokens=sum(line["tokens"] for line in lines),
        minutes=sum(line["seconds"] for line in lines) / 60,
        machine=config["machine"],
        versions=", ".join(f"{name} {version}" for name, version in config["versions"].items()),
        template_hash=config["template_hash"],
        following=following,
        writing=(_WRITING.format(**last["writing"]) if "write" in current.lessons else "")
        + (_diluted(current.dilution) if current.dilution else ""),
        **facts,
    )


def _diluted(dilution: Dilution) -> str:
    blurred, overlooked = ", ".join(dilution.blurred), ", ".join(dilution.overlooked)
    return _DILUTED.format(blurred=blurred, overlooked=overlooked, slip=dilution.slip)
