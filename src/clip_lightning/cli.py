"""`fit`, `validate` and `test`: LightningCLI with our defaults, links, run folders and messages."""

from __future__ import annotations

import logging
import os
import pickle
import secrets
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from clip_lightning.arguments import complain
from clip_lightning.data.datamodule import CaptionDataModule
from clip_lightning.errors import UserError
from clip_lightning.module import CLIPModule
from clip_lightning.recorder import MONITOR, GracefulStop, RunRecorder
from clip_lightning.tracking.tables import PredictionTable

TRAINER_DEFAULTS = {
    "default_root_dir": "runs",
    "max_epochs": 20,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,  # one line says it
    "use_distributed_sampler": False,  # our samplers know of ranks
    "logger": {"class_path": "clip_lightning.tracking.logger.RunLogger"},
}


# Warnings that say nothing to the user of a command.
QUIET = (
    ".*Checkpoint directory .* is not empty.*",  # a resumed run's
    ".*module\\(s\\) in eval mode.*",  # frozen towers are meant to be
    ".*smaller than the logging interval.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning 2.6 with torch 2.15
    ".*all_gather is deprecated.*",  # likewise
    ".*callbacks used to create the checkpoint need to be provided.*",  # not for scoring
    ".*ended before the epoch ended and your dataloader is not resumable.*",  # ours skips what was done
)


class Parser(LightningArgumentParser):
    """LightningCLI's parser; it takes whole option names only, and its complaints are one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong and leave with status 2."""
        complain(getattr(ex, "subcommand_parser", None) or self, message)


class ProgressBar(RichProgressBar):
    """Lightning's bar on stderr, without the logger's version number."""

    def __init__(self) -> None:
        super().__init__(console_kwargs={"stderr": True})

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What the bar shows behind the time."""
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        return shown


class RunCLI(LightningCLI):
    """Builds model, data and trainer from the command line and gives the run its folder."""

    run_folder: Path
    config_to_save: str

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer's methods that are commands, and their arguments that are none of the user's."""
        return {name: LightningCLI.subcommands()[name] for name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Callbacks with options, and what one part takes from another."""
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.set_defaults(
            {
                "early_stopping.monitor": MONITOR,
                "early_stopping.mode": "max",
                "early_stopping.patience": 5,
                "early_stopping.check_on_train_epoch_end": False,
            }
        )
        parser.add_lightning_class_args(PredictionTable, "predictions")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("data.image_size", "model.image_size")
        parser.link_arguments("model.transform", "data.transform", apply_on="instantiate")
        parser.link_arguments("model.tokenize", "data.tokenize", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words given; Lightning's own version warns of any that do not come from the process."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Settle the run's folder, the checkpoint to start from, and where loggers write."""
        config = self.config[self.subcommand]
        # re-runnable, so taken before the run's own folder and id are put in
        parser = self._parser(self.subcommand)
        self.config_to_save = parser.dump(config, skip_unset=False)
        root = Path(config.trainer.default_root_dir)
        checkpoint = _checkpoint(config.ckpt_path, root)
        if checkpoint is not None:
            config.ckpt_path = str(checkpoint)
            config.weights_only = True  # a checkpoint may come from a stranger
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--trainer.default_root_dir {root} cannot be written ({error.strerror}); give another folder"
            ) from error
        resumed = checkpoint is not None and _is_run(checkpoint.parent.parent) and self.subcommand == "fit"
        self.run_folder = checkpoint.parent.parent if resumed and checkpoint else root / _new_run_id()
        if self.subcommand != "fit":
            # a score is printed; it is no run of its own
            config.trainer.logger = config.trainer.enable_checkpointing = False
        loggers = config.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if isinstance(logger, Namespace):
                _place_logger(logger, self.run_folder)

    def _parse_ckpt_path(self) -> None:
        """Lightning would take hyperparameters from the checkpoint; ours are all in the configuration."""

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError(f"--seed_everything: {error}") from error

    def after_instantiate_classes(self) -> None:
        """Compare the model with the checkpoint before frozen towers run for minutes."""
        checkpoint = self.config[self.subcommand].ckpt_path
        if checkpoint is not None:
            _check_fits(Path(checkpoint), self.model)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with the callbacks that every run has."""
        config = self._get(self.config_init, "trainer")
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        config["callbacks"] = [*given, *self._own_callbacks(config)]
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, ModuleNotFoundError) as error:  # an accelerator or strategy that is not there
            raise UserError(f"--trainer: {error}") from error

    def _own_callbacks(self, trainer_config: Any) -> list[Callback]:
        bar = [ProgressBar()] if trainer_config.get("enable_progress_bar") is not False else []
        if self.subcommand != "fit":
            return bar
        predictions = self._get(self.config_init, "predictions")
        predictions.folder = predictions.folder or self.run_folder
        checkpoints = self.run_folder / "checkpoints"
        callbacks: list[Callback] = [
            *bar,
            GracefulStop(),
            SaveConfig(self.config_to_save, self.run_folder),
            RunRecorder(self.run_folder),
            # two policies: `last` is written at every epoch's end and when the run is interrupted
            ModelCheckpoint(checkpoints, "best", MONITOR, mode="max", enable_version_counter=False),
            ModelCheckpoint(
                checkpoints,
                "last",
                save_on_train_epoch_end=True,
                save_on_exception=True,
                enable_version_counter=False,
            ),
        ]
        if trainer_config.get("logger"):
            callbacks.append(LearningRateMonitor(logging_interval="step"))
        return callbacks

    def before_fit(self) -> None:
        """Say where everything goes."""
        if self.trainer.is_global_zero:
            sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
            trained, total = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
            print(f"training {trained:,} of {total:,} parameters", file=sys.stderr)
            checkpoint = self.config["fit"].ckpt_path
            print(f"run folder: {self.run_folder}", file=sys.stderr)
            if checkpoint:
                print(f"going on from {checkpoint}", file=sys.stderr)

    def after_fit(self) -> None:
        """Print the result."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            recorder = next(c for c in self.trainer.callbacks if isinstance(c, RunRecorder))
            print_metrics(recorder.metrics, self.run_folder)


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
        for logger in trainer.loggers:
            logger.log_hyperparams(content)


