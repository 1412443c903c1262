"""What a run leaves behind: metrics, timings, the bundle, the list of broken pictures."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
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
from clip_lightning.model.sharded_checkpoints import read_checkpoint
from clip_lightning.timing import Stopwatch
from clip_lightning.training.checkpoints import all_ranks_save
from clip_lightning.training.sharding import whole_weights

MONITOR = "val/rsum"
MEMORY_SECONDS = 5
VERSIONED = ("torch", "lightning", "timm", "transformers", "wandb")


class BestCheckpoint(ModelCheckpoint):
    """Lightning's, which after a resume in a folder that was moved still knows the best checkpoint there."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the file in this run's folder for the one that the state names elsewhere."""
        here = Path(str(self.dirpath), "best.ckpt")
        if here.is_file() and state_dict["best_k_models"]:
            score = state_dict["best_model_score"]
            state_dict = {
                **state_dict,
                "dirpath": self.dirpath,
                "best_model_path": str(here),
                "kth_best_model_path": str(here),
                "best_k_models": {str(here): score},
            }
        super().load_state_dict(state_dict)


class SaveConfig(Callback):
    """Writes the complete configuration into the run's folder and sends it to the logger.

    Lightning's own callback would collide with W&B's `config.yaml`, and sends nothing.
    """

    def __init__(self, config: str, folder: Path) -> None:
        self.config = config
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs after the data module's setup, so that the data's digest is known."""
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(self.config)
        datamodule: Any = getattr(trainer, "datamodule", None)
        content = {**yaml.safe_load(self.config), "data_digest": datamodule.digest}
        if datamodule.fetched:
            content["data_artifact"] = str(datamodule.fetched.name)
        for logger in trainer.loggers:
            logger.log_hyperparams(content)


