"""`sweep` before the first trial: the sweep file, its parameters, the command's arguments, and the draws."""

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hypothesis import given as drawn_from
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution

from clip_lightning.errors import UserError
from clip_lightning.experiments.sweep import base_point
from clip_lightning.experiments.sweep_file import Parameter, SweepFile, UntriedSampler, argument, read_sweep
from clip_lightning.training.cli import rehearse

SWEEPS = sorted((Path(__file__).resolve().parents[2] / "configs" / "sweeps").glob("*.yaml"))
LR, DROPOUT = "model.optimizer.lr", "model.heads.dropout"
MINIMAL: dict[str, Any] = {"method": "random", "parameters": {LR: {"min": 0.1, "max": 0.2}}}


def log(low: float, high: float) -> FloatDistribution:
    return FloatDistribution(low, high, log=True)


def choices(*values: Any) -> CategoricalDistribution:
    return CategoricalDistribution(values)


def spec(kind: str, low: Any, high: Any, **more: Any) -> dict[str, Any]:
    return {"distribution": kind, "min": low, "max": high, **more}


# spec, what Optuna draws from, the values if there are finitely many
KINDS: dict[str, tuple[dict[str, Any], Any, list[Any] | None]] = {
    "values": ({"values": [1, "a", None]}, choices(1, "a", None), [1, "a", None]),
    "lists": ({"values": [[1, 2], {"a": 1}]}, choices("[1, 2]", '{"a": 1}'), ["[1, 2]", '{"a": 1}']),
    "probabilities": ({"values": [1, 2, 3], "probabilities": [0.5, 0, 0.5]}, choices(1, 3), [1, 3]),
    "categorical": ({"distribution": "categorical", "values": [1]}, choices(1), [1]),
    "whole bounds": ({"min": 2, "max": 5}, FloatDistribution(2, 5, step=1), [2, 3, 4, 5]),
    "a bound with a point": ({"min": 2, "max": 5.0}, FloatDistribution(2, 5), None),
    "int_uniform": (spec("int_uniform", -1, 1), FloatDistribution(-1, 1, step=1), [-1, 0, 1]),
    "every seed": ({"min": 0, "max": 2**32}, FloatDistribution(0, 2**32, step=1), None),
    "uniform": (spec("uniform", 0, 1), FloatDistribution(0, 1), None),
    "q_uniform": (spec("q_uniform", 30, 70, q=16), FloatDistribution(30, 70), [32, 48, 64]),
    "q_uniform without q": (spec("q_uniform", 0, 2), FloatDistribution(0, 2), [0, 1, 2]),
    "q_uniform by parts": (spec("q_uniform", 0, 0.3, q=0.1), FloatDistribution(0, 0.3), [0, 0.1, 0.2, 0.3]),
    "log_uniform": (spec("log_uniform", -2, 1), log(math.exp(-2), math.e), None),
    "inv_log_uniform": (spec("inv_log_uniform", -1, 2), log(math.exp(-2), math.e), None),
    "log_uniform_values": (spec("log_uniform_values", 1e-4, 0.1), log(1e-4, 0.1), None),
    "inv_log_uniform_values": (spec("inv_log_uniform_values", 1e-4, 0.1), log(1e-4, 0.1), None),
    "q_log_uniform_values": (spec("q_log_uniform_values", 30, 50, q=8), log(30, 50), [32, 40, 48]),
    "q_log_uniform": (spec("q_log_uniform", 0, 1.2), log(1, math.exp(1.2)), [1, 2, 3]),
}


@pytest.mark.parametrize(("given", "distribution", "values"), KINDS.values(), ids=KINDS)
def test_a_parameter_becomes_a_distribution(given: dict[str, Any], distribution: Any, values: Any) -> None:
    one = Parameter(**given)
    assert one.space == distribution
    assert (one.every and [one.value(drawn) for drawn in one.every]) == values


