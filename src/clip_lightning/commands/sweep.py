"""`clip-lightning sweep` searches hyperparameters with Optuna, as a W&B sweep file describes."""

from __future__ import annotations

import inspect

from jsonargparse.typing import PositiveInt

from clip_lightning.arguments import Parser, own_arguments
from clip_lightning.errors import UserError

FILE = "a W&B sweep file, or the name of a packaged one: heads, backbones, finetune"


def run(args: list[str]) -> None:
    """Run `sweep` with the arguments of the command line."""
    names = inspect.signature(sweep).parameters.keys() - {"file", "arguments"}
    own, arguments = own_arguments(args[1:], sorted(names))
    usage = "%(prog)s FILE [options] [options of fit]"
    parser = Parser.of_function("sweep", sweep, skip={"file", "arguments"}, usage=usage)
    parser.add_argument("file", nargs="?", metavar="FILE", help=FILE)
    file = [arguments.pop(0)] if arguments and not arguments[0].startswith("-") else []
    given = vars(parser.parse_args([*file, *own]))
    if not file:
        raise UserError(f"FILE is missing; give it before the options of fit: {FILE}")
    sweep(arguments=arguments, **given)


def sweep(
    file: str,
    arguments: list[str],
    trials: PositiveInt | None = None,
    parallel: PositiveInt = 1,
    study: str | None = None,
    storage: str | None = None,
    json: bool = False,
) -> None:
    """Search hyperparameters as a W&B sweep file describes.

    Optuna proposes the hyperparameters, so no server is needed. If you run the same command again, the search
    resumes. To let W&B's server propose them, pass the same file to `wandb sweep` and `wandb agent`. All
    other options are passed to `fit` for every trial; `clip-lightning fit --help` lists them.

    Args:
        trials: number of finished trials after which the search ends; by default the file's run_cap, or all
            points of a finite search space.
        parallel: number of worker processes on this machine.
        study: name of the study; by default the file's `name`, or else the file name.
        storage: URL of a database, for workers on several machines; by default a SQLite file in the folder
            of the study.
        json: print one JSON object instead.
    """
    from clip_lightning.experiments.sweep import search
    from clip_lightning.experiments.sweep_file import read_sweep

    search(read_sweep(file), arguments, trials, parallel, study, storage, json)
