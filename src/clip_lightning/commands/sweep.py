"""`clip-lightning sweep`: one sweep file, two engines, W&B's agents or Optuna."""

from __future__ import annotations

import inspect

from clip_lightning.arguments import Parser, own_words
from clip_lightning.errors import UserError

FILE = "a W&B sweep file, or the name of a packaged one: heads, backbones, finetune"
USAGE = "%(prog)s FILE [options] [options of fit]"


def run(args: list[str]) -> None:
    """Run `sweep` with the words of the command line."""
    own, file, words = split_words(args[1:])
    about = (inspect.getdoc(sweep) or "").partition("\n\nArgs")[0]
    parser = Parser(prog="clip-lightning sweep", description=about, usage=USAGE)
    parser.add_argument("file", nargs="?", metavar="FILE", help=FILE)
    parser.add_function_arguments(sweep, as_group=False, skip={"file", "words"})
    given = vars(parser.parse_args([*file, *own]))
    if given["file"] is None:
        raise UserError(f"FILE is missing: give {FILE}")
    sweep(words=words, **given)


def sweep(
    file: str,
    words: list[str],
    trials: int | None = None,
    parallel: int = 1,
    study: str | None = None,
    storage: str | None = None,
    sweep_id: str | None = None,
    json: bool = False,
) -> None:
    """Search hyperparameters as a W&B sweep file says; any option of `fit` is handed to every trial.

    With an API key, the sweep is made on W&B's server and agents work here; without one, or with
    --trainer.logger.offline true, Optuna does the same. The same command again goes on with the search.
    `clip-lightning fit --help` lists the options of `fit`.

    Args:
        file: a W&B sweep file, or the name of a packaged one.
        words: options of `fit`.
        trials: how many finished trials the search is to have; by default the file's run_cap, or the whole
            grid. With --sweep_id, how many runs each process here tries; by default until there are no more.
        parallel: worker processes on this machine.
        study: name of the study; by default the file's `name`, or its own.
        storage: URL of a database, for workers on several machines; by default a SQLite file in the
            study's folder.
        sweep_id: ENTITY/PROJECT/ID of a sweep on W&B's server to join.
        json: print one JSON object instead.
    """
    from clip_lightning.experiments.sweeps.run import Options, search

    search(Options(file, tuple(words), trials, parallel, study, storage, sweep_id, json))


OWN = [name for name in inspect.signature(sweep).parameters if name not in ("file", "words")]
"""Options of the command itself; all others are those of `fit`."""


def split_words(args: list[str]) -> tuple[list[str], list[str], list[str]]:
    """The options of `sweep` itself, the file, and the words for `fit`, whose options each take a value."""
    own, others = own_words(args, OWN)
    files: list[str] = []
    words: list[str] = []
    for before, word in zip(["", *others], others, strict=False):
        is_value = before.startswith("-") and "=" not in before
        (words if word.startswith("-") or is_value else files).append(word)
    return own, files, words
