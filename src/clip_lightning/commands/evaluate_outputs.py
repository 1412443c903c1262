"""Where the results of `evaluate` go: the terminal, a folder, W&B."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clip_lightning.commands.evaluate_inputs import say

if TYPE_CHECKING:
    from clip_lightning.reports.class_report import ClassReport
    from clip_lightning.reports.tables import Row


def finish(
    rows: Sequence[Row],
    out: Path | None,
    json: bool,
    wandb: str | None,
    reports: Sequence[ClassReport] = (),
) -> None:
    """Write, print and track the rows.

    Args:
        rows: one for each model and data set.
        out: folder for tables; none without it.
        json: print JSON.
        wandb: project that gets a run for each row; none without it.
        reports: of classes, one for each row; none for other evaluations.
    """
    from clip_lightning.reports.tables import print_results, write_results

    if out is not None:
        write_results(rows, out)
        say(f"results: {out}")
    print_results(rows, as_json=json)  # before W&B, which may refuse them
    if wandb is not None:
        from clip_lightning.tracking.evaluations import track_evaluation

        for number, row in enumerate(rows):
            report = reports[number] if reports else None
            say(f"W&B run: {track_evaluation(wandb, row, out or Path('runs'), report)}")


def slug(place: str) -> str:
    """A name for a folder."""
    return "".join(mark if mark.isalnum() else "-" for mark in place).strip("-")[-40:]
