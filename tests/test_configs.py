"""Every configuration that is shipped can be read, and runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from clip_lightning.__main__ import main

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))

# Lightning 2.6 calls jsonargparse by names that its newest versions deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


def header(config: Path) -> list[str]:
    lines = config.read_text().splitlines()
    return [line for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]]


def test_there_are_some() -> None:
    assert {"quickstart", "heads"} <= {config.stem for config in CONFIGS}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_the_header_says_how_to_run_it(config: Path) -> None:
    comments = header(config)
    assert len(comments) >= 2
    (command,) = (line for line in comments if "command:" in line)
    assert f"--config {config.stem}" in command or f"--config configs/{config.name}" in command


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_it_is_complete(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its name, as a user gives it: all that it says is in what the command understood."""
    assert main(["fit", "--config", config.stem, "--print_config"]) == 0
    understood = yaml.safe_load(capsys.readouterr().out)

    def check(given: dict, found: dict) -> None:
        for key, value in given.items():
            if isinstance(value, dict) and isinstance(found[key], dict):
                check(value, found[key])
            elif not isinstance(value, dict):
                # a loss may be given by its short name
                name = found[key]["class_path"] if isinstance(found[key], dict) else found[key]
                assert name == value or str(name).endswith(f".losses.{value}"), key

    check(yaml.safe_load(config.read_text()), understood)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_it_runs(config: Path, bert: Path, scenes: Path, tmp_path: Path) -> None:
    """Two steps and a validation, with tiny towers on tiny pictures."""
    tiny = {
        "model.image_tower": "random:test_resnet",
        "model.text_tower": f"random:{bert}",
        "data.read.layout": "auto",
        "data.root": scenes,
        "model.towers.image_size": 32,
        "data.batch_size": 8,
        "data.num_workers": 0,
        "data.cache": tmp_path / "cache",
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": tmp_path / "runs",
        "trainer.max_epochs": 1,
        "trainer.limit_train_batches": 2,
    }
    words = [f"--{name}={value}" for name, value in tiny.items()]
    assert main(["fit", "--config", str(config), *words]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "model" / "model.safetensors").is_file()
    assert (run / "metrics.json").is_file()
