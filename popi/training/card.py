"""Model cards: how a model was trained, and its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from popi.config import JointRecipe
from popi.models import shipped
from popi.run_folder import spent

_JOINT = """\
---
library_name: transformers
base_model: {made_from}
---
# {name}-{role}

`{made_from}`, trained as the {role} of a writer and a generator under one preference objective.{miniature}

| | |
|---|---|
| command | `popi train {recipe}` |
| trained in this run | {trained}, {schedule} |
| seed | {seed} |
| steps | {steps:,} |
| tokens | {rollout:,.0f} sampled, {scoring:,.0f} read in scoring, {update:,.0f} read in updates |
| time in training steps | {minutes:.0f} minutes |
| finished | {finished} |
| machine | {machine[cores]} cores of {machine[processor]} (threads used: {threads}), Python {machine[python]} |
| versions | {versions} |
| prompt templates | `{template_hash}` |

Results on {users} held-out users: preference accuracy {accuracy:.1%}, margin {margin:.2f} nats,
{summary_tokens:.1f} tokens per summary.
"""

_MINIATURE = """ It is a **miniature**: its
results say nothing about real users or models."""


def joint_card(recipe: JointRecipe, role: str, config: dict[str, Any], metrics: Path, facts: dict[str, Any]) -> str:
    """Renders the card of a model of a joint run.

    Args:
        recipe: The recipe.
        role: ``writer`` or ``generator``.
        config: The configuration of the run: versions, machine.
        metrics: The metrics file.
        facts: ``recipe`` (its path), ``template_hash``, ``threads`` and ``finished``.
    """
    last = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])
    took = spent(metrics)
    made_from = recipe.writer.model if role == "writer" else recipe.generator.model
    return _JOINT.format(
        name=recipe.name,
        role=role,
        made_from=made_from,
        miniature=_MINIATURE if made_from in shipped() else "",
        trained=" and ".join(recipe.results()),
        schedule="one set of weights" if recipe.shared else recipe.schedule,
        seed=recipe.seed,
        steps=last["step"],
        **{part: took.get(f"tokens/{part}", 0.0) for part in ("rollout", "scoring", "update")},
        minutes=sum(value for name, value in took.items() if name.startswith("seconds/")) / 60,
        machine=config["machine"],
        versions=", ".join(f"{name} {version}" for name, version in config["versions"].items()),
        users=recipe.evaluate_users,
        **last["held_out"],
        **facts,
    )
