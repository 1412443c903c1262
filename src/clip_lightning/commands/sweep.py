"""`clip-lightning sweep`: searches hyperparameters with Optuna, as a W&B sweep file describes."""

from __future__ import annotations

import inspect

from clip_lightning.arguments import Parser, own_words
from clip_lightning.errors import UserError

FILE = "a W&B sweep file, or the name of a packaged one: heads, backbones, finetune"


def run(args: list[str]) -> None:
    """Run `sweep` with the arguments of the command line."""
    own, files, arguments = split_arguments(args[1:])
    parser = Parser(
        prog="clip-lightning sweep",
        description=(inspect.getdoc(sweep) or "").partition("\n\nArgs")[0],
        usage="%(prog)s FILE [options] [options of fit]",
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help=FILE)
    parser.add_function_arguments(sweep, as_group=False, skip={"file", "arguments"})
    given = vars(parser.parse_args([*files, *own]))
    if given["file"] is None:
        raise UserError(f"FILE is missing: give {FILE}")
    sweep(arguments=arguments, **given)


def sweep(
    file: str,
    arguments: list[str],
    trials: int | None = None,
    parallel: int = 1,
    study: str | None = None,
    storage: str | None = None,
    json: bool = False,
) -> None:
    """Search hyperparameters as a W&B sweep file describes; any option of `fit` is passed to every trial.

    Optuna chooses what to try, without a server. The same command again resumes the search. To let W&B's
    server choose, give the same file to `wandb sweep` and `wandb agent`. `clip-lightning fit --help` lists
    the options of `fit`.

    Args:
        file: a W&B sweep file, or the name of a packaged one.
        arguments: options of `fit`.
        trials: how many finished trials the search is to have; by default the file's run_cap, or all points
            of a finite search space.
        parallel: number of worker processes on this machine.
        study: name of the study; by default the file's `name`, or the name of the file itself.
        storage: URL of a database, for workers on several machines; by default a SQLite file in the
            study's folder.
        json: print one JSON object instead.
    """
    for name, value in (("trials", trials), ("parallel", parallel)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: expected 1 or more")
    from clip_lightning.experiments.sweeps.file import read_sweep
    from clip_lightning.experiments.sweeps.run import search

    search(read_sweep(file), arguments, trials, parallel, study, storage, json)


def split_arguments(args: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Return the options of `sweep`, the files, and the arguments of `fit`, whose options take a value."""
    own_names = inspect.signature(sweep).parameters.keys() - {"file", "arguments"}
    own, others = own_words(args, sorted(own_names))
    files: list[str] = []
    arguments: list[str] = []
    for before, argument in zip(["", *others], others, strict=False):
        is_value = before.startswith("-") and "=" not in before
        (arguments if argument.startswith("-") or is_value else files).append(argument)
    return own, files, arguments
