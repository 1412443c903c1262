"""`clip-lightning sweep`: one sweep file, two engines, W&B's agents or Optuna."""

from __future__ import annotations

import itertools

from clip_lightning.arguments import run_functions

OWN = ("--trials", "--parallel", "--study", "--storage", "--sweep_id")
"""Options of the command itself that take a value; all others are those of `fit`."""


def run(args: list[str]) -> None:
    """Run `sweep` with the words of the command line."""
    own, words = split_words(args[1:])

    def sweep(
        file: str,
        trials: int | None = None,
        parallel: int = 1,
        study: str | None = None,
        storage: str | None = None,
        sweep_id: str | None = None,
        json: bool = False,
    ) -> None:
        """Search hyperparameters as a W&B sweep file says; any option of `fit` is handed to every trial.

        With an API key, the sweep is made on W&B's server and agents work here; without one, or with
        --trainer.logger.offline true, Optuna does the same. The same command again goes on with the study.

        Args:
            file: a W&B sweep file, or the name of a packaged one: heads, backbones, finetune.
            trials: how many finished trials the study is to have; by default the file's run_cap, or the
                whole grid.
            parallel: worker processes on this machine.
            study: name of the study; by default the file's `name`, or its own.
            storage: URL of a database, for workers on several machines; by default a SQLite file in the
                study's folder.
            sweep_id: ENTITY/PROJECT/ID of a sweep on W&B's server to join.
            json: print one JSON object instead.
        """
        from clip_lightning.tuning.command import Options, search

        search(Options(file, tuple(words), trials, parallel, study, storage, sweep_id, json))

    run_functions(sweep, ["sweep", *own], positional=True)


def split_words(args: list[str]) -> tuple[list[str], list[str]]:
    """The words of `sweep` itself, the file among them, and those for `fit`."""
    own: list[str] = []
    others: list[str] = []
    words = iter(args)
    for word in words:
        name, equals, _ = word.partition("=")
        if name in ("--json", "--help", "-h"):
            own.append(word)
        elif name in OWN:
            own += [word] if equals else [word, *itertools.islice(words, 1)]
        else:
            others.append(word)
    if others and not others[0].startswith("-"):
        own.append(others.pop(0))
    return own, others
