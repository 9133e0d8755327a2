"""Model cards: what made a model, and what it could do at the end."""

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

`{made_from}`, trained as the {role} of a pair under one preference objective.{miniature}

| | |
|---|---|
| command | `popi train {recipe}` |
| learned in this run | {learned}, {schedule} |
| seed | {seed} |
| steps | {steps:,} |
| tokens | {rollout:,.0f} sampled, {scoring:,.0f} read to judge, {update:,.0f} read to update |
| time in training steps | {minutes:.0f} minutes |
| finished | {finished} |
| machine | {machine[cores]} cores of {machine[processor]} (threads used: {threads}), Python {machine[python]} |
| versions | {versions} |
| prompt templates | `{template_hash}` |

At the end, on {users} held-out users: {accuracy:.1%} of their pairs decided rightly, a margin of {margin:.2f} nats,
{summary_tokens:.1f} tokens a summary.
"""

_MINIATURE = """ It is a **miniature**: what it
can do and what it scores says nothing of real users or models."""


def joint_card(recipe: JointRecipe, role: str, config: dict[str, Any], metrics: Path, facts: dict[str, Any]) -> str:
    """Writes the card of a model that a joint run trained.

    Args:
        recipe: What was run.
        role: ``writer`` or ``generator``.
        config: Of the run folder: versions, machine, template hash.
        metrics: The metrics file.
        facts: ``recipe`` (its path as it was given), ``threads`` and ``finished``.
    """
    last = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])
    took = spent(metrics)
    made_from = recipe.writer.model if role == "writer" else recipe.generator.model
    return _JOINT.format(
        name=recipe.name,
        role=role,
        made_from=made_from,
        miniature=_MINIATURE if made_from in shipped() else "",
        learned=" and ".join(recipe.results()),
        schedule="one set of weights" if recipe.shared else recipe.schedule,
        seed=recipe.seed,
        steps=last["step"],
        **{part: took.get(f"tokens/{part}", 0.0) for part in ("rollout", "scoring", "update")},
        minutes=sum(value for name, value in took.items() if name.startswith("seconds/")) / 60,
        machine=config["machine"],
        versions=", ".join(f"{name} {version}" for name, version in config["versions"].items()),
        template_hash=config["template_hash"],
        users=recipe.evaluate_users,
        **last["held_out"],
        **facts,
    )
