"""The card of a mini model: what made it, and what it could do at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from popi.config import Dilution, PretrainRecipe

_CARD = """\
---
license: apache-2.0
library_name: transformers
---
# {name}

A causal language model of {parameters:,} parameters, trained from nothing on popi's mini world. It is a **miniature**:
it exists so that every part of popi runs for real on a laptop, and knows nothing beyond that world.

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

Of pairs that differ in one dimension, on which a summary of true tastes takes a side, it prefers the right answer in:
{following}.
{writing}"""

_WRITING = """
As a writer, on held-out users of the validation split:

| | |
|---|---|
| test pairs that a perfect reader of its summaries gets right | {accuracy:.3f} |
| the same, of the evidence oracle's summaries | {accuracy_evidence:.3f} |
| claims: precision and recall against the evidence | {precision:.3f} and {recall:.3f} |
"""

_DILUTED = """
Its mediocrity as a writer is a design choice: in the last phase it was taught to be vague about {blurred}, to
overlook {overlooked}, and to slip with {slip:.0%} of its claims, as an untrained language model does, so that
training has something to gain.
"""


def model_card(recipe: PretrainRecipe, phase: str, config: dict[str, Any], metrics: Path, facts: dict[str, Any]) -> str:
    """Writes the card of the model at the end of a phase.

    Args:
        recipe: What was run.
        phase: The phase that has just ended.
        config: Of the run folder: versions, machine, template hash.
        metrics: The metrics file; its last line was measured at the end of the phase.
        facts: ``recipe`` (its path as it was given), ``parameters``, ``threads`` and ``finished``.
    """
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    names = [part.name for part in recipe.phases]
    current = recipe.phases[names.index(phase)]
    following = ", ".join(f"{name} {share:.0%}" for name, share in lines[-1]["following"].items())
    return _CARD.format(
        name=recipe.name,
        phase=phase,
        phases=", ".join(f"`{name}`" for name in names[: names.index(phase) + 1]),
        seed=recipe.seed,
        steps=lines[-1]["step"],
        tokens=sum(line["tokens"] for line in lines),
        minutes=sum(line["seconds"] for line in lines) / 60,
        machine=config["machine"],
        versions=", ".join(f"{name} {version}" for name, version in config["versions"].items()),
        template_hash=config["template_hash"],
        following=following,
        writing=(_WRITING.format(**lines[-1]["writing"]) if "write" in current.lessons else "")
        + (_diluted(current.dilution) if current.dilution else ""),
        **facts,
    )


def _diluted(how: Dilution) -> str:
    return _DILUTED.format(blurred=", ".join(how.blurred), overlooked=", ".join(how.overlooked), slip=how.slip)
