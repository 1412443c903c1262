"""The folder of a run: its name, what marks it, and which run is the newest."""

from __future__ import annotations

import os
from pathlib import Path

from clip_lightning.run_folder import RunFolder


def test_the_newest_run_is_last_and_other_programs_configurations_are_not_runs(tmp_path: Path) -> None:
    for age, name in enumerate(("newest", "older", "oldest", "other")):
        run = RunFolder(tmp_path / name)
        run.path.mkdir()
        run.config.write_text("server: x\n" if name == "other" else "model: {}\ntrainer: {}\n")
        os.utime(run.config, (1000 - age, 1000 - age))
    assert [run.path.name for run in RunFolder.runs(tmp_path)] == ["oldest", "older", "newest"]
    assert RunFolder.of_checkpoint(run.last) == RunFolder.of_checkpoint(run.best) == run


def test_new_runs_have_names_of_their_own_in_order_of_time(tmp_path: Path) -> None:
    runs = [RunFolder.new(tmp_path) for _ in range(50)]
    assert len({run.path for run in runs}) == 50
    assert [run.path.name[:15] for run in runs] == sorted(run.path.name[:15] for run in runs)
