"""`sweep` offline: the sweep file as Optuna sees it, trials, stopping and going on, and what is left."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from clip_lightning.__main__ import main
from clip_lightning.commands.sweep import split_words
from clip_lightning.data.scenes import write_scenes
from clip_lightning.errors import UserError
from clip_lightning.experiments.sweeps.file import Halving, read_sweep
from clip_lightning.experiments.sweeps.run import base_point
from clip_lightning.experiments.sweeps.sampler import NumberedSampler
from clip_lightning.experiments.sweeps.space import parameter, word
from clip_lightning.training.fitting import rehearse

REPOSITORY = Path(__file__).resolve().parents[2]
SWEEPS = sorted((REPOSITORY / "configs" / "sweeps").glob("*.yaml"))
LR, DROPOUT = "model.optimizer.lr", "model.dropout"

# Lightning 2.6 calls jsonargparse by names that its newest versions deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


class Touches(Callback):
    """Notes that a step has begun, then is slow; or presses Ctrl-C there."""

    def __init__(self, step: int, note: str | None = None) -> None:
        self.step, self.note = step, note

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: int
    ) -> None:
        if trainer.global_step < self.step:
            return
        if self.note is None:
            raise KeyboardInterrupt
        Path(self.note).touch()
        time.sleep(60)


# parameters

CONVERTED: dict[str, tuple[dict[str, Any], Any]] = {
    "values": ({"values": [1, "a", None, True]}, CategoricalDistribution([1, "a", None, True])),
    "lists": ({"values": [[1, 2], {"a": 1}]}, CategoricalDistribution(["[1, 2]", '{"a": 1}'])),
    "equal probabilities": (
        {"values": [1, 2], "probabilities": [0.5, 0.5]},
        CategoricalDistribution([1, 2]),
    ),
    "categorical": ({"distribution": "categorical", "values": [1]}, CategoricalDistribution([1])),
    "whole bounds": ({"min": 2, "max": 5}, IntDistribution(2, 5)),
    "a bound with a point": ({"min": 2, "max": 5.0}, FloatDistribution(2, 5)),
    "int_uniform": ({"distribution": "int_uniform", "min": -3, "max": 3}, IntDistribution(-3, 3)),
    "uniform": ({"distribution": "uniform", "min": 0, "max": 1}, FloatDistribution(0, 1)),
    "q_uniform": (
        {"distribution": "q_uniform", "min": 30, "max": 70, "q": 16},
        IntDistribution(32, 64, step=16),
    ),
    "q_uniform without q": ({"distribution": "q_uniform", "min": 0, "max": 3}, IntDistribution(0, 3)),
    "q_uniform by parts": (
        {"distribution": "q_uniform", "min": 0, "max": 0.5, "q": 0.1},
        FloatDistribution(0, 0.5, step=0.1),
    ),
    "log_uniform": (
        {"distribution": "log_uniform", "min": -2, "max": 1},
        FloatDistribution(math.exp(-2), math.e, log=True),
    ),
    "inv_log_uniform": (
        {"distribution": "inv_log_uniform", "min": -1, "max": 2},
        FloatDistribution(math.exp(-2), math.e, log=True),
    ),
    "log_uniform_values": (
        {"distribution": "log_uniform_values", "min": 1e-4, "max": 0.1},
        FloatDistribution(1e-4, 0.1, log=True),
    ),
    "inv_log_uniform_values": (
        {"distribution": "inv_log_uniform_values", "min": 1e-4, "max": 0.1},
        FloatDistribution(1e-4, 0.1, log=True),
    ),
    "q_log_uniform_values": (
        {"distribution": "q_log_uniform_values", "min": 32, "max": 256, "q": 8},
        IntDistribution(4, 32, log=True),
    ),
    "q_log_uniform": (
        {"distribution": "q_log_uniform", "min": 0, "max": math.log(20)},
        IntDistribution(1, 20, log=True),
    ),
}


@pytest.mark.parametrize(("spec", "distribution"), CONVERTED.values(), ids=CONVERTED)
def test_a_parameter_becomes_a_distribution(spec: dict[str, Any], distribution: Any) -> None:
    assert parameter("x", spec).distribution == distribution


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    **{
        kind: ({"distribution": kind, "mu": 0, "sigma": 1}, f"x: distribution {kind} is W&B's alone")
        for kind in ("normal", "q_normal", "log_normal", "q_log_normal", "beta", "q_beta")
    },
    "misspelt": ({"distribution": "uniforn", "min": 0, "max": 1}, "did you mean uniform"),
    "nothing": ({}, "x: expected `value`, `values`, or `min` and `max`"),
    "no max": ({"distribution": "uniform", "min": 0}, "x.max: expected a number, got None"),
    "upside down": ({"min": 2, "max": 1}, "x: min 2 is more than max 1"),
    "text": ({"distribution": "uniform", "min": "1e-3", "max": 1}, "as text; write 1.0e-3"),
    "text of a large number": ({"min": 1.0, "max": "1e3"}, r"write 1.0e\+3"),
    "log of nothing": ({"distribution": "log_uniform_values", "min": 0, "max": 1}, "needs min above 0"),
    "rounds to 0": ({"distribution": "q_log_uniform_values", "min": 1, "max": 9, "q": 8}, "would draw 0"),
    "parts of whole numbers": ({"distribution": "int_uniform", "min": 0.5, "max": 1}, "needs whole numbers"),
    "q of uniform": ({"distribution": "uniform", "min": 0, "max": 1, "q": 1}, "uniform has no 'q'"),
    "q of 0": ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0}, "x.q: expected more than 0"),
    "one twice": ({"values": [1, 1]}, "has a value twice"),
    "no list": ({"values": 3}, "x.values: expected a list"),
    "two probabilities of three": ({"values": [1, 2, 3], "probabilities": [0.5, 0.5]}, "add up to 1"),
}


@pytest.mark.parametrize(("spec", "message"), REFUSED.values(), ids=REFUSED)
def test_other_forms_are_refused_by_name(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parameter("x", spec)


@given(st.sampled_from([*CONVERTED]), st.integers(0, 2**32 - 1))
def test_what_is_drawn_can_be_found_again(name: str, seed: int) -> None:
    one = parameter("x", CONVERTED[name][0])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    drawn = one.suggest(study.ask())
    value = one.value(drawn)
    assert one.distribution._contains(one.distribution.to_internal_repr(one.drawn(value)))
    assert one.value(one.drawn(value)) == value
    assert isinstance(value, float | str) or yaml.safe_load(word(value)) == value


def test_null_can_be_found_again() -> None:
    one = parameter("x", {"values": [None, 3]})
    assert [one.drawn(None), one.drawn(3)] == [None, 3]
    for choices, value in (
        ({"values": [1, 2]}, None),
        ({"min": 0, "max": 3}, 4),
        ({"min": 0, "max": 3}, 0.5),
    ):
        with pytest.raises(LookupError):
            parameter("x", choices).drawn(value)


@given(st.integers(-50, 50), st.integers(0, 100), st.integers(1, 20), st.floats(0, 1))
def test_quantised_values_are_those_that_wandb_rounds_to(low: int, width: int, q: int, share: float) -> None:
    one = parameter("x", {"distribution": "q_uniform", "min": low, "max": low + width, "q": q})
    assert round((low + share * width) / q) * q in one.every()
    assert {round(value / q) * q for value in range(low, low + width + 1)} <= set(one.every())


@given(st.integers(8, 64), st.integers(0, 900), st.integers(1, 8), st.floats(0, 1))
def test_quantised_logarithms_too(low: int, width: int, q: int, share: float) -> None:
    one = parameter("x", {"distribution": "q_log_uniform_values", "min": low, "max": low + width, "q": q})
    value = math.exp(math.log(low) + share * (math.log(low + width) - math.log(low)))
    value = min(max(value, low), low + width)
    assert round(value / q) * q in {one.value(drawn) for drawn in one.every()}
    assert isinstance(one.value(one.every()[0]), int)


# files

MINIMAL: dict[str, Any] = {"method": "random", "parameters": {LR: {"min": 0.1, "max": 0.2}}}


def write(file: Path, content: Any) -> Path:
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return file


def test_a_file_with_everything(tmp_path: Path) -> None:
    content = {
        "name": "mine",
        "method": "bayes",
        "metric": {"name": "val/image_to_text_mean_rank", "goal": "minimize"},
        "early_terminate": {"type": "hyperband", "max_iter": 27, "s": 2, "strict": True},
        "run_cap": 7,
        "program": "clip-lightning",
        "command": ["${env}", "clip-lightning", "fit", "--config", "heads", "${args}", "--data.views", 1],
        "parameters": {
            "model": {"parameters": {"optimizer": {"parameters": {"lr": {"values": [0.1, 0.2]}}}}},
            DROPOUT: {"value": 0.5},
            "model.compile": {"distribution": "constant", "value": False},
        },
    }
    file = read_sweep(str(write(tmp_path / "x.yaml", content)))
    assert (file.name, file.method, file.run_cap) == ("mine", "bayes", 7)
    assert (file.metric, file.maximize) == ("val/image_to_text_mean_rank", False)
    assert file.early == Halving(first=3, eta=3)
    assert file.base == ("--config", "heads", "--data.views", "1")
    assert file.words({LR: 0.2}) == ["--model.dropout=0.5", "--model.compile=false", f"--{LR}=0.2"]


def test_a_file_with_little(tmp_path: Path) -> None:
    file = read_sweep(str(write(tmp_path / "little.yaml", MINIMAL)))
    assert (file.name, file.metric, file.maximize) == ("little", "val/rsum", True)
    assert (file.base, file.early, file.run_cap) == ((), None, None)


WRONG: dict[str, tuple[Any, str]] = {
    "no YAML": ("a: [", "is no YAML"),
    "a list": ([1], "expected a W&B sweep file"),
    "no method": ({"parameters": MINIMAL["parameters"]}, "method is missing"),
    "no parameters": ({"method": "grid"}, "parameters is missing"),
    "another method": ({**MINIMAL, "method": "bayse"}, "did you mean bayes"),
    "another key": ({**MINIMAL, "early_stop": 1}, "unknown key 'early_stop'"),
    "a bare value": ({**MINIMAL, "parameters": {LR: 3}}, "model.optimizer.lr: expected `value`"),
    "another metric": ({**MINIMAL, "metric": {"name": "val/rsun"}}, "did you mean val/rsum"),
    "a plain metric": ({**MINIMAL, "metric": {"name": "rsum"}}, "did you mean val/rsum"),
    "a target": ({**MINIMAL, "metric": {"name": "val/rsum", "target": 1}}, "metric.target is not supported"),
    "an infinite grid": ({**MINIMAL, "method": "grid"}, "method grid needs `values`"),
    "weights": (
        {"method": "bayes", "parameters": {LR: {"values": [1, 2], "probabilities": [0.1, 0.9]}}},
        "probabilities: bayes does not draw by them",
    ),
    "no place for parameters": ({**MINIMAL, "command": ["clip-lightning", "fit"]}, "where the parameters go"),
    "no fit": ({**MINIMAL, "command": ["python", "train.py", "${args}"]}, "a list with `fit`"),
    "other hyphens": (
        {**MINIMAL, "command": ["fit", "${args}", "${args_no_hyphens}"]},
        "args_no_hyphens} is not supported",
    ),
    "another early stop": ({**MINIMAL, "early_terminate": {"type": "median"}}, "expected `type: hyperband`"),
    "no iteration": ({**MINIMAL, "early_terminate": {"type": "hyperband"}}, "either min_iter, or max_iter"),
    "no s": ({**MINIMAL, "early_terminate": {"type": "hyperband", "max_iter": 9}}, "early_terminate.s is"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_wrong_files(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read_sweep(str(write(tmp_path / "x.yaml", content)))
    assert "x.yaml" in str(raised.value)


def test_packaged_names() -> None:
    assert read_sweep("heads").name == "heads"
    with pytest.raises(UserError, match=r"no configuration 'headz'.*backbones, finetune, heads"):
        read_sweep("headz")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_shipped_files(path: Path, tmp_path: Path) -> None:
    """Each says how to run it, all that it tries is understood, and its recipe is within its ranges."""
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert f"clip-lightning sweep {path.stem}" in next(line for line in comments if "command:" in line)
    assert [word for word in ("hardware:", "time:", "score:") if word not in "".join(comments)] == []
    file = read_sweep(path.stem)
    words = [*file.base, "--data.root", str(tmp_path), f"--trainer.default_root_dir={tmp_path}"]
    for drawn in ({one.label: one.ends()[end] for one in file.parameters} for end in (0, -1)):
        config = yaml.safe_load(rehearse([*words, *file.words(drawn)]).config_to_save)
        assert config["data"]["root"] == str(tmp_path)
    point = base_point(file, words)
    assert point is not None
    assert rehearse([*words, *file.words(point)]).config_to_save == rehearse(words).config_to_save


# words


def test_own_words_and_those_of_fit() -> None:
    given = ["--data.root", "x", "heads", "--trials", "3", "--json", "--study=a", "--data.views=1", "more"]
    own, files, others = split_words(given)
    assert own == ["--trials", "3", "--json=true", "--study=a"]
    assert files == ["heads", "more"]
    assert others == ["--data.root", "x", "--data.views=1"]
    assert split_words(["--json", "false", "x"])[:2] == (["--json=false"], ["x"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "FILE is missing: give a W&B sweep file, or the name of a packaged one"),
        (["heads", "--trials"], "--trials: expected one argument"),
        (["heads", "--trials", "--json"], "--trials: expected one argument"),
        (["heads", "--trial", "4"], "unknown option --trial; did you mean --trials?"),
        (["heads", "--trials", "x"], "--trials: expected a whole number or null, got x"),
        (["heads", "more"], "unrecognized arguments: more"),
        (["--data.root", "x", "none.yaml"], "no configuration 'none.yaml'"),
    ],
)
def test_wrong_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", *words]) == 2
    assert message in capsys.readouterr().err


# draws


def draws(study: optuna.Study, count: int) -> list[dict[str, Any]]:
    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        return x * {"a": 1, "b": 2, "c": 3}[trial.suggest_categorical("y", ["a", "b", "c"])]

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study.optimize(objective, n_trials=count)
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_a_study_that_goes_on_draws_what_it_would_have_drawn(method: str) -> None:
    def study(storage: Any, name: str = "s") -> optuna.Study:
        sampler = NumberedSampler(method, {})
        return optuna.create_study(study_name=name, storage=storage, sampler=sampler, load_if_exists=True)

    straight = draws(study(None), 16)
    storage = optuna.storages.InMemoryStorage()
    draws(study(storage), 5)
    draws(study(storage), 7)
    assert draws(study(storage), 4) == straight
    assert len({repr(params) for params in straight}) == 16
    assert draws(study(None, "t"), 2) != straight[:2]


def test_random_choices_have_their_probabilities() -> None:
    weights = [0.0, 0.25, 0.75]
    study = optuna.create_study(study_name="s", sampler=NumberedSampler("random", {"y": weights}))
    drawn = [params["y"] for params in draws(study, 200)]
    assert "a" not in drawn
    assert 120 < drawn.count("c") < 180


# searches

Search = Callable[..., list[str]]


@pytest.fixture(scope="session")
def base(bert: Path, scenes: Path) -> list[str]:
    """Words of a small, quiet `fit`."""
    options = {
        "model.image_tower": "random:test_resnet",
        "model.text_tower": f"random:{bert}",
        "model.embed_dim": 16,
        "data.root": scenes,
        "data.image_size": 32,
        "data.batch_size": 8,
        "data.num_workers": 0,
        "predictions.queries": 0,
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "trainer.max_epochs": 2,
    }
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.fixture
def search(base: list[str], tmp_path: Path) -> Search:
    """Builds the words of `sweep` for a file of this content, with its results under tmp_path."""

    def build(content: dict[str, Any], *more: str) -> list[str]:
        content = {"command": ["clip-lightning", "fit", *base, "${args}"], **content}
        file = write(tmp_path / "tiny.yaml", content)
        return ["sweep", str(file), "--trainer.default_root_dir", str(tmp_path / "runs"), *more]

    return build


def grid(**parameters: list[Any]) -> dict[str, Any]:
    names = {"lr": LR, "dropout": DROPOUT}
    return {"method": "grid", "parameters": {names[key]: {"values": v} for key, v in parameters.items()}}


def study_of(folder: Path, name: str = "tiny") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{folder / 'study.db'}")


def states(folder: Path) -> list[str]:
    return [trial.state.name for trial in study_of(folder).trials]


def summary(printed: str) -> dict[str, Any]:
    """The one JSON object on stdout."""
    return json.loads(printed)


def test_a_search_and_what_it_leaves(
    search: Search, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = {
        LR: {"distribution": "log_uniform_values", "min": 1e-4, "max": 0.1},
        "model.embed_dim": {"distribution": "q_log_uniform_values", "min": 8, "max": 64, "q": 8},
    }
    content = {"method": "bayes", "run_cap": 2, "parameters": parameters}
    assert main(search(content, "--json")) == 0
    found = summary(capsys.readouterr().out)
    folder = tmp_path / "runs" / "sweep-tiny"
    assert [trial["state"] for trial in found["trials"]] == ["finished"] * 2
    values = [trial["value"] for trial in found["trials"]]
    assert values == sorted(values, reverse=True)
    assert found["best"] == found["trials"][0]
    assert found["best"]["value"] == found["best"]["metrics"]["rsum"]
    first = next(trial for trial in found["trials"] if trial["trial"] == 0)
    assert first["parameters"] == {LR: 1e-3, "model.embed_dim": 16}, "the words without the search come first"
    assert all(trial["parameters"]["model.embed_dim"] % 8 == 0 for trial in found["trials"])
    runs = {run.name for run in (folder / "trials").iterdir()}
    assert {Path(trial["run"]).name for trial in found["trials"]} == runs

    files = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
    pictures = {"history.png", "importance.png", "parallel.png"}
    assert files == pictures | {"best.yaml", "study.db", "trials", "trials.csv", "trials.json", "trials.md"}
    assert summary((folder / "trials.json").read_text()) == found
    rows = list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))
    assert [int(row["trial"]) for row in rows] == [trial["trial"] for trial in found["trials"]]
    assert float(rows[0][LR]) == found["best"]["parameters"][LR]
    assert (folder / "trials.md").read_text().count("| finished |") == 2

    # for one more: nothing is repeated
    assert main(search(content, "--trials", "3", "--json")) == 0
    more = summary(capsys.readouterr().out)
    assert len(more["trials"]) == 3
    assert [trial for trial in more["trials"] if trial["trial"] < 2] == found["trials"]

    # the best again
    again = ["--trainer.default_root_dir", str(tmp_path / "again")]
    assert main(["fit", "--config", str(folder / "best.yaml"), *again]) == 0
    (run,) = (tmp_path / "again").iterdir()
    assert json.loads((run / "metrics.json").read_text())["rsum"] == more["best"]["value"]
    assert yaml.safe_load((folder / "best.yaml").read_text())["trainer"]["default_root_dir"].endswith("runs")


def test_a_grid_is_queued_in_its_order(search: Search, tmp_path: Path) -> None:
    assert main(search(grid(lr=[0.001, 0.01], dropout=[0.0, 0.5]), "--trials", "1")) == 0
    first, *rest = study_of(tmp_path / "runs" / "sweep-tiny").trials
    assert (first.state.name, first.params) == ("COMPLETE", {LR: 0.001, DROPOUT: 0.0})
    points = [trial.system_attrs["fixed_params"] for trial in rest]
    assert [tuple(point.values()) for point in points] == [(0.001, 0.5), (0.01, 0.0), (0.01, 0.5)]


def test_a_failed_trial_is_told_and_does_not_end_the_search(
    search: Search, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(search(grid(dropout=[2.0, 0.0]), "--json")) == 1, "a point of the grid is missing"
    said = capsys.readouterr()
    found = summary(said.out)
    assert [trial["state"] for trial in found["trials"]] == ["finished", "failed"]
    assert "dropout" in found["trials"][1]["error"]
    assert "trial 0 failed: " in said.err
    assert "1 of 2 trials finished; trial 0 failed: " in said.err.splitlines()[-1]
    assert "rsum" not in said.err.replace("val/rsum", ""), "the tables of runs are not told"


def test_failed_points_are_tried_again(
    search: Search, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that was interrupted any number of times."""
    words = search(grid(lr=[0.01]))
    touches = "--trainer.callbacks=test_tuning.Touches"
    assert main([*words, touches, "--trainer.callbacks.step=0", "--trainer.callbacks.note=/none/there"]) == 1
    assert "0 of 1 trials finished; trial 0 failed: FileNotFoundError" in capsys.readouterr().err
    for _ in range(2):
        assert main([*words, touches, "--trainer.callbacks.step=2"]) == 130
        said = capsys.readouterr()
        assert "the same command again goes on" in said.err
        assert "--ckpt_path last" not in said.err, "which is of a run alone"
        assert "search tiny" in said.out, "what there is, is told"
    folder = tmp_path / "runs" / "sweep-tiny"
    assert states(folder) == ["FAIL"] * 3 + ["WAITING"]
    assert main(words) == 0
    assert states(folder) == ["FAIL"] * 3 + ["COMPLETE"]
    rows = summary((folder / "trials.json").read_text())["trials"]
    assert sorted(row["state"] for row in rows) == ["failed", "finished", "interrupted", "interrupted"]


