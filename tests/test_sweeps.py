"""`sweep` online, on the test server: made, worked for in this process and by `wandb agent`, and told."""

from __future__ import annotations

import json
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
        "parameters": {LR: {"values": [0.001, 0.01]}, "model.embed_dim": {"value": 16}},
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
    assert "WANDB_SWEEP_ID" not in os.environ


def test_a_sweep_is_joined(
    wandb_server: WandbServer,
    sweep_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pyagent.Agent, "HEARTBEAT_SLEEP_SECONDS", 0.05)
    wandb_server.create_sweep("tester", "p", sweep_file.read_text())
    join = ["sweep", str(sweep_file), "--sweep_id", "tester/p/sweep000"]
    assert main([*join, "--trials", "1"]) == 0
    assert learning_rates(wandb_server) == [0.001]
    assert main([*join, "--json"]) == 0
    assert learning_rates(wandb_server) == [0.001, 0.01]
    assert len(json.loads(capsys.readouterr().out[-5000:].splitlines()[-1])["trials"]) == 2


def test_a_wrong_id_is_told(
    wandb_server: WandbServer, sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(sweep_file), "--sweep_id", "sweep000"]) == 2
    assert "--sweep_id sweep000: expected ENTITY/PROJECT/ID" in capsys.readouterr().err


def test_a_run_that_fit_refuses_is_failed(
    wandb_server: WandbServer,
    sweep_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pyagent.Agent, "HEARTBEAT_SLEEP_SECONDS", 0.05)
    content = yaml.safe_load(sweep_file.read_text())
    content["parameters"]["model.dropout"] = {"values": [2.0, 0.0]}
    del content["parameters"][LR]
    sweep_file.write_text(yaml.safe_dump(content))
    assert main(["sweep", str(sweep_file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["best"]["parameters"] == {"model.dropout": 0.0}


@pytest.mark.slow
def test_the_same_file_on_wandbs_own_command_line(
    wandb_server: WandbServer, sweep_file: Path, tmp_path: Path
) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for words in (["sweep", sweep_file.name], ["agent", "tester/p/sweep000"]):
        command = [sys.executable, "-m", "wandb", *words]
        environment = os.environ | {"PATH": path}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert learning_rates(wandb_server) == [0.001, 0.01]
    assert {run.config["model"]["embed_dim"] for run in wandb_server.runs.values()} == {16}
