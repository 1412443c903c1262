"""`fit`, `validate` and `test`: LightningCLI with our defaults, links, run folders and messages."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table

from clip_lightning.arguments import (
    PlainErrors,
    changed_strings,
    error_within,
    named_configs,
    with_home,
    with_logger_folder,
)
from clip_lightning.data.datamodule import CaptionDataModule
from clip_lightning.errors import UserError
from clip_lightning.evaluation.metrics import DIRECTIONS, MEASURES
from clip_lightning.run_folder import LAST, RunFolder
from clip_lightning.terminal import public
from clip_lightning.tracking.history import go_back, history_file
from clip_lightning.tracking.lineage import Alerts, Lineage
from clip_lightning.tracking.prediction_panel import PredictionTable
from clip_lightning.tracking.zero_shot_panel import ZeroShot
from clip_lightning.training.checkpoints import CheckpointOptions, SafeCheckpointIO, WhenInterrupted
from clip_lightning.training.guard import NonFinite
from clip_lightning.training.module import CLIPModule
from clip_lightning.training.ranks import lost_rank, watch_children
from clip_lightning.training.recorder import MONITOR, BestCheckpoint, RunRecorder, SaveConfig
from clip_lightning.training.runs import (
    changed_options,
    check_fits,
    check_resumes,
    find_checkpoint,
    keep_scores,
    place_logger,
    run_of,
)
from clip_lightning.training.sharding import ShardedStrategy, check_shardable
from clip_lightning.training.stopping import EarlyStopping, GracefulStop

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
    ".*The dirpath has changed.*",  # BestCheckpoint finds its file again
    ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning 2.6 with torch 2.15
    ".*all_gather is deprecated.*",  # likewise
    ".*callbacks used to create the checkpoint need to be provided.*",  # not for scoring
    ".*WeightAveraging doesn't support sharding.*",  # which is refused with it
    ".*returned a view tensor.*",  # a sharded tower; its features are changed nowhere in place
    ".*ended before the epoch ended and your dataloader is not resumable.*",  # ours skips what was done
)


class Parser(PlainErrors, LightningArgumentParser):
    """LightningCLI's parser, with our complaints."""


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
    """Builds model, data and trainer from the command line and gives the run its folder.

    Args:
        words: the command line, the command first.
        callbacks: of the caller's own, beside those of every run.
    """

    run: RunFolder
    config_to_save: str

    def __init__(self, words: list[str], callbacks: Sequence[Callback] = ()) -> None:
        self.callers_callbacks = callbacks
        super().__init__(
            CLIPModule,
            CaptionDataModule,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=Parser,
            args=with_logger_folder(named_configs(words)),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

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
        parser.add_class_arguments(CheckpointOptions, "checkpoint")
        parser.add_lightning_class_args(PredictionTable, "predictions")
        parser.add_lightning_class_args(ZeroShot, "zero_shot")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("data.image_size", "model.image_size")
        parser.link_arguments("model.transform", "data.transform", apply_on="instantiate")
        parser.link_arguments("model.tokenize", "data.tokenize", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words given; Lightning's own version warns of any that do not come from the process."""
        self.config = parser.parse_args(args)
        for name, value in list(self.config.items()):
            if value == "" and ".init_args." not in name:  # other people's classes have it as a default
                option = name.removeprefix(f"{self.config.subcommand}.")
                raise UserError(f"--{option} is empty in a configuration; give a value, or leave it out")
            self.config[name] = changed_strings(value, with_home)

    def before_instantiate_classes(self) -> None:
        """Settle the run's folder, the checkpoint to start from, and where loggers write."""
        config = self.config[self.subcommand]
        # re-runnable, so taken before the run's own folder and id are put in
        parser = self._parser(self.subcommand)
        rerunnable = config.clone()
        rerunnable.ckpt_path = None
        for name, value in list(rerunnable.items()):
            rerunnable[name] = changed_strings(value, public)  # a URL may hold a key
        self.config_to_save = parser.dump(rerunnable, skip_unset=False)
        root = Path(config.trainer.default_root_dir)
        checkpoint = find_checkpoint(config.ckpt_path, root)
        config.ckpt_path = None
        if checkpoint is not None:
            config.ckpt_path = str(checkpoint)
            config.weights_only = True  # a checkpoint may come from a stranger
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--trainer.default_root_dir {root} cannot be written ({error.strerror}); give another folder"
            ) from error
        run = RunFolder.of_checkpoint(checkpoint) if checkpoint is not None else None
        resumed = run is not None and run.is_run() and self.subcommand == "fit"
        self.run = run if run is not None and resumed else RunFolder.new(root)
        if self.subcommand != "fit":
            if checkpoint is None and config.model.init_from is None:
                raise UserError(
                    "nothing to score: give --ckpt_path FILE|last|best, or --model.init_from BUNDLE"
                )
            # a score belongs to the run that it is of; it is no run of its own
            self.scored_run = run_of(checkpoint or config.model.init_from)
            self.tracks_scores = config.trainer.logger is not False
            config.trainer.logger = config.trainer.enable_checkpointing = config.verbose = False
        if config.trainer.logger is True:
            config.trainer.logger = parser.get_defaults().trainer.logger
        loggers = config.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if isinstance(logger, Namespace):
                place_logger(logger, self.run.path)

    def _parse_ckpt_path(self) -> None:
        """Lightning would take hyperparameters from the checkpoint; ours are all in the configuration."""

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError(f"--seed_everything: {error}") from error

    def after_instantiate_classes(self) -> None:
        """Look for what does not go together before ranks start and frozen towers run for minutes."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            check_shardable(self.model.clip, self.model.micro_batch_size, self.trainer)
        checkpoint = self.config[self.subcommand].ckpt_path
        if checkpoint is not None:
            check_fits(Path(checkpoint), self.model)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with the callbacks that every run has."""
        config = self._get(self.config_init, "trainer")
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        config["callbacks"] = [*given, *self._own_callbacks(config), *self.callers_callbacks]
        if config.get("precision") == "bf16-mixed" and runs_on_cpu(config) and not cpu_computes_in_bf16():
            print(
                "this CPU has no fast bf16: training in fp32 (--trainer.precision 32-true)", file=sys.stderr
            )
            config["precision"] = "32-true"
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if config.get("strategy") == "fsdp":
            config["strategy"] = ShardedStrategy()
        elif "fsdp" in str(config.get("strategy")).lower():
            raise UserError(f"--trainer.strategy {config['strategy']}: expected fsdp, with nothing besides")
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, SafeCheckpointIO()]
        if SLURMEnvironment.detect() and not any(isinstance(p, ClusterEnvironment) for p in plugins):
            plugins = [*plugins, SLURMEnvironment(auto_requeue=False)]  # `GracefulStop` does it
        config["plugins"] = plugins
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, ModuleNotFoundError) as error:  # an accelerator or strategy that is not there
            raise UserError(f"--trainer: {error}") from error

    def _own_callbacks(self, trainer_config: Any) -> list[Callback]:
        bar = [ProgressBar()] if trainer_config.get("enable_progress_bar") is not False else []
        if self.subcommand != "fit":
            return bar
        predictions = self._get(self.config_init, "predictions")
        predictions.folder = predictions.folder or self.run.path
        self._get(self.config_init, "zero_shot").folder = self.run.path
        callbacks: list[Callback] = [
            *bar,
            SaveConfig(self.config_to_save, self.run.path),
            RunRecorder(self.run.path),
            Alerts(),
            NonFinite(self.run.path),
            GracefulStop(says_how=not self.callers_callbacks),
            # `last` is written at every epoch's end, when the run is interrupted, and as the options say
            BestCheckpoint(self.run.checkpoints, "best", MONITOR, mode="max", enable_version_counter=False),
            WhenInterrupted(
                self.run.checkpoints,
                "last",
                save_on_train_epoch_end=True,
                save_on_exception=True,
                enable_version_counter=False,
            ),
            *self._get(self.config_init, "checkpoint").callbacks(self.run.checkpoints),
            Lineage(self.run.path),
        ]
        if trainer_config.get("logger"):
            callbacks.append(LearningRateMonitor(logging_interval="step"))
        return callbacks

    def before_fit(self) -> None:
        """Check data and checkpoint before a logger starts a run, then print where everything goes."""
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        checkpoint = self.config["fit"].ckpt_path
        if checkpoint:
            ranks = self.trainer.num_devices * self.trainer.num_nodes
            check_resumes(Path(checkpoint), self.model, self.datamodule, ranks)
        if self.trainer.is_global_zero:
            self.run.path.mkdir(parents=True, exist_ok=True)  # W&B wants it to be there
            sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
            trained, total = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
            print(f"training {trained:,} of {total:,} parameters", file=sys.stderr)
            print(f"run folder: {self.run.path}", file=sys.stderr)
            if checkpoint:
                print(f"going on from {checkpoint}", file=sys.stderr)
                self._take_over_run(Path(checkpoint))

    def _take_over_run(self, checkpoint: Path) -> None:
        """Print what the resumed run does otherwise than before."""
        if not self.run.is_run():  # a checkpoint without its run begins another
            return
        for line in changed_options(self.run.config.read_text(), self.config_to_save):
            print(f"changed: {line}", file=sys.stderr)
        if checkpoint.name != LAST:
            go_back(history_file(self.run.path, self.run.path.name))

    def after_fit(self) -> None:
        """Print the result."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            recorder = next(c for c in self.trainer.callbacks if isinstance(c, RunRecorder))
            if recorder.metrics:
                print_metrics(recorder.metrics, f"best epoch: {recorder.metrics['epoch']:.0f}")
            else:
                print(
                    "no epoch was validated: there are no metrics and no best checkpoint, and model/ has the "
                    "last weights; leave --trainer.limit_val_batches out to validate",
                    file=sys.stderr,
                )
            print("run folder:", self.run.path)
            parts = (
                f"{name.replace('_', ' ')} {spent:.0f} s"
                for name, spent in recorder.stopwatch.seconds.items()
            )
            print("time:", ", ".join(parts))

    def after_validate(self) -> None:
        """Print and keep the scores; Lightning's own table goes where the progress bar goes."""
        self._finish_scores("val")

    def after_test(self) -> None:
        """Print and keep the scores."""
        self._finish_scores("test")

    def _finish_scores(self, split: str) -> None:
        if not self.trainer.is_global_zero:
            return
        logged = self.trainer.callback_metrics.items()
        scores = {name.removeprefix(f"{split}/"): float(value) for name, value in logged}
        print_metrics(scores, split)
        if self.scored_run is not None and not self.trainer.fast_dev_run:
            config = self.config[self.subcommand]
            scored = str(config.ckpt_path or config.model.init_from)
            about = {"scored": scored, "data_digest": self.datamodule.digest}
            keep_scores(self.scored_run, self.subcommand, scores, about, track=self.tracks_scores)