def test_other_data_or_options_are_another_study(
    search: Search, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else trials that cannot be compared would be ranked, and best.yaml would say what never ran."""
    content = grid(lr=[0.01])
    assert main(search(content)) == 0
    best = tmp_path / "runs" / "sweep-tiny" / "best.yaml"
    before = best.read_text()
    other = tmp_path / "other"
    write_scenes(other, count=30, size=32, seed=1)
    for changed, option, named in (
        (content, f"--data.root={other}", "data"),
        (content, "--model.dropout=0.5", "model.dropout"),
        (grid(lr=[0.02]), "--json", "parameters"),
        (content | {"method": "random", "run_cap": 2}, "--json", "method"),
    ):
        assert main(search(changed, option)) == 2
        said = capsys.readouterr().err
        assert f"the study 'tiny' was begun with other {named}; give --study NAME to begin another" in said
    assert best.read_text() == before
    assert main(search(content, "--model.dropout=0.5", "--study=other one")) == 0
    assert "dropout: 0.5" in (tmp_path / "runs" / "sweep-other-one" / "best.yaml").read_text()


def test_a_study_whose_maker_died_is_queued_completely(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what it is when all of its points are queued."""
    monkeypatch.setattr("clip_lightning.experiments.sweeps.queue.QUEUING_SECONDS", 0)
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    optuna.create_study(storage=url, study_name="tiny", direction="maximize").enqueue_trial({LR: 0.01})
    assert main(search(grid(lr=[0.01, 0.02]), "--storage", url, "--trials", "1")) == 0
    study = optuna.load_study(study_name="tiny", storage=url)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "WAITING"]
    assert study.user_attrs["identity"]["method"] == "grid"


