"""A W&B run that is killed, resumed or disconnected is one run, with every step once."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch import LightningModule
from processes import the_run
from small_runs import data, trainer
from wandb_server import API_KEY, Run, WandbServer
from wandb_store import content_path

from clip_lightning.__main__ import main
from clip_lightning.tracking.lineage import Alerts
from clip_lightning.tracking.logger import History, RunLogger, finished_run, go_back
from clip_lightning.training.build import HeadOptions

STEPS = 4  # batches of 8 of the 32 training scenes
EPOCHS = 5


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(name="start")
def start_fixture(command: Callable[..., list[str]], tmp_path: Path) -> Start:
    """Starts a small `fit` that logs every step; `at` is the step at which it lingers."""

    def begin(root: Path, *more: str, at: int | None = None, **environment: str) -> subprocess.Popen[str]:
        options = {"data__batch_size": 8, "predictions__queries": 0, "trainer__max_epochs": EPOCHS}
        options |= {"trainer__log_every_n_steps": 1, "trainer__logger": ...}
        if at is not None:
            options |= {"trainer__callbacks+": "processes.Linger", "trainer__callbacks__step": at}
            options |= {"trainer__callbacks__note": root / f"at-{at}"}
        own = {"XDG_CACHE_HOME": str(tmp_path / "cache"), **environment}
        line = [sys.executable, "-m", "clip_lightning", *command("fit", root, **options), *more]
        return subprocess.Popen(line, env=os.environ | own, stderr=subprocess.PIPE, text=True)

    return begin


def wait_at(root: Path, step: int, process: subprocess.Popen[str]) -> Path:
    """Wait until the run lingers in this step; gives the note that ends it."""
    deadline = time.monotonic() + 120
    while not (root / f"at-{step}").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.05)
    return root / f"at-{step}"


def kill_at(start: Start, root: Path, step: int, *more: str, **environment: str) -> None:
    """Kill the run with -9 in the step after `step`."""
    with start(root, *more, at=step, **environment) as process:
        wait_at(root, step, process)
        process.send_signal(signal.SIGKILL)


def finish(start: Start, root: Path, *more: str, **environment: str) -> str:
    """Run to the end; gives what stderr says."""
    with start(root, *more, **environment) as process:
        said = process.communicate(timeout=280)[1]
    assert process.returncode == 0, said
    assert "Traceback" not in said, said
    return said


def curve(run: Run, name: str) -> list[tuple[int, float]]:
    return [(row["trainer/global_step"], row[name]) for row in run.history if name in row]


@pytest.mark.slow
def test_a_run_killed_twice_is_one_run(wandb_server: WandbServer, start: Start, tmp_path: Path) -> None:
    finish(start, tmp_path / "undisturbed")
    kill_at(start, tmp_path / "runs", 2 * STEPS + 2)
    kill_at(start, tmp_path / "runs", 4 * STEPS + 1, "--ckpt_path=last")
    finish(start, tmp_path / "runs", "--ckpt_path=last")

    runs = {key[2]: run for key, run in wandb_server.runs.items()}
    assert len(runs) == 2
    whole, resumed = (runs[the_run(tmp_path / root).name] for root in ("undisturbed", "runs"))
    assert resumed.state == "finished"
    for name in ("train/loss", "train/scale", "val/rsum", "val/text_to_image_R@1"):
        assert curve(resumed, name) == curve(whole, name), name
    assert len(curve(whole, "train/loss")) == EPOCHS * STEPS
    assert resumed.summary["val/rsum"] == whole.summary["val/rsum"]
    rsums = {
        json.loads((the_run(tmp_path / root) / "metrics.json").read_text())["rsum"]
        for root in ("undisturbed", "runs")
    }
    assert len(rsums) == 1


def sync(folder: Path) -> None:
    """Upload the offline parts of a run, as the documentation says."""
    parts = sorted((folder / "wandb").glob("offline-run-*"))
    command = [sys.executable, "-m", "wandb", "sync", *map(str, parts)]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", ["torn, offline", "torn, online", "synced, offline", "finished, offline"])
def test_an_offline_run_is_one(wandb_server: WandbServer, start: Start, tmp_path: Path, case: str) -> None:
    before, after = case.split(", ")
    if before == "finished":
        finish(start, tmp_path / "runs", "--trainer.max_epochs=3", WANDB_MODE="offline")
    else:
        kill_at(start, tmp_path / "runs", 3 * STEPS + 1, WANDB_MODE="offline")
    folder = the_run(tmp_path / "runs")
    (log,) = folder.glob("wandb/offline-run-*/*.wandb")
    if before == "synced":
        sync(folder)
    elif before == "torn":
        os.truncate(log, log.stat().st_size // 2)  # as a kill may do
    assert bool(wandb_server.runs) == (before == "synced")  # although a key is configured
    finish(start, tmp_path / "runs", "--ckpt_path=last", WANDB_MODE=after)
    if after == "offline":
        sync(folder)
    assert log.exists() == (before != "torn")
    (run,) = wandb_server.runs.values()
    assert [step for step, _ in curve(run, "train/loss")] == [*range(EPOCHS * STEPS)]
    assert [step for step, _ in curve(run, "val/rsum")] == [STEPS * (n + 1) - 1 for n in range(EPOCHS)]
    assert run.state == "finished"


@pytest.mark.slow
def test_two_ranks_are_one_run(wandb_server: WandbServer, start: Start, tmp_path: Path) -> None:
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=4"]
    finish(start, tmp_path / "runs", *options, "--trainer.max_epochs=2")
    (run,) = wandb_server.runs.values()
    assert [step for step, _ in curve(run, "train/loss")] == [*range(2 * STEPS)]
    assert len(wandb_server.collections[(*run.key[:2], f"model-{run.id}")].versions) == 1


@pytest.mark.slow
def test_a_preempted_run_logs_its_model(wandb_server: WandbServer, start: Start, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    registry = "--trainer.logger.link_to=wandb-registry-model/retrieval"
    with start(root, registry, at=STEPS + 2) as process:
        note = wait_at(root, STEPS + 2, process)
        process.send_signal(signal.SIGTERM)
        note.unlink()
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 143, said
    (run,) = wandb_server.runs.values()
    assert run.preempting
    assert "stopped" in [alert["title"] for alert in run.alerts]
    model = wandb_server.artifact(f"tester/clip-lightning/model-{run.id}:best")
    last = wandb_server.artifact(f"tester/clip-lightning/model-{run.id}-checkpoint:last")
    stored = wandb_server.blobs[content_path(last.contents["last.ckpt"]["digest"])]
    step = torch.load(io.BytesIO(stored), weights_only=True)["global_step"]
    assert step > STEPS  # of now, not of the epoch
    linked = wandb_server.collections["test-organization", "wandb-registry-model", "retrieval"]
    assert linked.find("latest") is model
    finish(start, root, "--ckpt_path=last")
    assert [step for step, _ in curve(run, "train/loss")] == [*range(EPOCHS * STEPS)]


@pytest.mark.slow
def test_online_then_offline_then_online(wandb_server: WandbServer, start: Start, tmp_path: Path) -> None:
    """The server lacks the end of an online part; an offline part must not take its place."""
    root = tmp_path / "runs"
    with start(root, at=STEPS + 2, WANDB_FINISH_TIMEOUT="5") as process:
        note = wait_at(root, STEPS + 2, process)
        wandb_server.stop()
        note.unlink()
        deadline = time.monotonic() + 60
        history = the_run(root) / "wandb" / f"history-{the_run(root).name}.jsonl"
        while f'"step": {3 * STEPS}' not in history.read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
    kill_at(start, root, 4 * STEPS + 1, "--ckpt_path=last", WANDB_MODE="offline")
    wandb_server.recover()
    finish(start, root, "--ckpt_path=last")
    (run,) = wandb_server.runs.values()
    assert [step for step, _ in curve(run, "train/loss")] == [*range(EPOCHS * STEPS)]


# what is logged twice ------------------------------------------------------------------------------------


def test_history_passes_each_row_once(tmp_path: Path) -> None:
    file = tmp_path / "wandb" / "history.jsonl"
    history = History(file)
    rows: list[tuple[int, dict[str, Any]]] = [
        (0, {"loss": 1.0, "epoch": 0}),
        (0, {"rsum": 5.0, "epoch": 0}),  # the same step, and epoch again
        (1, {"loss": 0.5, "epoch": 0}),
        (1, {"mine": 1.0}),
        (1, {"mine": 2.0}),  # the same metric at the same step
    ]
    assert all(history.is_new(row, step) for step, row in rows)
    assert history.is_new({"table": object()}, 1)
    with file.open("a") as torn:
        torn.write('\n{"step": 2, "lo')
    resumed = History(file)
    assert resumed.rows == [*rows, (1, {"table": None})]
    # it goes through step 1 a second time, and logs what was lost of it
    assert not any(resumed.is_new(row, step) for step, row in rows[2:])
    assert resumed.is_new({"mine": 3.0}, 1)
    assert resumed.is_new({"rsum": 4.0, "epoch": 0}, 1)
    assert resumed.is_new({"loss": 0.4, "epoch": 1}, 2)
    assert len(History(file).rows) == 9
    go_back(file)
    assert History(file).is_new({"loss": 0.45, "epoch": 1}, 2)
    assert len(History(file).rows) == 10


@pytest.fixture
def online(wandb_server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> WandbServer:
    """The server, for runs of this process."""
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setattr(RunLogger, "_data_dir", None)
    monkeypatch.delenv("WANDB_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return wandb_server


def test_the_summary_is_the_best_epoch_and_every_row_arrives(
    online: WandbServer, command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"trainer__logger": ..., "trainer__log_every_n_steps": 8, "model__optimizer__lr": 0.05}
    with finished_run():
        assert main(command("fit", tmp_path / "runs", trainer__max_epochs=3, **given)) == 0
    folder = the_run(tmp_path / "runs")
    run = online.runs["tester", "mine", folder.name]
    assert (run.display_name, run.job_type, run.alerts) == (folder.name, "train", [])
    assert run.config["model"]["loss"] == "InfoNCE"
    assert not [home for home in online.collections.values() if home.type == "code"]
    metrics = json.loads((folder / "metrics.json").read_text())
    recalls = {name: value for name, value in metrics.items() if "_R@" in name or name == "rsum"}
    assert {name: run.summary[f"val/{name}"] for name in recalls} == pytest.approx(recalls)
    assert run.summary["best_epoch"] == metrics["epoch"]
    costs = ("parameters", "parameters_trained", "seconds", "peak_memory_bytes", "version_torch")
    assert {name: run.summary[name] for name in costs} == {name: metrics[name] for name in costs}
    rows = [row for row in run.history if "val/rsum" in row]
    assert [(row["trainer/global_step"], row["epoch"]) for row in rows] == [(7, 0), (15, 1), (23, 2)]
    assert [row["epoch"] for row in run.history if "train/loss" in row] == [0, 1, 2]
    (tables,) = (row for row in run.history if "val/predictions" in row)
    assert tables["trainer/global_step"] == 23
    assert run.summary["val/predictions"]["nrows"] > 0

    best = str(folder / "checkpoints" / "best.ckpt")
    for name in ("test", "validate"):
        with finished_run():
            assert main(command(name, tmp_path / "other", ckpt_path=best, **given)) == 0
        scores = json.loads((folder / f"{name}.json").read_text())
        assert scores["scored"] == best and 0 <= scores["rsum"] <= 600
        assert run.summary[f"{name}/rsum"] == pytest.approx(scores["rsum"])
    assert scores["rsum"] == pytest.approx(metrics["rsum"]) == run.summary["val/rsum"]
    assert len(online.runs) == 1 and not list((tmp_path / "other").glob("*"))


def test_two_fits_of_a_process_are_two_runs(
    online: WandbServer, make_module: Callable[..., Any], scenes: Path, tmp_path: Path
) -> None:
    for number in (1, 2):
        module = make_module(heads=HeadOptions(embed_dim=16, dropout=number / 10), freeze="none")
        source = data(module, scenes, batch_size=16, captions_per_image=number)
        logger = RunLogger(save_dir=str(tmp_path / str(number)), name=f"run {number}", tags="mine")
        options = {"logger": logger, "max_steps": 1, "limit_val_batches": 0, "log_every_n_steps": 1}
        trainer(tmp_path, **options).fit(module, source)
        logger.experiment.log({"mine": number})
    wandb.finish()
    runs = list(online.runs.values())
    assert [(run.display_name, run.tags) for run in runs] == [("run 1", ["mine"]), ("run 2", ["mine"])]
    for number, run in enumerate(runs, 1):
        config = run.config
        model = config["model"]
        assert (model["heads"]["dropout"], model["image_tower"]) == (number / 10, "random:test_vit")
        assert config["model"]["optimizer"]["lr"] == module.optimizer.lr
        assert (config["data"]["captions_per_image"], config["data"]["root"]) == (number, str(scenes))
        assert (config["trainer"]["max_steps"], config["data_digest"]) == (1, source.digest)
        assert [row["mine"] for row in run.history if "mine" in row] == [number]


# alerts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "title", "said"),
    [
        ("loss", [1.0, math.nan, math.inf], "the loss is not finite", "not finite at step 20"),
        ("scale", [9.0, 1.5, 1.0], "the scale has collapsed", r"collapsed to 1\.50 at step 20"),
        # 190 steps at chance, one at which it learns, and 210 at chance
        (
            "loss_over_ln_batch",
            [*[1.0] * 19, 0.9, *[0.99] * 19, 1.01, 1.01],
            "the loss stays at ln(batch)",
            r"stays at ln\(batch\) up to step 400",
        ),
    ],
)
def test_a_failing_training_warns_once(name: str, values: list[float], title: str, said: str) -> None:
    titles: list[str] = []
    logger = RunLogger.__new__(RunLogger)
    logger._experiment = SimpleNamespace(id="x", alert=lambda title, text, level: titles.append(title))
    trainer = SimpleNamespace(log_every_n_steps=10, is_global_zero=True, fast_dev_run=False, loggers=[logger])
    alerts = Alerts()
    with pytest.warns(UserWarning, match=said) as warned:
        for step, value in enumerate(values, 1):
            trainer.global_step = 10 * step
            trainer.callback_metrics = {f"train/{name}": torch.tensor(value)}
            for _ in range(20):  # micro-batches of one step are one step
                alerts.on_train_batch_end(trainer, LightningModule(), None, None, 0)
    assert len(warned) == 1 and titles == [title]


# W&B out of order ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_a_server_the_run_is_offline(wandb_server: WandbServer, start: Start, tmp_path: Path) -> None:
    wandb_server.stop()
    said = finish(start, tmp_path / "runs", "--trainer.max_epochs=1", WANDB_INIT_TIMEOUT="10")
    assert "W&B failed to start the run, which is offline instead" in " ".join(said.split())
    folder = the_run(tmp_path / "runs")
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    for file in folder.rglob("*"):
        assert not file.is_file() or API_KEY.encode() not in file.read_bytes(), file
    wandb_server.recover()
    sync(folder)
    (run,) = wandb_server.runs.values()
    assert len(curve(run, "train/loss")) == STEPS
