"""What a search leaves in its folder: the best configuration, the table, pictures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from clip_lightning.experiments.sweeps.charts import draw
from clip_lightning.experiments.sweeps.file import SweepFile
from clip_lightning.experiments.sweeps.queue import interrupted
from clip_lightning.files import write_atomically

COLUMNS = ("rsum", "text_to_image_R@1", "image_to_text_R@1")
"""Metrics of a trial that the tables show."""
STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped early",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """A search's outcome.

    Attributes:
        file: what was searched.
        folder: where it lies.
        study: its trials.
    """

    file: SweepFile
    folder: Path
    study: optuna.Study

    @property
    def best(self) -> FrozenTrial | None:
        """The best finished trial."""
        finished = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        choose = max if self.file.maximize else min
        return choose(finished, key=lambda trial: trial.value or 0.0, default=None)

    def rows(self) -> list[Row]:
        """A row for each trial that was begun, the best first; those without a value last."""
        stopped = interrupted(self.study)
        begun = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state in STATES]
        rows = [self._row(trial, trial.number in stopped) for trial in begun]
        sign = -1 if self.file.maximize else 1
        order = list(STATES.values())

        def key(row: Row) -> tuple[bool, int, float]:
            value = row["value"]
            return (
                value is None,
                order.index(row["state"]) if row["state"] in order else 9,
                sign * (value or 0.0),
            )

        return sorted(rows, key=key)

    def _row(self, trial: FrozenTrial, was_stopped: bool) -> Row:
        attributes = trial.user_attrs
        drawn = {
            one.name: one.value(trial.params[one.label])
            for one in self.file.parameters
            if one.label in trial.params
        }
        seconds = None if trial.duration is None else trial.duration.total_seconds()
        return {
            "trial": trial.number,
            "state": "interrupted" if was_stopped else STATES[trial.state],
            "value": attributes.get("best", trial.value),
            "metrics": attributes.get("metrics", {}),
            "parameters": drawn,
            "seconds": None if seconds is None else round(seconds, 1),
            "run": attributes.get("run"),
            "error": attributes.get("error"),
        }

    def summary(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        best = self.best
        return {
            "study": self.study.study_name,
            "folder": str(self.folder),
            "metric": self.file.metric,
            "goal": "maximize" if self.file.maximize else "minimize",
            "best": None if best is None else self._row(best, False),
            "best_config": None if best is None else str(self.folder / "best.yaml"),
            "trials": self.rows(),
        }

    def write(self, words: Callable[[dict[str, Any]], list[str]]) -> None:
        """Write everything into the folder.

        Args:
            words: of `fit`, for what a trial drew.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        rows, summary = self.rows(), self.summary()
        if self.best is not None:
            write_atomically(self.folder / "best.yaml", self._best_config(words).encode())
        content = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.folder / "trials.json", content.encode())
        write_atomically(self.folder / "trials.csv", self._csv(rows).encode())
        write_atomically(self.folder / "trials.md", (self._markdown(rows)).encode())
        draw(self.file, self.study, self.folder)

    def _best_config(self, words: Callable[[dict[str, Any]], list[str]]) -> str:
        from clip_lightning.training.fitting import rehearse

        assert self.best is not None
        row = self._row(self.best, False)
        config = rehearse(words(self.best.params)).config_to_save
        head = (
            f"# Trial {row['trial']} of the search {self.study.study_name}, the best by {self.file.metric}: "
            f"{row['value']:.2f}\n"
            f"# command:  clip-lightning fit --config {self.folder / 'best.yaml'}\n"
        )
        return head + config

    def _header(self) -> list[str]:
        names = [one.name for one in self.file.parameters]
        return ["trial", "state", self.file.metric, *self._metrics(), "seconds", *names]

    def _metrics(self) -> list[str]:
        """Those in the tables beside the one that is searched by."""
        return [name for name in COLUMNS if f"val/{name}" != self.file.metric]

    def _cells(self, row: Row) -> list[Any]:
        metrics = [row["metrics"].get(name) for name in self._metrics()]
        values = [row["parameters"].get(one.name) for one in self.file.parameters]
        return [row["trial"], row["state"], row["value"], *metrics, row["seconds"], *values]

    def _csv(self, rows: list[Row]) -> str:
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow([*self._header(), "run", "error"])
        writer.writerows([*self._cells(row), row["run"], row["error"]] for row in rows)
        return text.getvalue()

    def _markdown(self, rows: list[Row]) -> str:
        header = self._header()
        cells = [
            [shown(value, ".2f" if n < header.index("seconds") else ".4g") for n, value in enumerate(line)]
            for line in map(self._cells, rows)
        ]
        lines = [header, ["---"] * len(header), *cells]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        goal = "more" if self.file.maximize else "less"
        how = f"{self.file.method}, {self.file.metric} ({goal} is better)"
        return f"# Search {self.study.study_name}\n\n{how}\n\n{table}\n"


def shown(value: Any, form: str = ".4g") -> str:
    """A value for people: numbers short, nothing where there is none."""
    if value is None:
        return ""
    return format(value, form) if isinstance(value, float) else str(value)