def test_nothing_but_failures_ends_it(
    search: Search, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(search(grid(dropout=[2.0, 3.0, 4.0, 5.0]))) == 1
    said = capsys.readouterr().err
    assert "the search stops, 3 trials in a row failed, the last one so: " in said
    assert states(tmp_path / "runs" / "sweep-tiny") == ["FAIL"] * 3 + ["WAITING"]


def test_hopeless_trials_are_stopped_early(
    search: Search, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What does not learn at all is behind what does after the first validation."""
    content = grid(lr=[0.01, 0.0]) | {"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 2}}
    assert main(search(content, "--json", "--trainer.max_epochs=3")) == 0
    good, bad = summary(capsys.readouterr().out)["trials"]
    assert (good["state"], bad["state"]) == ("finished", "stopped early")
    folder = tmp_path / "runs" / "sweep-tiny"
    assert bad["metrics"]["epoch"] == 0
    assert [len(trial.intermediate_values) for trial in study_of(folder).trials] == [3, 1]
    assert (folder / bad["run"] / "model" / "model.safetensors").is_file()
    assert main(search(content, "--json", "--trainer.max_epochs=3")) == 0
    assert len(summary(capsys.readouterr().out)["trials"]) == 2, "a trial that was stopped early has finished"


@pytest.mark.slow
def test_killed_and_going_on(search: Search, tmp_path: Path) -> None:
    content = {"method": "random", "run_cap": 2, "parameters": {LR: {"min": 0.001, "max": 0.01}}}
    words = search(content)
    assert main([*words, "--trials", "1"]) == 0
    folder = tmp_path / "runs" / "sweep-tiny"
    before = study_of(folder).trials
    note = tmp_path / "note"
    stuck = ["--trainer.callbacks=test_tuning.Touches", "--trainer.callbacks.step=1"]
    command = [sys.executable, "-m", "clip_lightning", *words, *stuck, f"--trainer.callbacks.note={note}"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not note.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert states(folder) == ["COMPLETE", "RUNNING"]
    assert main(words) == 0
    after = study_of(folder).trials
    assert [trial.state.name for trial in after] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert after[0].value == before[0].value
    assert after[2].params == after[1].params, "what it was trying is tried again"


def test_a_silent_worker_elsewhere_is_given_up(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine nobody can look for the process; its heart is missed."""
    monkeypatch.setattr("clip_lightning.experiments.sweeps.study.GRACE_SECONDS", 1)
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    words = search(grid(lr=[0.001, 0.01]), "--storage", url, "--study", "shared")
    assert main([*words, "--trials", "1"]) == 0
    study = optuna.load_study(study_name="shared", storage=url)
    lost = study.ask({LR: CategoricalDistribution([0.001, 0.01])})
    storage = optuna.storages.get_storage(url)
    storage._backend.record_heartbeat(lost._trial_id)
    time.sleep(2.1)
    assert main(words) == 0
    found = [(trial.state, trial.params[LR]) for trial in study.get_trials()]
    assert found == [(TrialState.COMPLETE, 0.001), (TrialState.FAIL, 0.01), (TrialState.COMPLETE, 0.01)]
    assert not (tmp_path / "runs" / "sweep-shared" / "study.db").exists()


MISTAKES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "unknown parameter": (
        {"method": "grid", "parameters": {"model.optimizer.ler": {"values": [1]}}},
        [],
        "did you mean --model.optimizer.lr",
    ),
    "a choice of another kind": (
        {"method": "grid", "parameters": {"model.embed_dim": {"values": [16, "wide"]}}},
        [],
        "--model.embed_dim: expected a whole number, got wide",
    ),
    "unknown option": (grid(lr=[1]), ["--data.rot=x"], "--data.rot"),
    "no number of trials": (MINIMAL, [], "--trials N: how many"),
    "no data": (grid(lr=[1]), ["--data.root=/none"], "/none"),
    "none": (MINIMAL, ["--trials", "0"], "--trials 0: expected 1 or more"),
    "no database": (grid(lr=[1]), ["--storage", "nonsense"], "--storage"),
    "both engines": (grid(lr=[1]), ["--storage", "sqlite://", "--sweep_id", "a/b/c"], "give one of them"),
    "joining offline": (grid(lr=[1]), ["--sweep_id", "a/b/c"], "--sweep_id a/b/c: joining needs W&B online"),
}


@pytest.mark.parametrize(("content", "more", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_before_the_first_trial(
    search: Search,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: dict[str, Any],
    more: list[str],
    message: str,
) -> None:
    assert main(search(content, *more)) == 2
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if "error:" in line]
    assert message in line
    assert said.out == ""
    assert not list(tmp_path.glob("runs/*/trials"))


@pytest.mark.slow
def test_workers_side_by_side(search: Search, tmp_path: Path) -> None:
    content = {"method": "random", "run_cap": 5, "parameters": {LR: {"min": 0.001, "max": 0.01}}}
    # long enough for the other process to arrive
    long = ["--trainer.max_epochs=60", "--early_stopping.patience=60", "--trainer.check_val_every_n_epoch=20"]
    assert main(search(content, "--parallel", "2", *long)) == 0
    trials = study_of(tmp_path / "runs" / "sweep-tiny").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 5
    assert len({trial.params[LR] for trial in trials}) == 5
    assert len({trial.user_attrs["worker"][1] for trial in trials}) == 2


@pytest.mark.slow
def test_two_ranks_in_every_trial(search: Search, tmp_path: Path) -> None:
    """Both get the trial's options, agree on when to stop, and the next trial starts two anew."""
    content = grid(lr=[0.01, 0.0]) | {"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 2}}
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=4", "--trainer.max_epochs=3"]
    command = [sys.executable, "-m", "clip_lightning", *search(content, *ranks, "--json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    good, bad = summary(done.stdout)["trials"]
    assert (good["state"], bad["state"]) == ("finished", "stopped early")
    runs = [tmp_path / "runs" / "sweep-tiny" / trial["run"] for trial in (good, bad)]
    steps = [json.loads((run / "metrics.json").read_text())["step"] for run in runs]
    assert steps[1] == 4, "32 scenes in an epoch of two ranks with 4 each"
