"""What can be known before the first trial: whether `fit` takes all that is tried, and the data."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import yaml
from jsonargparse import Namespace

from clip_lightning.data.columns import ReadOptions
from clip_lightning.data.sources import find_source, read_source
from clip_lightning.errors import UserError
from clip_lightning.experiments.compare import settings_of
from clip_lightning.experiments.run_records import flat
from clip_lightning.experiments.sweeps.file import SweepFile
from clip_lightning.training.fitting import Rehearsal, check_validates, rehearse


def check(file: SweepFile, words: list[str]) -> Rehearsal:
    """Let `fit` understand every choice, and both ends of every range, before anything begins.

    Returns:
        What `fit` makes of one of the trials.

    Raises:
        SystemExit: it does not understand some, which was said.
    """
    ends = {one.label: one.ends() for one in file.parameters}
    for row in range(max(map(len, ends.values()), default=1)):
        drawn = {label: values[min(row, len(values) - 1)] for label, values in ends.items()}
        rehearsal = rehearse([*words, *file.words(drawn)])
        check_validates(rehearsal.config["fit"])
    return rehearsal


def base_point(file: SweepFile, words: list[str]) -> dict[str, Any] | None:
    """What to draw so that a trial is what the words are without the search; None if that cannot be drawn."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            config = rehearse([*words, *file.words({})]).config["fit"]
    except SystemExit:  # they are not complete without the parameters
        return None
    try:
        return {one.label: one.drawn(_option(config, one.name)) for one in file.parameters}
    except LookupError:
        return None


def _option(config: Namespace, name: str) -> Any:
    """The value of an option, also of a class's argument without `init_args` in its name.

    Raises:
        LookupError: there is no such option.
    """
    value: Any = config
    for part in name.split("."):
        if isinstance(value, Namespace) and part not in value and "init_args" in value:
            value = value["init_args"]
        if not isinstance(value, Namespace) or part not in value:
            raise LookupError(name)
        value = value[part]
    return value


def shared_settings(file: SweepFile, trial: Rehearsal) -> dict[str, Any]:
    """What all trials have in common with this one, and the data, which is read to see whether it can be."""
    config = trial.config["fit"]
    varied = {one.name.replace(".init_args", "") for one in file.parameters}
    options = settings_of(flat(yaml.safe_load(trial.config_to_save)))
    options |= {f"model.{kind}_tower": config.model[f"{kind}_tower"] for kind in ("image", "text")}
    shared = {
        name: value
        for name, value in options.items()
        if name.replace(".init_args", "") not in varied and not name.startswith("trainer.callbacks")
    }
    return shared | {"data": _data_digest(config.data)}


def _data_digest(options: Namespace) -> str:
    read = ReadOptions(**options.read)
    source = find_source(options.root, scenes=options.dataset == "scenes", read=read)
    source.fetch()
    return read_source(source, options.dataset, read).digest()


def wanted_trials(file: SweepFile, given: int | None) -> int:
    """How many trials are to finish: as given, as the file says, or all points of a grid.

    Raises:
        UserError: nothing says it.
    """
    wanted = given or file.run_cap
    if file.method == "grid":
        points = 1
        for one in file.parameters:
            points *= len(one.every())
        return min(points, wanted or points)
    if wanted is None:
        raise UserError(f"--trials N: how many? Method {file.method} has no end, and the file has no run_cap")
    return wanted
