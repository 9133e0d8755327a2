"""The figure: preference accuracy against the length of what the generator was told."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from popi.errors import MissingExtra, PopiError
from popi.evaluation.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_accuracy(results: Results, path: Path) -> None:
    """Draws every cell as a point with its interval, a colour for each generator.

    Raises:
        MissingExtra: If matplotlib is not installed.
        PopiError: If the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtra("matplotlib", "bench") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    columns = list(dict.fromkeys(cell.column for cell in results.cells))
    for place, column in enumerate(columns):
        cells = [cell for cell in results.cells if cell.column == column]
        x, y = [cell.context_tokens for cell in cells], [100 * cell.accuracy.value for cell in cells]
        reach = [
            [100 * (cell.accuracy.value - cell.accuracy.low) for cell in cells],
            [100 * (cell.accuracy.high - cell.accuracy.value) for cell in cells],
        ]
        axes.errorbar(x, y, yerr=reach, fmt="os^Dv"[place % 5], capsize=3, label=column, color=f"C{place}")
        for cell, across, up in zip(cells, x, y, strict=True):
            axes.annotate(cell.row, (across, up), textcoords="offset points", xytext=(6, 4), fontsize=7)
    for control in results.controls:
        if control.column is None:
            axes.axhline(100 * control.accuracy.value, linestyle="--", linewidth=0.8, color="grey")
            axes.annotate(control.name, (0, 100 * control.accuracy.value), fontsize=7, color="grey")
    axes.axhline(50, linewidth=0.8, color="black")
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xlim(left=0)
    axes.set_xlabel("context tokens, mean")
    axes.set_ylabel("preference accuracy, %")
    axes.legend(loc="lower right")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """Writes the picture whole or not at all."""
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(drawn.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        raise PopiError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
    finally:
        temporary.unlink(missing_ok=True)
