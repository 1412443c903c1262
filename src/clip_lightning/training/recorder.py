"""Writes the results of a run: configuration, metrics, timings, bundle and the list of broken images."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import SafetensorError

import clip_lightning
from clip_lightning.errors import RunFailed
from clip_lightning.files import write_atomically
from clip_lightning.model.clip import parameter_counts
from clip_lightning.run_folder import BEST, RunFolder
from clip_lightning.timing import Stopwatch
from clip_lightning.tracking.logger import RunLogger
from clip_lightning.training.checkpoints import all_ranks_save
from clip_lightning.training.sharding import gather_on_first_rank

MONITOR = "val/rsum"
MEMORY_SECONDS = 5
VERSIONED = ("torch", "lightning", "timm", "transformers", "wandb")


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, except that it finds the best checkpoint in a folder that was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace the path of the best checkpoint by that in the run's present folder."""
        here = Path(str(self.dirpath), BEST)
        if here.is_file() and state_dict["best_k_models"]:
            names = dict.fromkeys(("best_model_path", "kth_best_model_path"), str(here))
            scores = {str(here): state_dict["best_model_score"]}
            state_dict = {**state_dict, **names, "dirpath": self.dirpath, "best_k_models": scores}
        super().load_state_dict(state_dict)


class RunRecorder(Callback):
    """Writes `config.yaml`, `metrics.json`, `model/` and `broken.json`, and measures time and memory.

    Args:
        folder: the folder of the run.
        config: the complete configuration in YAML. Lightning's SaveConfigCallback would conflict with W&B's
            `config.yaml`, and sends nothing to loggers.

    Attributes:
        metrics: the metrics of the best epoch by `val/rsum`, without the prefix `val/`.
    """

    def __init__(self, folder: Path, config: str) -> None:
        self.run, self.config = RunFolder(folder), config
        self.metrics: dict[str, float] = {}
        self.stopwatch = Stopwatch()
        self._samples = 0
        self._peak_memory = 0
        self._memory_noted = float("-inf")
        self._finished = False
        self._last_log = self._progress()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration, and log it together with the digest of the data."""
        self.stopwatch = pl_module.stopwatch  # started when the module was built
        pl_module._log_hyperparams = False  # the configuration contains them
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        write_atomically(self.run.config, self.config.encode())
        data: Any = getattr(trainer, "datamodule", None)
        content = {**yaml.safe_load(self.config), "data_digest": data.digest}
        content["model"]["loss"] = content["model"]["loss"] or type(pl_module.loss).__name__
        if data.fetched:
            content["data_artifact"] = str(data.fetched.name)
        for logger in trainer.loggers:
            logger.log_hyperparams(content)

    def state_dict(self) -> dict[str, Any]:
        """Return the metrics and measurements, which a resumed run continues."""
        return {
            "metrics": self.metrics,
            "seconds": self.stopwatch.seconds,
            "samples": self._samples,
            "peak_memory": self._peak_memory,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the metrics and measurements."""
        if self.run.best.is_file():
            self.metrics = state_dict["metrics"]  # they are those of that file
        for part, seconds in state_dict["seconds"].items():
            self.stopwatch.seconds[part] += seconds
        self._samples = state_dict["samples"]
        self._peak_memory = state_dict["peak_memory"]
        self._last_log = self._progress()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the preparation: towers, features and loaders."""
        self.stopwatch.lap("preparation")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what runs between epochs: checkpoints, panels and logs."""
        self.stopwatch.lap("other")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure the time spent waiting for this batch."""
        self.stopwatch.lap("waiting_for_data")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log throughput and the fraction of time spent waiting for data."""
        self.stopwatch.lap("optimiser")
        self._samples += len(batch["image_id"]) * trainer.world_size
        if trainer.global_step % max(trainer.log_every_n_steps, 1) == 0:
            now = self._progress()
            samples, waiting, step = (new - old for new, old in zip(now, self._last_log, strict=True))
            seconds = max(waiting + step, 1e-9)
            pl_module.log("train/samples_per_second", samples / seconds)
            pl_module.log("train/data_wait_share", waiting / seconds)
            self._last_log = now
            self._note_memory()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what runs before the evaluation."""
        self.stopwatch.lap("other")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the metrics of the best epoch."""
        self.stopwatch.lap("evaluation")
        if trainer.sanity_checking:
            return
        self._note_memory()
        metrics = {
            name.removeprefix("val/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        if "rsum" in metrics and metrics["rsum"] > self.metrics.get("rsum", float("-inf")):
            obsolete = self.metrics.keys() - metrics.keys()
            self.metrics = {**metrics, "epoch": trainer.current_epoch, "step": trainer.global_step}
            self._summarize(trainer, {}, obsolete)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write all files."""
        self._finished = True
        self._write(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write all files if the resumed run was already trained, and an earlier attempt to write failed."""
        if not self._finished:
            self.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the results so far when the run is interrupted."""
        if trainer.global_step > 0:
            try:
                self._write(trainer, pl_module, model=all_ranks_save(trainer, exception))
            except RunFailed as error:  # printed, so that the first exception is raised
                print(error, file=sys.stderr)

    def _progress(self) -> tuple[float, float, float]:
        """Return the samples so far, and the seconds spent waiting for data and in steps."""
        return self._samples, self.stopwatch.seconds["waiting_for_data"], self.stopwatch.step_seconds

    def _note_memory(self) -> None:
        """Measure the memory every few seconds at most, since it takes 20 ms per gigabyte."""
        if time.perf_counter() - self._memory_noted > MEMORY_SECONDS:
            self._memory_noted = time.perf_counter()
            self._peak_memory = max(self._peak_memory, memory_of_processes())

    def _write(self, trainer: Trainer, pl_module: LightningModule, *, model: bool = True) -> None:
        if trainer.fast_dev_run:
            return
        weights = gather_on_first_rank(pl_module.state_dict()) if model else None
        if not trainer.is_global_zero:
            return
        self.stopwatch.lap("other")
        data: Any = getattr(trainer, "datamodule", None)
        record = self._record(pl_module, data)
        try:
            _write_json(self.run.metrics, record)
            self._summarize(trainer, {name: record[name] for name in record.keys() - self.metrics.keys()})
            if data and data.broken:
                _write_json(self.run.broken, data.broken)
            if weights is not None:
                about = {"digest": data.digest} if data else {}
                about |= {"artifact": str(data.fetched.name)} if data and data.fetched else {}
                name = type(pl_module.loss).__name__
                pl_module.clip.save_pretrained(
                    self.run.model,
                    weights=_best_weights(trainer, weights),
                    metadata={"metrics": self.metrics, "loss": name, "training_data": about},
                )
        except (OSError, SafetensorError) as error:
            raise RunFailed(
                f"metrics and model cannot be written to {self.run.path} ({error}); the checkpoints are "
                "intact: free disk space, and resume with --ckpt_path last"
            ) from error

    def _record(self, pl_module: LightningModule, data: Any) -> dict[str, Any]:
        """Return the content of `metrics.json`."""
        seconds = self.stopwatch.seconds
        training = seconds["waiting_for_data"] + self.stopwatch.step_seconds
        gpu = torch.cuda.is_available()
        return {
            **self.metrics,
            "finished": self._finished,
            "seconds": round(sum(seconds.values()), 1),
            **{f"seconds_{part}": round(spent, 1) for part, spent in seconds.items()},
            "samples_per_second": round(self._samples / max(training, 1e-9), 1),
            "peak_memory_bytes": self._peak_memory,
            **({"peak_gpu_memory_bytes": torch.cuda.max_memory_allocated()} if gpu else {}),
            **parameter_counts(pl_module.clip),
            "data_digest": data.digest if data else "",
            **({"data_artifact": str(data.fetched.name)} if data and data.fetched else {}),
            "version_clip_lightning": clip_lightning.__version__,
            **{f"version_{name}": importlib.metadata.version(name) for name in VERSIONED},
        }

    def _summarize(self, trainer: Trainer, costs: dict[str, Any], obsolete: Iterable[str] = ()) -> None:
        """Set the summary of the W&B run to the content of `metrics.json`."""
        best = {f"val/{name}": value for name, value in self.metrics.items() if name not in ("epoch", "step")}
        best |= {"best_epoch": self.metrics["epoch"]} if self.metrics else {}
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.summarize(best | costs, [f"val/{name}" for name in obsolete])


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_atomically(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _best_weights(trainer: Trainer, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of the best checkpoint without the prefix `clip.`, by default `weights`."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, BestCheckpoint) and Path(callback.best_model_path).is_file():
            checkpoint = torch.load(callback.best_model_path, map_location="cpu", weights_only=True)
            # frozen towers are not in the checkpoint, and have not changed
            weights = weights | checkpoint["state_dict"] | checkpoint.get("adapters", {})
    return {name.removeprefix("clip."): weights[name] for name in weights if name.startswith("clip.")}


def memory_of_processes() -> int:
    """Return the resident bytes of this process and its workers; on Linux, shared pages count once."""
    me = psutil.Process()
    total = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            info = process.memory_full_info()
            total += getattr(info, "pss", info.rss)
        except psutil.Error:
            continue
    return total