class RunRecorder(Callback):
    """Measures the run and writes `metrics.json`, `model/` and `broken.json` into the run's folder.

    Attributes:
        metrics: of the best epoch by `val/rsum`, by their plain names.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics: dict[str, float] = {}
        self.stopwatch = Stopwatch()
        self._samples = 0
        self._peak_memory = 0
        self._memory_noted = float("-inf")
        self._finished = False
        self._last_log = self._sums()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Share the module's stopwatch, which runs since it was built."""
        self.stopwatch = pl_module.stopwatch

    def state_dict(self) -> dict[str, Any]:
        """Travels in the checkpoint, so that a resumed run goes on counting."""
        return {
            "metrics": self.metrics,
            "seconds": self.stopwatch.seconds,
            "samples": self._samples,
            "peak_memory": self._peak_memory,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the counts of the run so far."""
        if (self.folder / "checkpoints" / "best.ckpt").is_file():
            self.metrics = state_dict["metrics"]  # they describe that file
        for part, seconds in state_dict["seconds"].items():
            self.stopwatch.seconds[part] += seconds
        self._samples = state_dict["samples"]
        self._peak_memory = state_dict["peak_memory"]
        self._last_log = self._sums()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All before this was preparation: towers, features, loaders."""
        self.stopwatch.lap("preparation")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Between epochs lie checkpoints, pictures and logs."""
        self.stopwatch.lap("other")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """All since the last batch was waiting for this one."""
        self.stopwatch.lap("waiting_for_data")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log throughput and the share of time spent waiting for data."""
        self.stopwatch.lap("optimiser")
        self._samples += len(batch["image_id"]) * trainer.world_size
        if trainer.global_step % max(trainer.log_every_n_steps, 1) == 0:
            now = self._sums()
            since = {name: now[name] - self._last_log[name] for name in now}
            seconds = max(since["waiting_for_data"] + since["step"], 1e-9)
            pl_module.log("train/samples_per_second", since["samples"] / seconds)
            pl_module.log("train/data_wait_share", since["waiting_for_data"] / seconds)
            self._last_log = now
            self._note_memory()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What comes now is evaluation."""
        self.stopwatch.lap("other")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of the best epoch."""
        self.stopwatch.lap("evaluation")
        if trainer.sanity_checking:
            return
        self._note_memory()
        now = {
            name.removeprefix("val/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        if "rsum" in now and now["rsum"] > self.metrics.get("rsum", float("-inf")):
            self.metrics = {**now, "epoch": trainer.current_epoch, "step": trainer.global_step}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write everything."""
        self._finished = True
        self._write(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it now, where training was done already and writing it had failed."""
        if not self._finished:
            self.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what there is, also when the run is interrupted."""
        if trainer.global_step > 0:
            try:
                self._write(trainer, pl_module, model=all_ranks_save(trainer, exception))
            except RunFailed as error:  # said, so that the first exception is the one that counts
                print(error, file=sys.stderr)

    def _note_memory(self) -> None:
        """Every few seconds at most: to ask takes 20 ms a gigabyte."""
        if time.perf_counter() - self._memory_noted > MEMORY_SECONDS:
            self._memory_noted = time.perf_counter()
            self._peak_memory = max(self._peak_memory, memory_of_processes())

    def _sums(self) -> dict[str, float]:
        return {
            "samples": self._samples,
            "waiting_for_data": self.stopwatch.seconds["waiting_for_data"],
            "step": self.stopwatch.step_seconds,
        }

    def _write(self, trainer: Trainer, pl_module: LightningModule, *, model: bool = True) -> None:
        if trainer.fast_dev_run:
            return
        weights = whole_weights(pl_module) if model else None  # if they are sharded, all ranks have to ask
        if not trainer.is_global_zero:
            return
        self.stopwatch.lap("other")
        try:
            self._write_files(trainer, pl_module, weights)
        except (OSError, SafetensorError) as error:
            raise RunFailed(
                f"metrics and model cannot be written to {self.folder} ({error}); checkpoints that are there "
                "stay: make room and go on with --ckpt_path last"
            ) from error

    def _write_files(
        self, trainer: Trainer, pl_module: LightningModule, weights: dict[str, torch.Tensor] | None
    ) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        seconds = self.stopwatch.seconds
        training = seconds["waiting_for_data"] + self.stopwatch.step_seconds
        record = {
            **self.metrics,
            "finished": self._finished,
            "seconds": round(sum(seconds.values()), 1),
            **{f"seconds_{part}": round(spent, 1) for part, spent in seconds.items()},
            "samples_per_second": round(self._samples / max(training, 1e-9), 1),
            "peak_memory_bytes": self._peak_memory,
            **parameter_counts(pl_module.clip),
            "data_digest": data.digest if data else "",
            **({"data_artifact": str(data.fetched.name)} if data and data.fetched else {}),
            "version_clip_lightning": clip_lightning.__version__,
            **{f"version_{name}": importlib.metadata.version(name) for name in VERSIONED},
        }
        if torch.cuda.is_available():
            record["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
        write_json(self.folder / "metrics.json", record)
        if data and data.broken:
            write_json(self.folder / "broken.json", data.broken)
        if weights is None:
            return
        metadata = {
            "metrics": self.metrics,
            "loss": type(pl_module.loss).__name__,
            "training_data": _training_data(data) if data else {},
        }
        pl_module.clip.save_pretrained(
            self.folder / "model", weights=_best_weights(trainer, weights), metadata=metadata
        )


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON, all or nothing."""
    write_atomically(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _training_data(data: Any) -> dict[str, str]:
    """What a bundle says of the data it was trained on."""
    said = {"dataset": data.dataset, "digest": data.digest}
    return said | ({"artifact": str(data.fetched.name)} if data.fetched else {})


def _best_weights(trainer: Trainer, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The CLIP weights of the best checkpoint, or the present ones, `weights`, where there is none."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, BestCheckpoint) and Path(callback.best_model_path).is_file():
            checkpoint = read_checkpoint(Path(callback.best_model_path), moments=False)
            stored = checkpoint["state_dict"] | checkpoint.get("adapters", {})
            weights = weights | stored  # frozen towers are not in the checkpoint and have not changed since
    return {name.removeprefix("clip."): weights[name] for name in weights if name.startswith("clip.")}


def memory_of_processes() -> int:
    """Resident bytes of this process and its workers; pages they share count once where Linux tells."""
    me = psutil.Process()
    total = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            info = process.memory_full_info()
            total += getattr(info, "pss", info.rss)
        except psutil.Error:
            continue
    return total