def print_metrics(metrics: dict[str, float], folder: Path) -> None:
    """Show the best epoch's metrics and where everything lies, on stdout."""
    console = Console()
    if metrics:
        table = Table(title=f"best epoch: {metrics['epoch']:.0f}", title_justify="left")
        for column in ("", "R@1", "R@5", "R@10", "median rank", "mean rank"):
            table.add_column(column, justify="right" if column else "left")
        for direction in ("text_to_image", "image_to_text"):
            values = [metrics[f"{direction}_{m}"] for m in ("R@1", "R@5", "R@10", "median_rank", "mean_rank")]
            table.add_row(direction.replace("_to_", " → "), *(f"{value:.1f}" for value in values))
        console.print(table)
        console.print(f"rsum {metrics['rsum']:.1f}")
    console.print(f"run folder: {folder}", soft_wrap=True)


def run(args: list[str]) -> None:
    """Run `fit`, `validate` or `test` with the words of the command line, the command first.

    Raises:
        UserError: what was asked for cannot be done.
    """
    transformers.utils.logging.disable_progress_bar()  # of loading weights, over in a blink
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers tokenise, one core each
    # Lightning's news of accelerators that are not there, and its advertisement; warnings stay
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for message in QUIET:
        warnings.filterwarnings("ignore", message)
    try:
        RunCLI(
            CLIPModule,
            CaptionDataModule,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=Parser,
            args=_with_logger_folder(_named_configs(args)),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
    except MisconfigurationException as error:  # Lightning's word for what its options cannot do
        raise UserError(str(error)) from error


def _named_configs(args: list[str]) -> list[str]:
    """Let `--config heads` mean the packaged `configs/heads.yaml`, unless a file has that name."""
    found = []
    for before, word in zip(["", *args], args, strict=False):
        option, equals, value = word.partition("=")
        if equals and option in ("--config", "-c"):
            word = f"{option}={_config_path(value)}"
        elif before in ("--config", "-c"):
            word = _config_path(word)
        found.append(word)
    return found


def _with_logger_folder(args: list[str]) -> list[str]:
    """Let `--trainer.logger CSVLogger` do without the folder it asks for: that is the run's."""
    found = []
    for before, word in zip(["", *args], args, strict=False):
        found.append(word)
        name = word.removeprefix("--trainer.logger=") if before != "--trainer.logger" else word
        chosen = before == "--trainer.logger" or word.startswith("--trainer.logger=")
        if chosen and name.rpartition(".")[2] in ("CSVLogger", "TensorBoardLogger"):
            found.append("--trainer.logger.save_dir=.")
    return found


def _config_path(name: str) -> str:
    if Path(name).is_file():
        try:
            yaml.safe_load(Path(name).read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"--config {name} is no YAML: {error}") from error
        return name
    here = Path(__file__).parent
    folders = [folder for folder in (here / "configs", here.parents[1] / "configs") if folder.is_dir()]
    for folder in folders:
        for file in (folder / name, folder / f"{name}.yaml"):
            if file.is_file():
                return str(file)
    known = sorted(
        str(file.relative_to(folder).with_suffix("")) for folder in folders for file in folder.rglob("*.yaml")
    )
    raise UserError(f"no configuration {name!r}: expected a file, or one of {', '.join(known)}")


def _new_run_id() -> str:
    """Sorts by time, and is unlikely to meet another run's."""
    return time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def _checkpoint(given: Any, root: Path) -> Path | None:
    """The file that `--ckpt_path` means: a path, or `last` or `best` of the newest run under `root`.

    Raises:
        UserError: there is no such file; a run never starts over silently.
    """
    if given is None:
        return None
    if str(given) not in ("last", "best"):
        if Path(given).is_dir():
            raise UserError(f"--ckpt_path {given} is a folder; expected a checkpoint file, `last` or `best`")
        if not Path(given).is_file():
            raise UserError(f"--ckpt_path {given}: no such file; expected a checkpoint, `last` or `best`")
        return Path(given)
    found = [folder / "checkpoints" / f"{given}.ckpt" for folder in root.glob("*") if _is_run(folder)]
    found = [file for file in found if file.is_file()]
    if not found:
        raise UserError(
            f"--ckpt_path {given}: no run with {given}.ckpt under {root}; start one without --ckpt_path, "
            "or give its --trainer.default_root_dir"
        )
    return max(found, key=lambda file: file.stat().st_mtime)


def _check_fits(file: Path, model: LightningModule) -> None:
    """Refuse what is no checkpoint, or one of another model.

    Raises:
        UserError: says what is different.
    """
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        stored, frozen = checkpoint["state_dict"], checkpoint["frozen_towers"]
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, TypeError) as error:
        raise UserError(f"--ckpt_path {file} is no checkpoint of `clip-lightning fit`") from error
    same = "give the same --model options as in training (they are in config.yaml of the run)"
    if frozen.keys() != model._frozen_towers().keys():
        were = " and ".join(name.removeprefix("clip.") for name in frozen) or "no tower"
        raise UserError(f"--ckpt_path {file} was trained with {were} frozen; {same}")
    if differing := _differing(stored, model.state_dict()):
        raise UserError(f"--ckpt_path {file} is of another model ({differing}); {same}")


def _differing(stored: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str:
    """The first tensor that `own` lacks or has in another shape; nothing if there is none."""
    for name, tensor in stored.items():
        if name not in own:
            return f"it has {name}"
        if tensor.shape != own[name].shape:
            return f"{name} is {tuple(tensor.shape)} there, {tuple(own[name].shape)} here"
    return ""


def _place_logger(logger: Namespace, folder: Path) -> None:
    """Let a logger write into the run's folder, under the run's id."""
    settings = logger.init_args
    kind = logger.class_path.rpartition(".")[2]
    if kind in ("RunLogger", "WandbLogger"):
        if rank_zero_only.rank == 0:  # W&B wants it to be there; other ranks do not log
            folder.mkdir(parents=True, exist_ok=True)
        settings.update(Namespace(save_dir=str(folder), id=settings.get("id") or folder.name))
    elif kind in ("CSVLogger", "TensorBoardLogger"):
        settings.update(Namespace(save_dir=str(folder), name="", version=""))