@drawn_from(st.sampled_from([*KINDS]), st.integers(0, 2**32 - 1))
def test_drawn_inverts_value(name: str, seed: int) -> None:
    one = Parameter(**KINDS[name][0])
    drawn = one.suggest("x", optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask())
    value = one.value(drawn)
    assert one.space._contains(one.space.to_internal_repr(one.drawn(value)))
    assert one.value(one.drawn(value)) == value
    assert one.every is None or value in map(one.value, one.every)
    assert isinstance(value, float | str) or yaml.safe_load(argument(value)) == value


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"values": [1, 2]}, None),
        ({"min": 0.0, "max": 1}, 2),
        *(({"min": 0, "max": 3}, x) for x in (4, 0.5, "x")),
    ],
)
def test_values_outside_the_space_are_rejected(given: dict[str, Any], value: Any) -> None:
    with pytest.raises(LookupError):
        Parameter(**given).drawn(value)


def sweep_file(folder: Path, content: Any) -> SweepFile:
    file = folder / "x.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return read_sweep(str(file))


def test_a_file_with_everything(tmp_path: Path) -> None:
    content = {
        "name": "mine",
        "method": "bayes",
        "metric": {"name": "val/image_to_text_mean_rank", "goal": "minimize"},
        "early_terminate": {"type": "hyperband", "max_iter": 27, "s": 2, "strict": True},
        "run_cap": 7,
        "program": "clip-lightning",
        "description": None,
        "command": ["${env}", "clip-lightning", "fit", "--config", "heads", "${args}", "--data.views", 1],
        "parameters": {
            "model": {"parameters": {"optimizer": {"parameters": {"lr": {"values": [0.1, 0.2]}}}}},
            DROPOUT: {"value": 0.5},
            "model.towers.compile": {"distribution": "constant", "value": False},
        },
    }
    file = sweep_file(tmp_path, content)
    assert (file.name, file.method, file.run_cap, file.points) == ("mine", "bayes", 7, 2)
    assert (file.metric.name, file.maximize) == ("val/image_to_text_mean_rank", False)
    assert file.halving == (3, 3)
    assert file.base == ["--config", "heads", "--data.views", "1"]
    assert file.arguments({LR: 0.2}) == [
        "--model.heads.dropout=0.5",
        "--model.towers.compile=false",
        f"--{LR}=0.2",
    ]


def varying(**spec: Any) -> dict[str, Any]:
    return {"method": "random", "parameters": {LR: spec}}


