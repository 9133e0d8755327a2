"""The figure: preference accuracy against the length of the interface."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from popi import registry
from popi.evaluation.results import PERFECT, Results
from popi.io import write_bytes

MARKERS = "os^Dv<>Pp*"


def draw_accuracy(results: Results, path: Path) -> None:
    """Draws every accuracy as a point with its confidence interval. Rows differ in color, generators in shape.

    Raises:
        MissingExtra: If matplotlib is not installed.
        PopiError: If the file cannot be written.
    """
    figure = registry.load("matplotlib.figure:Figure")(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    rows = list(dict.fromkeys(cell.row for cell in results.cells))
    drawn = [cell for cell in results.cells if cell.accuracy is not None and cell.context_tokens is not None]
    columns = list(dict.fromkeys(cell.column for cell in drawn))
    color = {row: f"C{place}" for place, row in enumerate(rows)}
    marker = {column: MARKERS[place % len(MARKERS)] for place, column in enumerate(columns)}
    for cell in drawn:
        assert cell.accuracy is not None and cell.context_tokens is not None
        value, low, high = (100 * part for part in (cell.accuracy.value, cell.accuracy.low, cell.accuracy.high))
        axes.errorbar(
            cell.context_tokens,
            value,
            yerr=[[value - low], [high - value]],
            marker=marker[cell.column],
            color=color[cell.row],
            capsize=3,
            linestyle="none",
        )
    levels = {"chance": 50.0, **{c.name: 100 * c.accuracy.value for c in results.controls if c.name == PERFECT}}
    for name, level in levels.items():
        axes.axhline(level, linestyle="--", linewidth=0.8, color="grey", zorder=0)
        axes.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xlim(-1, 2 * max([10.0, *(cell.context_tokens or 0.0 for cell in results.cells)]))
    axes.set_xlabel("context tokens, mean")
    axes.set_ylabel("preference accuracy, %")
    points = [axes.plot([], [], marker="o", linestyle="none", color=color[row], label=row)[0] for row in rows]
    figure.legend(handles=points, title="row", loc="outside right upper")
    shapes = [
        axes.plot([], [], marker=marker[column], linestyle="none", color="black", label=column)[0] for column in columns
    ]
    axes.legend(handles=shapes, title="generator")
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_bytes(path, picture.getvalue())
