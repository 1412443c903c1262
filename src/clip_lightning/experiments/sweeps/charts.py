"""Optuna's own pictures of a study, as PNG."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from clip_lightning.experiments.sweeps.file import SweepFile
from clip_lightning.experiments.sweeps.space import Parameter
from clip_lightning.files import write_atomically


def draw(file: SweepFile, study: optuna.Study, folder: Path) -> None:
    """Write `history.png`, `importance.png` and `parallel.png`, as far as so many trials give them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    shown = _with_short_names(file, study)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    name = file.metric.removeprefix("val/")
    drawings: dict[str, Callable[[], Any]] = {
        "history": lambda: plots.plot_optimization_history(shown, target_name=name),
        "importance": lambda: plots.plot_param_importances(shown, evaluator=evaluator, target_name=name),
        "parallel": lambda: plots.plot_parallel_coordinate(shown, target_name=name),
    }
    for drawing, make in drawings.items():
        path = folder / f"{drawing}.png"
        path.unlink(missing_ok=True)
        if len(shown.trials) < 2:
            continue
        with warnings.catch_warnings(), matplotlib.rc_context():
            warnings.simplefilter("ignore")  # the drawing is experimental, says Optuna
            try:
                make()
                picture = io.BytesIO()
                pyplot.gcf().set_size_inches(10, 6)
                pyplot.savefig(picture, format="png", dpi=120, bbox_inches="tight")
                write_atomically(path, picture.getvalue())
            except (ValueError, RuntimeError) as error:  # all trials alike
                print(f"no {path.name}: {error}", file=sys.stderr)
            finally:
                pyplot.close("all")


def _with_short_names(file: SweepFile, study: optuna.Study) -> optuna.Study:
    """The finished trials, with the last part of each option's name and the option's own values.

    Those that were stopped early have the value that they had reached: most trials are of this kind, and
    Optuna draws only whole ones.
    """
    short = {one.label: file.short_names()[one.name] for one in file.parameters}
    copy = optuna.create_study(study_name=study.study_name, direction=study.direction)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        value = trial.user_attrs.get("best", trial.value)
        if value is None:
            continue
        drawn = [one for one in file.parameters if one.label in trial.params]
        copy.add_trial(
            create_trial(
                value=value,
                params={short[one.label]: one.value(trial.params[one.label]) for one in drawn},
                distributions={short[one.label]: _of_values(one) for one in drawn},
            )
        )
    return copy


def _of_values(parameter: Parameter) -> BaseDistribution:
    """What the option's values are distributed like."""
    found, quantum = parameter.distribution, parameter.quantum
    if quantum is None or not isinstance(found, IntDistribution):
        return found
    low, high = parameter.value(found.low), parameter.value(found.high)
    if isinstance(quantum, int):
        return IntDistribution(low, high, log=True)
    return FloatDistribution(low, high, log=True)
