"""`sweep`: trials, stopping and resuming, the files of a search, and the same file on W&B's agents."""

import csv
import json
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
from lightning.pytorch import Callback, LightningModule, Trainer
from wandb_server import WandbServer

from clip_lightning.__main__ import main
from clip_lightning.data.scenes import write_scenes
from clip_lightning.errors import Diverged

Patch = pytest.MonkeyPatch
LR, DROPOUT = "model.optimizer.lr", "model.heads.dropout"
HALVING = {"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 2}}
INFINITE: dict[str, Any] = {"method": "random", "parameters": {LR: {"min": 0.001, "max": 0.01}}}

# Optuna calls heartbeats experimental.
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


class Meets(Callback):
    """Waits until a second process trains, too."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / str(os.getpid())).touch()
        deadline = time.monotonic() + 120
        while len(list(self.folder.iterdir())) < 2:
            assert time.monotonic() < deadline, "no other process trains"
            time.sleep(0.05)


class Diverges(Callback):
    """Diverges when the learning rate is 1."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.optimizers and trainer.optimizers[0].param_groups[0]["initial_lr"] == 1:
            raise Diverged("training has diverged at step 4; lower the learning rate")


Run = Callable[..., dict]
Printed = pytest.CaptureFixture[str]
Search = Callable[..., list[str]]


@pytest.fixture
def search(command: Callable[..., list[str]], tmp_path: Path) -> Search:
    """Builds the arguments of `sweep` for a file of this content, with its results under tmp_path."""

    usual = {"data__batch_size": 8, "predictions__queries": 0, "trainer__enable_progress_bar": ...}

    def build(content: dict[str, Any], *more: str, **changes: Any) -> list[str]:
        base = command("fit", tmp_path / "runs", **(usual | changes))
        content = {"command": ["clip-lightning", *base, "${args}"], **content}
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return ["sweep", str(tmp_path / "tiny.yaml"), *more]

    return build


def grid(**parameters: list[Any]) -> dict[str, Any]:
    names = {"lr": LR, "dropout": DROPOUT}
    return {"method": "grid", "parameters": {names[key]: {"values": v} for key, v in parameters.items()}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the study `tiny`."""
    return tmp_path / "runs" / "sweep-tiny"


def study_of(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="tiny", storage=f"sqlite:///{folder / 'study.db'}")


def states(folder: Path) -> list[str]:
    return [trial.state.name for trial in study_of(folder).trials]


def test_the_files_of_a_search(search: Search, folder: Path, tmp_path: Path, printed: Run) -> None:
    parameters = {
        LR: {"distribution": "log_uniform_values", "min": 1e-4, "max": 0.1},
        "model.heads.embed_dim": {"distribution": "q_log_uniform_values", "min": 8, "max": 64, "q": 8},
    }
    content = {"method": "bayes", "run_cap": 2, "parameters": parameters}
    found = printed(*search(content))
    assert [trial["state"] for trial in found["trials"]] == ["finished"] * 2
    values = [trial["value"] for trial in found["trials"]]
    assert values == sorted(values, reverse=True)
    assert found["best"] == found["trials"][0]
    assert found["best"]["value"] == found["best"]["metrics"]["rsum"]
    first = next(trial for trial in found["trials"] if trial["trial"] == 0)
    assert first["parameters"] == {LR: 1e-3, "model.heads.embed_dim": 16}, "the base command comes first"
    assert all(trial["parameters"]["model.heads.embed_dim"] % 8 == 0 for trial in found["trials"])
    runs = {run.name for run in (folder / "trials").iterdir()}
    assert {Path(trial["run"]).name for trial in found["trials"]} == runs

    files = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
    plots = {"history.png", "importance.png", "parallel.png"}
    assert files == plots | {"best.yaml", "study.db", "trials", "trials.csv", "trials.json", "trials.md"}
    assert json.loads((folder / "trials.json").read_text()) == found
    rows = list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))
    assert [int(row["trial"]) for row in rows] == [trial["trial"] for trial in found["trials"]]
    assert float(rows[0][LR]) == found["best"]["parameters"][LR]
    assert (folder / "trials.md").read_text().count("| finished |") == 2

    # one more trial repeats nothing
    more = printed(*search(content, "--trials", "3"))
    assert len(more["trials"]) == 3
    assert [trial for trial in more["trials"] if trial["trial"] < 2] == found["trials"]

    # the best configuration gives the best result again
    again = ["--trainer.default_root_dir", str(tmp_path / "again")]
    assert main(["fit", "--config", str(folder / "best.yaml"), *again]) == 0
    (run,) = (tmp_path / "again").iterdir()
    assert json.loads((run / "metrics.json").read_text())["rsum"] == more["best"]["value"]


def test_a_finite_space_ends_and_trials_print_warnings(search: Search, folder: Path, capsys: Printed) -> None:
    content = {**grid(lr=[0.001, 0.01], dropout=[0.0]), "method": "bayes"}
    assert main(search(content, "--trials", "9", "--model.towers.max_length=4")) == 0
    errors = capsys.readouterr().err
    assert "the search space is exhausted: all 2 points have been tried" in errors
    assert errors.count("are longer than 4 tokens and are truncated") == 3, "before and in each trial"
    assert errors.count("read captions.csv") == 1, "all trials have the same data"
    assert sorted(trial.params[LR] for trial in study_of(folder).trials) == [0.001, 0.01]


def test_a_failed_trial_is_printed_and_retried(search: Search, folder: Path, capsys: Printed) -> None:
    """As is one that was interrupted any number of times."""
    arguments = search(grid(lr=[0.01]))
    failing = [f"--trainer.callbacks{end}" for end in ("=processes.Linger", ".step=0", ".note=/none/there")]
    assert main([*arguments, *failing, "--json"]) == 1
    said = capsys.readouterr()
    (row,) = json.loads(said.out)["trials"]
    assert row["state"] == "failed"
    assert row["error"].startswith("FileNotFoundError")
    assert "trial 0 failed: FileNotFoundError" in said.err
    assert "0 of 1 trials finished; trial 0 failed: FileNotFoundError" in said.err.splitlines()[-1]
    assert "exhausted" not in said.err
    for _ in range(2):
        assert main([*arguments, "--trainer.callbacks=processes.At", "--trainer.callbacks.step=2"]) == 130
        said = capsys.readouterr()
        assert "repeat the same command to resume the search" in said.err
        assert "--ckpt_path last" not in said.err, "which is of a run alone"
        assert "search tiny" in said.out, "what there is, is reported"
    assert states(folder) == ["FAIL"] * 3 + ["WAITING"]
    assert main(arguments) == 0
    assert states(folder) == ["FAIL"] * 3 + ["COMPLETE"]
    rows = json.loads((folder / "trials.json").read_text())["trials"]
    assert sorted(row["state"] for row in rows) == ["failed", "finished", "interrupted", "interrupted"]


def test_a_failed_point_of_a_grid_does_not_end_the_search(search: Search, capsys: Any) -> None:
    assert main(search(grid(dropout=[2.0, 0.0]), "--json")) == 1, "a point of the grid is missing"
    said = capsys.readouterr()
    assert [trial["state"] for trial in json.loads(said.out)["trials"]] == ["finished", "failed"]
    assert "1 of 2 trials finished; trial 0 failed: embed_dim 16 and" in said.err.splitlines()[-1]
    assert "Traceback" not in said.err
    assert "rsum" not in said.err.replace("val/rsum", ""), "the tables of runs are not printed"
    assert main(search(grid(dropout=[2.0, 3.0, 4.0, 5.0, 6.0, 0.0]), "--study=hopeless")) == 1
    assert "the search stops because 5 trials in a row failed" in capsys.readouterr().err


def test_a_diverged_trial_is_the_worst_result(search: Search, folder: Path, capsys: Any) -> None:
    content = {**grid(lr=[1.0, 0.01]), **HALVING}
    arguments = search(content, "--json", "--trainer.callbacks=test_sweeps.Diverges")
    assert main(arguments) == 0
    said = capsys.readouterr()
    good, bad = json.loads(said.out)["trials"]
    assert (good["state"], bad["state"], bad["value"]) == ("finished", "diverged", 0.0)
    assert bad["error"] == "training has diverged at step 4; lower the learning rate"
    assert "Traceback" not in said.err
    assert "trial 0 diverged: training has diverged at step 4" in said.err
    assert study_of(folder).best_trial.number == good["trial"]
    assert main(arguments) == 0
    assert len(states(folder)) == 2, "it is not tried again"
    content = {**grid(lr=[1.0]), "metric": {"name": "val/text_to_image_mean_rank", "goal": "minimize"}}
    capsys.readouterr()
    assert main([*search(content, *arguments[2:]), "--study=worst"]) == 1, "no other result is a failure"
    said = capsys.readouterr()
    assert json.loads(said.out)["trials"][0]["value"] is None
    assert "0 of 1 trials finished; trial 0 diverged: " in said.err.splitlines()[-1]


def test_what_makes_another_study(search: Search, folder: Path, tmp_path: Path, refused: Any) -> None:
    """Else trials that cannot be compared would be ranked, and best.yaml would contain what never ran."""
    content = grid(lr=[0.01])
    assert main(search(content)) == 0
    before = (folder / "best.yaml").read_text()
    other = tmp_path / "other"
    write_scenes(other, count=30, size=32, seed=1)
    for changed, option, named in (
        (content, f"--data.root={other}", "data"),
        (content, "--model.heads.dropout=0.5", "model.heads.dropout"),
        (grid(lr=[0.02]), "--json", "parameters"),
        (content | {"method": "random", "run_cap": 2}, "--json", "method"),
    ):
        said = f"the study 'tiny' was started with different {named}; set --study NAME to start another"
        assert said in refused(*search(changed, option))
    assert (folder / "best.yaml").read_text() == before
    assert main(search(content, "--model.heads.dropout=0.5", "--study=other one")) == 0
    assert "dropout: 0.5" in (tmp_path / "runs" / "sweep-other-one" / "best.yaml").read_text()


def test_bad_trials_are_stopped_early(search: Search, folder: Path, printed: Run) -> None:
    """What does not learn at all is behind what does after the first validation."""
    arguments = search({**grid(lr=[0.01, 0.0]), **HALVING}, "--trainer.max_epochs=3")
    good, bad = printed(*arguments)["trials"]
    assert (good["state"], bad["state"]) == ("finished", "stopped early")
    assert bad["metrics"]["epoch"] == 0
    assert [len(trial.intermediate_values) for trial in study_of(folder).trials] == [3, 1]
    assert (folder / bad["run"] / "model" / "model.safetensors").is_file()
    assert len(printed(*arguments)["trials"]) == 2, "a trial that was stopped early counts"


@pytest.mark.slow
def test_a_killed_search_is_resumed(search: Search, folder: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """So is that of a machine that was lost, as the others see it in their database."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    arguments = search({**INFINITE, "run_cap": 2}, "--storage", url)
    assert main([*arguments, "--trials", "1"]) == 0
    study = optuna.load_study(study_name="tiny", storage=url)
    before = study.trials
    note = tmp_path / "note"
    stuck = ["--trainer.callbacks=processes.Linger", "--trainer.callbacks.step=1"]
    command = [sys.executable, "-m", "clip_lightning", *arguments, *stuck, f"--trainer.callbacks.note={note}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not note.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "RUNNING"]
    monkeypatch.setattr("clip_lightning.experiments.sweep.GRACE_SECONDS", 1)
    assert main(arguments) == 0
    after = study.trials
    assert [trial.state.name for trial in after] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert after[0].value == before[0].value
    assert after[2].params == after[1].params, "what it was trying is tried again"
    assert not (folder / "study.db").exists()


MISTAKES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "a choice of another kind": (
        {"method": "grid", "parameters": {"model.heads.embed_dim": {"values": [16, "wide"]}}},
        [],
        "--model.heads.embed_dim: expected a whole number, got wide",
    ),
    "no number of trials": (INFINITE, [], "infinite, and the file has no run_cap; set --trials N"),
    "no validation": (grid(lr=[1]), ["--trainer.limit_val_batches=0"], "a run without a validation"),
    "no database": (grid(lr=[1]), ["--storage", "nonsense"], "--storage"),
}


@pytest.mark.parametrize(("content", "more", "message"), MISTAKES.values(), ids=MISTAKES)
def test_errors_are_raised_before_the_first_trial(
    content: dict[str, Any], more: list[str], message: str, search: Search, tmp_path: Path, refused: Any
) -> None:
    assert message in refused(*search(content, *more))
    assert not list(tmp_path.glob("runs/*/trials"))


@pytest.mark.slow
def test_two_workers_train_at_the_same_time(search: Search, folder: Path, tmp_path: Path) -> None:
    meets = ["--trainer.callbacks=test_sweeps.Meets", f"--trainer.callbacks.folder={tmp_path / 'workers'}"]
    assert main(search({**INFINITE, "run_cap": 5}, "--parallel", "2", *meets)) == 0
    trials = study_of(folder).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 5
    assert len({trial.params[LR] for trial in trials}) == 5


@pytest.mark.slow
def test_two_ranks_in_every_trial(search: Search, folder: Path) -> None:
    """Both get the trial's options, agree on when to stop, and the next trial starts two again."""
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=4", "--trainer.max_epochs=3"]
    arguments = search({**grid(lr=[0.01, 0.0]), **HALVING}, *ranks, "--json")
    command = [sys.executable, "-m", "clip_lightning", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    good, bad = json.loads(done.stdout)["trials"]
    assert (good["state"], bad["state"]) == ("finished", "stopped early")
    metrics = json.loads((folder / bad["run"] / "metrics.json").read_text())
    assert metrics["step"] == 4, "32 scenes in an epoch of two ranks with 4 each"


# W&B


def test_trials_are_runs_of_one_group(wandb_server: WandbServer, search: Search, capfd: Printed) -> None:
    arguments = search(grid(lr=[0.001, 0.01]), trainer__logger=..., trainer__max_epochs=1)
    assert main(arguments) == 0
    runs = list(wandb_server.runs.values())
    assert [run.config["model"]["optimizer"]["lr"] for run in runs] == [0.001, 0.01]
    assert {(run.group, run.state, run.sweep) for run in runs} == {("sweep-tiny", "finished", None)}
    assert "model" not in {found.type for found in wandb_server.collections.values()}
    assert "wandb:" not in capfd.readouterr().err
    assert not wandb_server.sweeps


@pytest.mark.slow
def test_the_same_file_works_with_wandb(wandb_server: WandbServer, search: Search, tmp_path: Path) -> None:
    parameters = {LR: {"values": [0.001, 0.01]}, "model.heads.embed_dim": {"value": 8}}
    content = {"method": "grid", "project": "p", "program": "clip-lightning", "parameters": parameters}
    search(content, trainer__logger=..., trainer__max_epochs=1, model__heads__embed_dim=...)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for arguments in (["sweep", "tiny.yaml"], ["agent", "--count", "1", "tester/p/sweep000"]):
        command, where = [sys.executable, "-m", "wandb", *arguments], {"cwd": tmp_path, "env": environment}
        done = subprocess.run(command, **where, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
    (run,) = [run for run in wandb_server.runs.values() if run.sweep]
    assert (run.state, run.config[LR], run.config["model.heads.embed_dim"]) == ("finished", 0.001, 8)
