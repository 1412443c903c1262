"""`clip-lightning evaluate retrieval|zero-shot|linear-probe`: what models are worth on data."""

from __future__ import annotations

from clip_lightning.arguments import run_functions
from clip_lightning.commands.evaluate_linear_probe import linear_probe
from clip_lightning.commands.evaluate_retrieval import retrieval
from clip_lightning.commands.evaluate_zero_shot import zero_shot


def run(args: list[str]) -> None:
    """Run `evaluate` with the words of the command line."""
    commands = {"retrieval": retrieval, "zero-shot": zero_shot, "linear-probe": linear_probe}
    run_functions(commands, args, positional=True)