PROBABLE = {"values": [1, 2], "probabilities": [0.1, 0.9]}
WRONG: dict[str, tuple[Any, str]] = {
    "no YAML": ("a: [", "is not valid YAML"),
    "no method": ({"parameters": MINIMAL["parameters"]}, "missing: method"),
    "another method": (MINIMAL | {"method": "bayse"}, "method: expected grid or random or bayes, got bayse"),
    "another key": (MINIMAL | {"early_stop": 1}, "'early_stop'"),
    "nothing": (varying(), "expected `value`, `values`, or `min` and `max`"),
    "normal": (varying(distribution="normal", mu=0), f"{LR}.distribution: .* q_uniform .*, got normal"),
    "upside down": (varying(min=2, max=1), f"parameters.{LR}: .*2"),
    "no number": (varying(min="low", max=1), f"parameters.{LR}: min: expected a number, got 'low'"),
    "no step": (varying(min=0, max=1, q=0), f"parameters.{LR}: q: expected a number above 0, got 0"),
    "log of 0": (varying(**spec("log_uniform_values", 0, 1)), "optimizer.lr: .*> 0"),
    "parts of whole numbers": (varying(**spec("int_uniform", 0.5, 1)), "requires whole numbers"),
    "a range as logarithms": (varying(**spec("log_uniform", 1, 1000)), f"parameters.{LR}: math range"),
    "two probabilities of three": (varying(values=[1, 2, 3], probabilities=[0.5, 0.5]), "add up to 1"),
    "another metric": (MINIMAL | {"metric": {"name": "rsum"}}, "metric.name: expected one of val/rsum, "),
    "an infinite grid": (MINIMAL | {"method": "grid"}, "a grid requires `values`"),
    "weights": ({"method": "bayes", "parameters": {LR: PROBABLE}}, "probabilities require method random"),
    "no fit": (MINIMAL | {"command": ["python", "train.py", "${args}"]}, "command: expected `fit`"),
    "no iteration": (MINIMAL | {"early_terminate": {"type": "hyperband"}}, "expected min_iter, or max_iter"),
    "no count": (MINIMAL | {"run_cap": -1}, "run_cap: .*-1"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_invalid_files(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"x\.yaml: .*{message}"):
        sweep_file(tmp_path, content)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_shipped_files(path: Path, tmp_path: Path) -> None:
    """Each says how to run it, all that it tries is understood, and its recipe is within its ranges."""
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert f"clip-lightning sweep {path.stem}" in next(line for line in comments if "command:" in line)
    assert [word for word in ("hardware:", "time:", "score:") if word not in "".join(comments)] == []
    file = read_sweep(path.stem)
    arguments = [*file.base, "--data.root", str(tmp_path), f"--trainer.default_root_dir={tmp_path}"]
    for drawn in ({name: one.ends()[end] for name, one in file.varied.items()} for end in (0, -1)):
        config = yaml.safe_load(rehearse([*arguments, *file.arguments(drawn)]).config_to_save)
        assert config["data"]["root"] == str(tmp_path)
    point = base_point(file, arguments)
    assert point is not None
    assert rehearse([*arguments, *file.arguments(point)]).config_to_save == rehearse(arguments).config_to_save


def draws(file: SweepFile, count: int, study: optuna.Study | None = None) -> list[dict[str, Any]]:
    """What the next trials of a study draw; the better, the smaller the first parameter is."""
    study = study or optuna.create_study(study_name="s")
    study.sampler = UntriedSampler(file)

    def objective(trial: optuna.Trial) -> float:
        return float([one.suggest(name, trial) for name, one in file.varied.items()][0])  # noqa: RUF015, all are drawn

    study.optimize(objective, n_trials=count)
    return [file.values(trial.params) for trial in study.trials]


MIXED = {"a": {"min": 0.0, "max": 1.0}, "b": {"values": ["x", "y", "z"]}, "c": {"values": [1]}}


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_a_resumed_study_draws_what_it_would_have_drawn(method: str, tmp_path: Path) -> None:
    file = sweep_file(tmp_path, {"method": method, "parameters": MIXED})
    straight = draws(file, 20)
    study = optuna.create_study(study_name="s")
    assert [draws(file, count, study) for count in (5, 11, 4)][-1] == straight
    assert len({repr(params) for params in straight}) == 20
    assert draws(file, 2, optuna.create_study(study_name="t")) != straight[:2]
    assert min(each["a"] for each in straight) > 0 or method == "random"
    if method == "bayes":
        mean = [sum(each["a"] for each in part) / 10 for part in (straight[:10], straight[10:])]
        assert mean[1] < mean[0] / 2, "TPE has learnt where it is good"


@pytest.mark.parametrize("method", ["grid", "random", "bayes"])
def test_a_finite_space_is_drawn_without_repetition(method: str, tmp_path: Path) -> None:
    parameters = {"a": {"min": 1, "max": 3}, "b": {"values": ["x", "y"]}, "c": {"value": 1}}
    file = sweep_file(tmp_path, {"method": method, "parameters": parameters})
    study = optuna.create_study(study_name="s")
    drawn = [tuple(values.values()) for count in (1, 3, 2) for values in draws(file, count, study)[-count:]]
    grid = [(a, b) for a in (1, 2, 3) for b in "xy"]
    assert (drawn if method == "grid" else sorted(drawn)) == grid
    assert (drawn == grid) is (method == "grid")


def test_random_choices_have_their_probabilities(tmp_path: Path) -> None:
    likely = [0, 0.25, 0.7499995]  # the sum of rounded numbers is not exactly 1
    parameters = {"a": MIXED["a"], "b": {"values": ["x", "y", "z"], "probabilities": likely}}
    file = sweep_file(tmp_path, {**MINIMAL, "parameters": parameters})
    drawn = [values["b"] for values in draws(file, 200)]
    assert "x" not in drawn
    assert 120 < drawn.count("z") < 180
