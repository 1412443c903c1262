"""Writes the results of a run: configuration, metrics, timings, bundle and broken images."""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
from collections.abc import Callable, Iterable
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
from clip_lightning.files import write_atomically, write_json
from clip_lightning.model.clip import parameter_counts
from clip_lightning.run_folder import BEST, RunFolder
from clip_lightning.terminal import note
from clip_lightning.timing import Stopwatch
from clip_lightning.tracking.logger import RunLogger

MONITOR = "val/rsum"
VERSIONED = ("torch", "lightning", "timm", "transformers", "wandb")


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, except that it finds the best checkpoint in a folder that was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = str(Path(str(self.dirpath), BEST))
        if Path(here).is_file() and state_dict["best_k_models"]:
            paths = {"dirpath": self.dirpath, "best_model_path": here, "kth_best_model_path": here}
            state_dict = {**state_dict, **paths, "best_k_models": {here: state_dict["best_model_score"]}}
        super().load_state_dict(state_dict)


def _lap(part: str) -> Callable[..., None]:
    """Return a hook that attributes the time since the last hook to this part of the run."""
    return lambda recorder, *_: recorder.stopwatch.lap(part)


class RunRecorder(Callback):
    """Writes `config.yaml`, `metrics.json`, `model/` and `broken.json`, and measures time and memory.

    `config` is the complete configuration in YAML. Lightning's SaveConfigCallback would conflict with W&B's
    `config.yaml`, and sends nothing to loggers. `metrics` are those of the best epoch, without `val/`.
    """

    def __init__(self, folder: Path, config: str) -> None:
        self.run, self.config = RunFolder(folder), config
        self.metrics: dict[str, float] = {}
        self.stopwatch = Stopwatch()
        self._costs = {"samples": 0, "peak_memory": 0}
        self._memory_noted, self._memory_of_workers = float("-inf"), 0
        self._finished = False
        self._last_log = self._progress()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration, and log it together with the digest of the data."""
        self.stopwatch = pl_module.stopwatch  # started when the module was built
        pl_module._log_hyperparams = False  # the configuration contains them
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        write_atomically(self.run.config, self.config.encode())
        content = {**yaml.safe_load(self.config), **_data(trainer)}
        content["model"]["loss"] = content["model"]["loss"] or type(pl_module.loss).__name__
        for logger in trainer.loggers:
            logger.log_hyperparams(content)

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self.metrics, "seconds": self.stopwatch.seconds, **self._costs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.run.best.is_file():
            self.metrics = state_dict["metrics"]  # they are those of that file
        for part, seconds in state_dict["seconds"].items():
            self.stopwatch.seconds[part] += seconds
        self._costs = {name: state_dict[name] for name in self._costs}
        self._last_log = self._progress()

    on_train_start = _lap("preparation")  # of towers, features and loaders
    on_train_epoch_start = on_validation_start = _lap("other")  # checkpoints, panels and logs
    on_train_batch_start = _lap("waiting_for_data")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Log throughput and the fraction of time spent waiting for data."""
        self.stopwatch.lap("optimiser")
        self._costs["samples"] += len(batch["image_id"]) * trainer.world_size
        if trainer.global_step % max(trainer.log_every_n_steps, 1) == 0:
            now = self._progress()
            samples, waiting, step = (new - old for new, old in zip(now, self._last_log, strict=True))
            seconds = max(waiting + step, 1e-9)
            pl_module.log("train/samples_per_second", samples / seconds)
            pl_module.log("train/data_wait_share", waiting / seconds)
            self._last_log = now
            self._note_memory()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the metrics of the best epoch."""
        self.stopwatch.lap("evaluation")
        if trainer.sanity_checking:
            return
        self._note_memory()
        logged = trainer.callback_metrics.items()
        metrics = {name[len("val/") :]: float(value) for name, value in logged if name.startswith("val/")}
        if "rsum" in metrics and metrics["rsum"] > self.metrics.get("rsum", float("-inf")):
            obsolete = self.metrics.keys() - metrics.keys()
            self.metrics = {**metrics, "epoch": trainer.current_epoch, "step": trainer.global_step}
            self._summarize(trainer, {}, obsolete)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
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
                self._write(trainer, pl_module)
            except RunFailed as error:  # printed, so that the first exception is raised
                note(str(error))

    def _progress(self) -> tuple[float, float, float]:
        """Return the samples so far, and the seconds spent waiting for data and in steps."""
        return self._costs["samples"], self.stopwatch.seconds["waiting_for_data"], self.stopwatch.step_seconds

    def _note_memory(self) -> None:
        """Measure the memory; that of workers once per minute, since it takes 20 ms per gigabyte."""
        process = psutil.Process()
        if time.perf_counter() - self._memory_noted > 60:
            self._memory_noted, self._memory_of_workers = time.perf_counter(), 0
            for worker in process.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    self._memory_of_workers += worker.memory_full_info().uss  # without shared pages
        used = process.memory_info().rss + self._memory_of_workers
        self._costs["peak_memory"] = max(self._costs["peak_memory"], used)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `metrics.json`, `broken.json`, and the bundle of the best epoch."""
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        self.stopwatch.lap("other")
        data = _data(trainer)
        costs = {"finished": self._finished, **self._measured(), **parameter_counts(pl_module.clip), **data}
        costs["version_clip_lightning"] = clip_lightning.__version__
        costs |= {f"version_{name}": importlib.metadata.version(name) for name in VERSIONED}
        try:
            write_json(self.run.metrics, self.metrics | costs)
            self._summarize(trainer, costs)
            if trainer.datamodule.broken:
                write_json(self.run.broken, trainer.datamodule.broken)
            pl_module.clip.save_pretrained(
                self.run.model,
                weights=_best_weights(trainer, pl_module.state_dict()),
                metadata={
                    "metrics": self.metrics,
                    "loss": type(pl_module.loss).__name__,
                    "matryoshka": pl_module.matryoshka,
                    "training_data": {name.removeprefix("data_"): data[name] for name in data},
                },
            )
        except (OSError, SafetensorError) as error:
            raise RunFailed(
                f"metrics and model cannot be written to {self.run.path} ({error}); the checkpoints are "
                "intact: free disk space, and resume with --ckpt_path last"
            ) from error

    def _measured(self) -> dict[str, float]:
        """Return the time and the memory that the run has taken."""
        seconds = self.stopwatch.seconds
        training = seconds["waiting_for_data"] + self.stopwatch.step_seconds
        gpu = torch.cuda.is_available()
        return {
            "seconds": round(sum(seconds.values()), 1),
            **{f"seconds_{part}": round(spent, 1) for part, spent in seconds.items()},
            "samples_per_second": round(self._costs["samples"] / max(training, 1e-9), 1),
            "peak_memory_bytes": self._costs["peak_memory"],
            **({"peak_gpu_memory_bytes": torch.cuda.max_memory_allocated()} if gpu else {}),
        }

    def _summarize(self, trainer: Trainer, costs: dict[str, Any], obsolete: Iterable[str] = ()) -> None:
        """Set the summary of the W&B run to the content of `metrics.json`."""
        best = {f"val/{name}": value for name, value in self.metrics.items() if name not in ("epoch", "step")}
        best |= {"best_epoch": self.metrics["epoch"]} if self.metrics else {}
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.summarize(best | costs, [f"val/{name}" for name in obsolete])


def _data(trainer: Trainer) -> dict[str, str]:
    """Return the digest of the data, and the name of its W&B artifact if there is one."""
    data: Any = trainer.datamodule
    artifact = {"data_artifact": str(data.fetched)} if data.fetched else {}
    return {"data_digest": data.digest, **artifact}


def _best_weights(trainer: Trainer, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of the best checkpoint without the prefix `clip.`, by default `weights`."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, BestCheckpoint) and Path(callback.best_model_path).is_file():
            checkpoint = torch.load(callback.best_model_path, map_location="cpu", weights_only=True)
            # frozen towers are not in the checkpoint, and have not changed
            weights = weights | checkpoint["state_dict"] | checkpoint.get("adapters", {})
    return {name.removeprefix("clip."): weights[name] for name in weights if name.startswith("clip.")}
