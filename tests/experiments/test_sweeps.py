"""`sweep` online, on the test server: made, worked for in this process and by `wandb agent`, and told."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.agents import pyagent
from wandb_server import WandbServer

from clip_lightning.__main__ import main
from clip_lightning.errors import UserError
from clip_lightning.experiments.sweeps.file import read_sweep
from clip_lightning.experiments.sweeps.online import as_study
from clip_lightning.experiments.sweeps.report import Report
from clip_lightning.experiments.sweeps.study import Search
from clip_lightning.experiments.sweeps.wandb_sweep import SweepRun, create_sweep, sweep_runs
from clip_lightning.experiments.sweeps.watch import NotesStop

LR = "model.optimizer.lr"

pytestmark = [
    # Lightning 2.6 calls jsonargparse by names that its newest versions deprecate.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    # wandb.sweep calls what wandb has deprecated; wandb.agent does not close the file of a run's parameters.
    pytest.mark.filterwarnings("ignore:Read the `app_url` setting:DeprecationWarning"),
    pytest.mark.filterwarnings(
        r"ignore:Exception ignored in.*config-sweep\d+-\d+.yaml:pytest.PytestUnraisableExceptionWarning"
    ),
]


@pytest.fixture
def sweep_file(bert: Path, scenes: Path, tmp_path: Path) -> Path:
    """A grid of two small runs."""
    options = {
        "model.image_tower": "random:test_resnet",
        "model.text_tower": f"random:{bert}",
        "data.root": scenes,
        "data.image_size": 32,
        "data.batch_size": 8,
        "data.num_workers": 0,
        "predictions.queries": 0,
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": 1,
        "trainer.default_root_dir": tmp_path / "runs",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    content = {
        "method": "grid",
        "project": "p",
        "program": "clip-lightning",
        "command": ["clip-lightning", "fit", *words, "${args}"],
        "metric": {"name": "val/rsum", "goal": "maximize"},
        "parameters": {LR: {"values": [0.001, 0.01]}, "model.heads.embed_dim": {"value": 16}},
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def learning_rates(server: WandbServer) -> list[Any]:
    """What the runs of the sweep say in the complete configuration that they logged."""
    (sweep,) = server.sweeps.values()
    runs = [run for run in server.runs.values() if run.sweep == sweep.id]
    assert all(run.state == "finished" for run in runs)
    assert all(run.config[LR] == run.config["model"]["optimizer"]["lr"] for run in runs)
    return [run.config[LR] for run in runs]


def test_a_sweep_is_made_and_worked_for(
    wandb_server: WandbServer,
    sweep_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pyagent.Agent, "HEARTBEAT_SLEEP_SECONDS", 0.05)
    assert main(["sweep", str(sweep_file), "--model.optimizer.weight_decay", "0.2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert learning_rates(wandb_server) == [0.001, 0.01]
    (sweep,) = wandb_server.sweeps.values()
    assert sweep.config["command"][-3:] == ["--model.optimizer.weight_decay", "0.2", "${args}"]
    assert {run.config["model"]["optimizer"]["weight_decay"] for run in wandb_server.runs.values()} == {0.2}
    assert "model" not in {found.type for found in wandb_server.collections.values()}

    assert [trial["state"] for trial in found["trials"]] == ["finished"] * 2
    values = [run.summary["val/rsum"] for run in wandb_server.runs.values()]
    values = [value["max"] if isinstance(value, dict) else value for value in values]
    assert sorted((trial["value"] for trial in found["trials"]), reverse=True) == sorted(values, reverse=True)
    folder = tmp_path / "runs" / "sweep-tiny"
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert (
        best["model"]["optimizer"] | {"weight_decay": 0.2, "lr": found["best"]["parameters"][LR]}
        == (best["model"]["optimizer"])
    )
    assert len((folder / "trials.md").read_text().splitlines()) == 8

    again = ["sweep", str(sweep_file), "--model.optimizer.weight_decay", "0.2"]
    assert main([*again, "--trials", "1"]) == 2
    assert "the sweep tester/p/sweep000 was made for 2, and W&B does not" in capsys.readouterr().err
    assert main([*again, "--model.heads.dropout=0.5"]) == 2
    assert "was begun with other model.heads.dropout; give --study NAME" in capsys.readouterr().err
    assert main([*again, "--json"]) == 0, "it goes on with the sweep, which has nothing left"
    said = capsys.readouterr()
    assert "sweep tester/p/sweep000 has ended" in said.err
    assert json.loads(said.out) == found
    assert len(wandb_server.sweeps) == 1
    assert len(learning_rates(wandb_server)) == 2
    assert "WANDB_SWEEP_ID" not in os.environ


def test_a_sweep_is_joined_for_some_runs_of_which_one_fails(
    wandb_server: WandbServer,
    sweep_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pyagent.Agent, "HEARTBEAT_SLEEP_SECONDS", 0.05)
    content = yaml.safe_load(sweep_file.read_text()) | {"method": "bayes"}
    content["parameters"]["model.heads.dropout"] = {"values": [2.0, 0.0, 0.1]}
    del content["parameters"][LR]
    sweep_file.write_text(yaml.safe_dump(content))
    wandb_server.create_sweep("tester", "p", yaml.safe_dump(content | {"method": "grid"}))
    join = ["sweep", str(sweep_file), "--sweep_id", "tester/p/sweep000"]
    assert main([*join, "--trials", "2", "--json"]) == 0, "without run_cap, which joining does not need"
    good = json.loads(capsys.readouterr().out)["best"]
    assert (good["parameters"], good["state"]) == ({"model.heads.dropout": 0.0}, "finished")
    assert good["seconds"] is not None
    (sweep,) = wandb_server.sweeps.values()
    assert len(sweep.runs) == 2


def test_a_wrong_id_is_told(
    wandb_server: WandbServer, sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(sweep_file), "--sweep_id", "sweep000"]) == 2
    assert "--sweep_id sweep000: expected ENTITY/PROJECT/ID" in capsys.readouterr().err


def test_runs_of_a_sweep_as_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"method": "random", "parameters": {LR: {"min": 0.1, "max": 0.2}, "x": {"values": [None, 1]}}}
    file = tmp_path / "f.yaml"
    file.write_text(yaml.safe_dump(content))

    def run(state: str, rsum: float | None, lr: float, stopped: bool = False) -> SweepRun:
        metrics = {} if rsum is None else {"val/rsum": rsum}
        return SweepRun("e/p/r", state, {LR: lr, "x": None}, metrics, 90.0, stopped, "https://page")

    runs = [
        run("finished", 200.0, 0.1),
        run("failed", 190.0, 0.2, stopped=True),
        run("finished", math.nan, 0.2),
        run("crashed", 210.0, 0.3),
        run("running", 205.0, 0.1),
        run("killed", None, 0.1, stopped=True),
    ]
    monkeypatch.setattr("clip_lightning.experiments.sweeps.online.sweep_runs", lambda sweep: runs)
    search = Search(read_sweep(str(file)), (), tmp_path, "s", None, 9, 1, {})
    report = Report(search.file, tmp_path, as_study(search, "e/p/s"))
    assert report.best is not None
    assert report.best.number == 0
    rows = sorted(report.rows(), key=lambda row: row["trial"])
    states = ["finished", "stopped early", "failed", "failed", "running", "failed"]
    assert [row["state"] for row in rows] == states
    assert [rows[0]["seconds"], rows[0]["parameters"]] == [90, {LR: 0.1, "x": None}]
    assert rows[1]["value"] == 190.0
    assert "never a number" in rows[2]["error"]
    assert rows[3]["error"] == "W&B calls the run crashed, its log is at https://page"
    assert rows[3]["parameters"] == {"x": None}, "0.3 is not in the file"


@pytest.mark.parametrize(("error", "notes"), [(Exception(), 1), (Exception("x"), 0), (ValueError(), 0)])
def test_the_agents_stop_is_noted(error: Exception, notes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[int] = []
    monkeypatch.setattr("clip_lightning.experiments.sweeps.watch.note_stop", lambda: noted.append(1))
    NotesStop().on_exception(None, None, error)  # type: ignore[arg-type]
    assert len(noted) == notes


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("gone\naway")

    monkeypatch.setattr("wandb.Api", refuse)
    monkeypatch.setattr("wandb.sweep", refuse)
    with pytest.raises(UserError, match=r"e/p/s cannot be read from W&B \(gone away\); the same command"):
        sweep_runs("e/p/s")
    with pytest.raises(
        UserError, match=r"did not make the sweep \(gone away\).*--trainer.logger.offline true"
    ):
        create_sweep({}, None, "p")


@pytest.mark.slow
def test_the_same_file_on_wandbs_own_command_line(
    wandb_server: WandbServer, sweep_file: Path, tmp_path: Path
) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for words in (["sweep", sweep_file.name], ["agent", "--count", "1", "tester/p/sweep000"]):
        command = [sys.executable, "-m", "wandb", *words]
        environment = os.environ | {"PATH": path}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert learning_rates(wandb_server) == [0.001]
    assert {run.config["model"]["heads"]["embed_dim"] for run in wandb_server.runs.values()} == {16}