def runs_on_cpu(trainer: Any) -> bool:
    """Return whether a trainer with these arguments runs on a CPU."""
    accelerator = trainer.get("accelerator")
    return accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())


def cpu_computes_in_bf16() -> bool:
    """Return whether torch has fast kernels in bf16 for this CPU.

    Without AVX-512 or its like, a convolution in bf16 takes up to a hundred times as long as in fp32.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def print_metrics(metrics: dict[str, float], title: str) -> None:
    """Show retrieval metrics as a table on stdout."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for measure in MEASURES.values():
        table.add_column(measure.title, justify="right")
    for direction, name in DIRECTIONS.items():
        table.add_row(name, *(f"{metrics[f'{direction}_{measure}']:.1f}" for measure in MEASURES))
    console = Console()
    console.print(table)
    console.print(f"rsum {metrics['rsum']:.1f}")
    if "zero_shot_top1" in metrics:
        top1, top5 = metrics["zero_shot_top1"], metrics["zero_shot_top5"]
        console.print(f"zero-shot top-1 {top1:.1f}, top-5 {top5:.1f}")


def run(args: list[str]) -> None:
    """Run `fit`, `validate` or `test` with the words of the command line, the command first.

    Raises:
        UserError: what was asked for cannot be done.
    """
    run_as(RunCLI, args)


AnyCLI = TypeVar("AnyCLI", bound=RunCLI)


def run_as(kind: type[AnyCLI], words: list[str], callbacks: Sequence[Callback] = ()) -> AnyCLI:
    """Run the words of a command line, the command first, with callbacks of the caller's own besides.

    Raises:
        UserError: what was asked for cannot be done.
    """
    transformers.utils.logging.disable_progress_bar()  # of loading weights, over in a blink
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers tokenise, one core each
    # Lightning's news of accelerators that are not there, and its advertisement; warnings stay
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for message in QUIET:
        warnings.filterwarnings("ignore", message)
    watch_children()
    try:
        return kind(words, callbacks)
    except MisconfigurationException as error:  # Lightning's word for what its options cannot do
        raise UserError(str(error)) from error
    except UserError:
        raise
    except ValueError as error:
        said = error_within(error)
        if said is None:
            raise
        raise UserError(said) from error
    except RuntimeError as error:
        lost = lost_rank(error)
        if lost is None:
            raise
        raise lost from error
