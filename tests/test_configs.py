"""Every configuration that is shipped can be read, and runs."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from clip_lightning.__main__ import main

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


def test_there_are_some() -> None:
    assert {"quickstart", "heads"} <= {config.stem for config in CONFIGS}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_the_header_says_how_to_run_it(config: Path) -> None:
    comments = [*itertools.takewhile(lambda line: line.startswith("#"), config.read_text().splitlines())]
    assert len(comments) >= 2
    (command,) = (line for line in comments if "command:" in line)
    assert f"--config {config.stem}" in command or f"--config configs/{config.name}" in command


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_it_runs(config: Path, command: Callable[..., list[str]], tmp_path: Path) -> None:
    """Two steps and a validation, with tiny towers on tiny images."""
    small = {"trainer__max_epochs": 1, "trainer__limit_train_batches": 2, "data__batch_size": 8}
    own = {"data__read__layout": "auto", "data__cache": tmp_path / "cache"}
    words = command("fit", tmp_path / "runs", **small, **own)[1:]
    assert main(["fit", f"--config={config.stem}", *words]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "model" / "model.safetensors").is_file()
    assert (run / "metrics.json").is_file()
