"""Draws the metrics of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from popi import registry
from popi.io import write_bytes

PANELS = {
    "reward, nats": ("reward",),
    "accuracy": ("rewards/accuracies", "held_out.accuracy"),
    "held-out margin h, nats": ("held_out.margin",),
    "KL from the initial writer, nats per token": ("kl",),
    "entropy, nats per token": ("entropy",),
    "tokens per summary": ("completions/mean_length", "held_out.summary_tokens"),
    "summaries without a claim": ("summaries/not_enough_evidence", "held_out.not_enough_evidence"),
    "loss of the generator, nats": ("generator/loss",),
    "seconds per step": ("seconds/rollout", "seconds/scoring", "seconds/update"),
}
"""The metrics of each panel, by title. A dot selects a nested value."""

SMOOTH = 10
"""Number of steps over which a training curve is averaged."""


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draws the metrics of a run: points for steps, lines for running means, circles for held-out users.

    Args:
        metrics: The metrics file.
        picture: The PNG file to write.

    Raises:
        MissingExtra: If matplotlib is not installed.
        PopiError: If the file cannot be written.
    """
    make_figure = registry.load("matplotlib.figure:Figure")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure = make_figure(figsize=(13, 10), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(3, 3).flat, PANELS.items(), strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        for place, name in enumerate(names):
            points = [(line["step"], value) for line in lines if (value := _value(line, name)) is not None]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            if name.startswith("held_out"):
                axes.plot(steps, values, "o-", color=f"C{place}", markersize=3, label="held-out users")
            else:
                axes.plot(steps, values, ".", color=f"C{place}", alpha=0.25, markersize=3)
                axes.plot(steps, running_mean(values, SMOOTH), color=f"C{place}", label=name)
        if axes.lines:
            axes.legend(fontsize=7)
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    write_bytes(picture, drawn.getvalue())


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and those before it, at most ``width`` values."""
    means = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - width) : end]
        means.append(sum(window) / len(window))
    return means


def _value(line: dict[str, Any], name: str) -> float | None:
    found: Any = line
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, int | float) else None
