"""The folder and the mode of a W&B run, by arguments, environment and settings."""

import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from jsonargparse import Namespace

from clip_lightning.tracking.logger import WAITS, RunLogger
from clip_lightning.training.cli import place_logger

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: Patch, tmp_path: Path) -> None:
    """Neither a key nor a folder is set; what the logger sets is taken back."""
    for name in ("WANDB_DATA_DIR", "WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(RunLogger, "_data_dir", None)


def mode_given(monkeypatch: Patch, folder: Path, setting: str, offline: bool | None = None) -> str | None:
    """Return the mode that `wandb.init` gets if W&B's settings have `setting`; None for theirs."""
    settings = SimpleNamespace(mode=setting, base_url="https://api.wandb.ai")
    monkeypatch.setattr("wandb.setup", lambda: SimpleNamespace(settings=settings))
    return RunLogger(save_dir=str(folder), offline=offline)._wandb_init.get("mode")


def test_disabled_and_shared_take_precedence(monkeypatch: Patch, tmp_path: Path) -> None:
    for setting, offline in itertools.product(("disabled", "shared"), (None, True, False)):
        assert mode_given(monkeypatch, tmp_path, setting, offline) is None


def test_without_a_key_the_run_is_offline(monkeypatch: Patch, tmp_path: Path) -> None:
    assert mode_given(monkeypatch, tmp_path, "online") == "offline"
    assert mode_given(monkeypatch, tmp_path, "online", offline=False) is None
    assert mode_given(monkeypatch, tmp_path, "offline") is None  # as in the settings
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key")
    assert mode_given(monkeypatch, tmp_path, "online") is None
    assert mode_given(monkeypatch, tmp_path, "online", offline=True) == "offline"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert mode_given(monkeypatch, tmp_path, "online") is None
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "online")  # set explicitly
    assert mode_given(monkeypatch, tmp_path, "online") is None


def test_environment_variables_apply_if_no_argument_is_given(monkeypatch: Patch, tmp_path: Path) -> None:
    def made(**given: str) -> dict[str, Any]:
        return RunLogger(save_dir=str(tmp_path), id="one", offline=True, **given)._wandb_init

    names = ("project", "name", "job_type")
    assert [made()[name] for name in names] == ["clip-lightning", "one", "train"]
    for name in names:
        monkeypatch.setenv(f"WANDB_{name.upper()}", f"my-{name}")
    assert [made()[name] for name in names] == ["my-project", "my-name", "my-job_type"]
    assert [made(project="p", name="n")[name] for name in names[:2]] == ["p", "n"]
    settings = Namespace(class_path="a.RunLogger", init_args=Namespace(id=None))
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    place_logger(settings, tmp_path / "folder")
    assert settings.init_args.id == "mine"


def test_rows_are_on_disk_after_a_second_if_wandb_was_used_before(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setitem(WAITS, "x_of_another_version", 1.0)
    wandb.setup()
    run = RunLogger(save_dir=str(tmp_path), offline=True).experiment
    assert (run.settings.x_transaction_log_flush_interval, run.settings.finish_timeout) == (1, 600)
    run.finish()
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "20")
    given = RunLogger(save_dir=str(tmp_path), offline=True)._wandb_init["settings"]
    assert given == {"x_transaction_log_flush_interval": 1}


def test_lightnings_logger_without_a_key_stays_offline(monkeypatch: Patch, tmp_path: Path) -> None:
    settings = SimpleNamespace(mode="online", base_url="https://api.wandb.ai")
    monkeypatch.setattr("wandb.setup", lambda: SimpleNamespace(settings=settings))
    logger = Namespace(class_path="a.WandbLogger", init_args=Namespace(log_model=True, project=None))
    place_logger(logger, tmp_path / "folder")
    assert (logger.init_args.mode, logger.init_args.log_model) == ("offline", False)
    monkeypatch.setenv("WANDB_API_KEY", "x")
    logger = Namespace(class_path="a.WandbLogger", init_args=Namespace(log_model=True, project="p"))
    place_logger(logger, tmp_path / "folder")
    assert (logger.init_args.get("mode"), logger.init_args.log_model) == (None, True)


def test_each_run_of_a_process_has_its_own_folder(monkeypatch: Patch, tmp_path: Path) -> None:
    for name in ("one", "two"):
        RunLogger(save_dir=str(tmp_path / name), offline=True)
        assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / name / "wandb")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "mine"))
    RunLogger(save_dir=str(tmp_path / "three"), offline=True)
    assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / "mine")
