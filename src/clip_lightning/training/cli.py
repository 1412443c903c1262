"""Runs `fit`, `validate` and `test`: LightningCLI with our defaults, run folders and messages.

`fit` and `rehearse` are for commands that train several models.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Column, Table

from clip_lightning import arguments
from clip_lightning.data.datamodule import CaptionDataModule
from clip_lightning.errors import RunFailed, UserError, as_user_error, reason_of
from clip_lightning.evaluation.metrics import DIRECTIONS, MEASURES, METRICS
from clip_lightning.files import write_json
from clip_lightning.model.checkpoint import read_checkpoint
from clip_lightning.model.clip import parameter_counts
from clip_lightning.run_folder import LAST, RunFolder
from clip_lightning.terminal import note, public
from clip_lightning.timing import PARTS_OF_STEP
from clip_lightning.tracking import zero_shot_panel
from clip_lightning.tracking.lineage import Alerts, Lineage
from clip_lightning.tracking.logger import RunLogger, finished_run, go_back, history_file
from clip_lightning.tracking.prediction_panel import PredictionTable
from clip_lightning.training import checkpoints, stopping
from clip_lightning.training.module import CLIPModule
from clip_lightning.training.recorder import MONITOR, BestCheckpoint, RunRecorder
from clip_lightning.wandb_fetch import default_project, stays_offline

TRAINER_DEFAULTS = {
    "default_root_dir": "runs",
    "max_epochs": 20,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,  # one line replaces it
    "use_distributed_sampler": False,  # our samplers divide the data among ranks
    "logger": {"class_path": "clip_lightning.tracking.logger.RunLogger"},
}
BAR_STEPS = 10
# Warnings that do not concern the user of a command.
QUIET = (
    ".*Checkpoint directory .* is not empty.*",  # when a run is resumed
    ".*module\\(s\\) in eval mode.*",  # frozen towers should be
    ".*smaller than the logging interval.*",
    ".*The dirpath has changed.*",  # BestCheckpoint corrects the path
    ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning 2.6 with torch 2.15
    ".*all_gather is deprecated.*",  # Lightning 2.6 with torch 2.15
    ".*callbacks used to create the checkpoint need to be provided.*",  # scoring needs none
    ".*fan_in_fan_out is set to False.*",  # PEFT corrects this for GPT-2
    ".*ended before the epoch ended and your dataloader is not resumable.*",  # our samplers are
)
# Messages of gloo, NCCL and the rendezvous store about a lost rank, and of torch about a lost loader process.
LOST = re.compile(
    "Connection closed by peer|Connection reset by peer|Broken pipe|Timed out waiting|before timing out|"
    r"^DataLoader worker \(pid"
)


class ProgressBar(RichProgressBar):
    """Lightning's bar, except that it reads the loss, which waits for a GPU, only when it is drawn."""

    _metrics_shown: Any = None

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        if trainer.global_step % self.refresh_rate == 0 or trainer.is_last_batch:
            self._metrics_shown = super().get_metrics(trainer, pl_module)
        return self._metrics_shown or {}


class Parser(arguments.PlainErrors, LightningArgumentParser):
    """Extends LightningCLI's parser with our error messages."""


class RunCLI(LightningCLI):
    """Builds model, data and trainer from the command line and gives the run its folder."""

    def __init__(self, args: list[str], callbacks: Sequence[Callback] = ()) -> None:
        self.command = args[0]
        self.callers_callbacks = callbacks  # of a command that trains several models, such as a sweep
        super().__init__(
            CLIPModule,
            CaptionDataModule,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=Parser,
            args=arguments.with_full_values(args),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:
        """Return only the method of the trainer that is called, since building a parser is slow."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(stopping.EarlyStopping, "early_stopping")
        defaults = {"monitor": MONITOR, "mode": "max", "patience": 5, "check_on_train_epoch_end": False}
        parser.set_defaults({f"early_stopping.{name}": value for name, value in defaults.items()})
        parser.add_class_arguments(checkpoints.CheckpointOptions, "checkpoint")
        parser.add_lightning_class_args(PredictionTable, "predictions")
        parser.add_lightning_class_args(zero_shot_panel.ZeroShot, "zero_shot")
        parser.link_arguments("model.transform", "data.transform", apply_on="instantiate")
        parser.link_arguments("model.tokenize", "data.tokenize", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments without Lightning's warning that they are not those of the process."""
        self.config = parser.parse_args(args)
        for name, value in list(self.config.items()):
            # classes of other packages may have an empty default
            if value == "" and ".init_args." not in name:
                option = name.removeprefix(f"{self.config.subcommand}.")
                raise UserError(f"--{option} is empty in a configuration file; set a value or remove it")
            self.config[name] = arguments.changed_strings(value, arguments.with_home)

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder, the checkpoint to start from, and where loggers write."""
        config = self.config[self.subcommand]
        check_numbers(config)
        # config.yaml can start another run, so it is dumped before the run's folder and id are filled in
        parser = self._parser(self.subcommand)
        rerunnable = config.clone()
        rerunnable.ckpt_path = None
        for name, value in list(rerunnable.items()):
            rerunnable[name] = arguments.changed_strings(value, public)  # a URL may hold a key
        self.config_to_save = parser.dump(rerunnable, skip_unset=False)
        root = Path(config.trainer.default_root_dir)
        checkpoint = checkpoints.find_checkpoint(config.ckpt_path, root)
        config.ckpt_path = None if checkpoint is None else str(checkpoint)
        config.weights_only = True  # a checkpoint may come from a stranger
        with as_user_error(f"--trainer.default_root_dir {root} cannot be created", "use another folder"):
            root.mkdir(parents=True, exist_ok=True)
        self.run = RunFolder.new(root)
        if self.subcommand != "fit":
            scored = config.ckpt_path or config.model.init_from
            if scored is None:
                raise UserError(
                    "no model to score: set --ckpt_path FILE|last|best or --model.init_from BUNDLE"
                )
            # scores are stored with the run that trained the model, and do not make a new run
            folders = Path(scored).absolute().parents[:2] if Path(scored).exists() else ()
            self.scored_run = next((run for run in map(RunFolder, folders) if run.is_run()), None)
            self.tracks_scores = config.trainer.logger is not False
            config.trainer.logger = config.trainer.enable_checkpointing = config.verbose = False
        elif checkpoint and (run := RunFolder.of_checkpoint(checkpoint)).is_run():
            self.run = run
        if config.trainer.logger is True:
            config.trainer.logger = parser.get_defaults().trainer.logger
        for logger in as_list(config.trainer.logger):
            if isinstance(logger, Namespace):
                place_logger(logger, self.run.path)

    def _parse_ckpt_path(self) -> None:
        """Ignore the hyperparameters in the checkpoint: the configuration is complete."""

    def _set_seed(self) -> None:
        with as_user_error("--seed_everything is invalid", "use a number from 0 to 4294967295"):
            super()._set_seed()

    def instantiate_classes(self) -> None:
        """Reject incompatible options before ranks start and frozen towers run for minutes."""
        super().instantiate_classes()
        checkpoint = self.config[self.subcommand].ckpt_path
        if checkpoint is not None:
            checkpoints.check_fits(checkpoint, read_checkpoint(Path(checkpoint)), self.model)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        own = self._own_callbacks(config)
        config.callbacks = [*as_list(config.callbacks), *own, *self.callers_callbacks]
        no_gpu = not torch.accelerator.is_available()
        on_cpu = config.accelerator == "cpu" or (config.accelerator == "auto" and no_gpu)
        # without AVX-512 or an equivalent, convolutions in bf16 take up to a hundred times as long as in fp32
        is_slow = on_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if config.precision == "bf16-mixed" and is_slow:
            note("this CPU has no fast bf16 kernels: training in fp32")
            config.precision = "32-true"
        if config.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
            set_gpu_defaults(config)
        if "fsdp" in str(config.strategy).lower():
            raise UserError(
                f"--trainer.strategy {config.strategy}: sharded weights are not supported; use ddp, and "
                "--model.micro_batch_size, --model.towers.activation_checkpointing or --model.lora if memory "
                "is short"
            )
        plugins = config.plugins = as_list(config.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(checkpoints.SafeCheckpointIO())
        if SLURMEnvironment.detect() and not any(isinstance(p, ClusterEnvironment) for p in plugins):
            plugins.append(SLURMEnvironment(auto_requeue=False))  # `GracefulStop` requeues jobs
        try:
            return super().instantiate_trainer(**kwargs)
        # such as half a device, or an unknown accelerator or strategy
        except (TypeError, ValueError, ModuleNotFoundError) as error:
            raise UserError(f"--trainer: {error}") from error

    def _own_callbacks(self, trainer_config: Any) -> list[Callback]:
        shown = trainer_config.enable_progress_bar is not False
        bar: list[Callback] = [ProgressBar(BAR_STEPS, console_kwargs={"stderr": True})] if shown else []
        if self.subcommand != "fit":
            return bar
        predictions = self._get(self.config_init, "predictions")
        predictions.folder = predictions.folder or self.run.path
        self._get(self.config_init, "zero_shot").folder = self.run.path
        return [
            *bar,
            *([LearningRateMonitor(logging_interval="step")] if trainer_config.logger else []),
            RunRecorder(self.run.path, self.config_to_save),
            Alerts(),
            stopping.NonFinite(),
            stopping.GracefulStop(prints_remedy=not self.callers_callbacks),
            BestCheckpoint(self.run.checkpoints, "best", MONITOR, mode="max", enable_version_counter=False),
            *self._get(self.config_init, "checkpoint").callbacks(self.run.checkpoints),
            Lineage(self.run.path),
        ]

    def before_fit(self) -> None:
        """Check the data and the checkpoint before a logger starts a run, then print the run's folder."""
        is_alone = not self.callers_callbacks  # else the caller prints what its runs have in common
        self.datamodule.prints_summary = is_alone
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        ranks = self.trainer.num_devices * self.trainer.num_nodes
        interval = self.trainer.val_check_interval
        in_epoch = isinstance(interval, int) and self.trainer.check_val_every_n_epoch is not None
        if in_epoch and interval > (batches := len(self.datamodule.train_dataloader()) // ranks):
            raise UserError(
                f"--trainer.val_check_interval {interval} is more than the {batches} batches of an epoch; "
                "lower it, or set --trainer.check_val_every_n_epoch null"
            )
        checkpoint = self.config["fit"].ckpt_path
        if checkpoint:
            checkpoints.check_resumes(Path(checkpoint), self.model, self.datamodule, ranks)
        if not self.trainer.is_global_zero:
            return
        self.run.path.mkdir(parents=True, exist_ok=True)  # W&B expects it to exist
        if is_alone:
            counts = parameter_counts(self.model.clip)
            note("training {parameters_trained:,} of {parameters:,} parameters".format_map(counts))
            note(f"run folder: {self.run.path}")
        if checkpoint:
            note(f"resuming from {checkpoint}")
            if self.run.is_run():  # else the checkpoint was moved, and starts a new run
                for line in changed_options(self.run.config.read_text(), self.config_to_save):
                    note(f"changed: {line}")
                if Path(checkpoint).name != LAST:
                    go_back(history_file(self.run.path, self.run.path.name))

    def after_fit(self) -> None:
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:
            return
        recorder = next(c for c in self.trainer.callbacks if isinstance(c, RunRecorder))
        if recorder.metrics:
            print_metrics(recorder.metrics, f"best epoch: {recorder.metrics['epoch']:.0f}")
        else:
            note("no epoch was validated, so model/ has the last weights")
        print("run folder:", self.run.path)
        seconds = recorder.stopwatch.seconds
        if self.trainer.strategy.root_device.type == "cuda":
            seconds = {name: spent for name, spent in seconds.items() if name not in PARTS_OF_STEP}
            seconds["steps"] = recorder.stopwatch.step_seconds
        parts = ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items())
        print("time:", parts.replace("_", " "))

    def after_validate(self) -> None:
        """Print and store the scores; Lightning's own table is part of the progress bar."""
        if not self.trainer.is_global_zero:
            return
        split = "test" if self.subcommand == "test" else "val"
        logged = self.trainer.callback_metrics.items()
        scores = {name.removeprefix(f"{split}/"): float(value) for name, value in logged}
        print_metrics(scores, split)
        run = self.scored_run
        if run is None or self.trainer.fast_dev_run:
            return
        config = self.config[self.subcommand]
        scored = str(config.ckpt_path or config.model.init_from)
        about = {"scored": scored, "data_digest": self.datamodule.digest}
        write_json(run.path / f"{self.subcommand}.json", {**scores, **about})
        loggers = as_list(yaml.safe_load(run.config.read_text())["trainer"]["logger"])
        for logger in loggers if self.tracks_scores else ():
            if isinstance(logger, dict) and str(logger.get("class_path")).endswith(".RunLogger"):
                settings = logger.get("init_args") or {}
                run_id = settings.get("id") or os.environ.get("WANDB_RUN_ID") or run.path.name
                if history_file(run.path, run_id).is_file():  # else W&B was disabled
                    wandb_run = RunLogger(**{**settings, "save_dir": str(run.path), "id": run_id})
                    wandb_run.summarize({f"{self.subcommand}/{name}": scores[name] for name in scores})

    after_test = after_validate


def as_list(value: Any) -> list[Any]:
    """Return the value of an option that accepts one item, several or none as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def set_gpu_defaults(config: Namespace) -> None:
    """Train in bf16, with TF32 and cuDNN's fastest algorithms, unless the trainer's options say otherwise."""
    if config.precision is None and torch.cuda.is_bf16_supported(including_emulation=False):
        config.precision = "bf16-mixed"
    if not config.deterministic:
        torch.set_float32_matmul_precision("high")
        config.benchmark = True if config.benchmark is None else config.benchmark


def check_numbers(config: Any) -> None:
    """Reject values of options that Lightning accepts and that fail only during training."""
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval"):
        given = config.trainer[name]
        if isinstance(given, int | float) and given <= 0:
            raise UserError(f"--trainer.{name} {given}: expected a number greater than 0")
    callbacks = config.trainer.callbacks
    if "StochasticWeightAveraging" in str(callbacks):
        raise UserError(
            "--trainer.callbacks StochasticWeightAveraging averages the weights after the last validation, "
            "which does not score them; use EMAWeightAveraging"
        )
    known = [f"val/{name}" for name in (*METRICS, *zero_shot_panel.METRICS)]
    known += ["train/loss", "train/grad_norm"]
    if "early_stopping" in config and not callbacks and (name := config.early_stopping.monitor) not in known:
        raise UserError(f"--early_stopping.monitor {name}: expected one of {', '.join(known)}")


def print_metrics(metrics: dict[str, float], title: str) -> None:
    """Print retrieval metrics as a table on stdout."""
    columns = (Column(measure.title, justify="right") for measure in MEASURES.values())
    table = Table("", *columns, title=title, title_justify="left")
    for direction, name in DIRECTIONS.items():
        table.add_row(name, *(f"{metrics[f'{direction}_{measure}']:.1f}" for measure in MEASURES))
    Console().print(table)  # the progress bar makes rich's own console write to stderr
    print(f"rsum {metrics['rsum']:.1f}")
    for name in metrics:
        if name.startswith("dims") and name.endswith("_rsum"):  # of a prefix of the embeddings
            print(f"rsum {metrics[name]:.1f} with {name[len('dims') : -len('_rsum')]} dimensions")
    if "zero_shot_top1" in metrics:
        print("zero-shot top-1 {zero_shot_top1:.1f}, top-5 {zero_shot_top5:.1f}".format_map(metrics))


def place_logger(logger: Namespace, folder: Path) -> None:
    """Make a logger write to the run's folder, under the run's id."""
    settings = logger.init_args
    kind = logger.class_path.rpartition(".")[2]
    if kind in ("RunLogger", "WandbLogger"):
        run_id = settings.get("id") or os.environ.get("WANDB_RUN_ID") or folder.name
        settings.update(Namespace(save_dir=str(folder), id=run_id))
    if kind == "WandbLogger":  # Lightning's class asks for a key, and cannot log models offline
        settings.project = settings.get("project") or default_project()
        if settings.get("offline") or stays_offline(None):
            settings.update(Namespace(mode="offline", log_model=False))
    elif kind in ("CSVLogger", "TensorBoardLogger"):
        # Lightning's CSVLogger deletes existing files, so a resumed run gets a new folder
        earlier = (folder / "metrics.csv").exists()
        version = f"resumed-{len(list(folder.glob('resumed-*'))) + 1}" if earlier else ""
        settings.update(Namespace(save_dir=str(folder), name="", version=version))


def changed_options(before: str, now: str) -> list[str]:
    """Return one line per option that differs between two configurations in YAML."""
    old, new = (arguments.flat(yaml.safe_load(text)) for text in (before, now))
    ignored = ("model.init_from", "model.loss.init_")
    return [
        f"--{name} {json.dumps(new.get(name))} (was {json.dumps(old.get(name))})"
        + ("; ignored, since the checkpoint contains the weights" if name.startswith(ignored) else "")
        for name in {**new, **old}
        if old.get(name) != new.get(name)
    ]


def run(args: list[str]) -> None:
    """Run `fit`, `validate` or `test`, the first of the arguments."""
    # W&B ends a run when its service ends, which outlives this process if a parent process has started it
    finished = finished_run() if "WANDB_SERVICE" in os.environ else contextlib.nullcontext()
    with finished, plain_errors():
        RunCLI(args)


def fit(options: list[str], callbacks: Sequence[Callback]) -> Path:
    """Train once within another command, which prints its own results, and return the run's folder."""
    os.environ.setdefault("WANDB_SILENT", "true")
    # Lightning sets these in the process that starts the other ranks; the next run starts ranks of its own
    launched = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
    before = {name: os.environ[name] for name in launched if name in os.environ}
    original, args = sys.argv[1:], ["fit", *options]
    sys.argv[1:] = args  # Lightning starts each rank with the arguments of this process
    try:
        with contextlib.redirect_stdout(io.StringIO()), finished_run(), plain_errors():
            return RunCLI(args, callbacks).run.path
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning exits after Ctrl-C
            raise KeyboardInterrupt from stop
        if isinstance(stop.code, str):  # the parser's message
            raise UserError(stop.code) from stop
        raise
    finally:
        sys.argv[1:] = original
        if "LOCAL_RANK" not in before and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name in launched:
            os.environ.pop(name, None)
        os.environ |= before


class Rehearsal(RunCLI):
    """Parses the options of `fit` into the complete configuration, and reads the data, without training."""

    def instantiate_classes(self) -> None:
        """Leave this to `read_data`."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""

    def read_data(self, image_tower: str, text_tower: str) -> str:
        """Build the model and the data with these towers, which may find errors; return the data's digest."""
        config = self.config["fit"]
        config.model.image_tower, config.model.text_tower = image_tower, text_tower
        config.trainer.logger = False
        super().instantiate_classes()
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        return str(self.datamodule.digest)


def rehearse(options: list[str]) -> Rehearsal:
    """Parse the options of `fit` without training, for runs whose results will be compared."""
    os.environ.setdefault("WANDB_SILENT", "true")
    with plain_errors():
        rehearsal = Rehearsal(["fit", *options])
    trainer = rehearsal.config["fit"].trainer
    if trainer.fast_dev_run or trainer.limit_val_batches == 0:
        raise UserError(
            "a run without a validation has no result to compare; remove --trainer.fast_dev_run and "
            "--trainer.limit_val_batches"
        )
    return rehearsal


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Hide messages that do not concern the user, and turn errors of Lightning and torch into ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each loader process tokenizes on one core
    # lines about unused accelerators and the seed; warnings are still shown
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in QUIET:
        warnings.filterwarnings("ignore", message)
    stopping.watch_children()
    try:
        yield
    except UserError:
        raise
    except MisconfigurationException as error:  # Lightning rejects a combination of options
        raise UserError(str(error)) from error
    except ValueError as error:
        if reason := arguments.error_within(error):
            raise UserError(reason) from error
        raise
    except torch.OutOfMemoryError as error:
        remedy = "lower --data.batch_size, or set --model.micro_batch_size"
        raise RunFailed(f"{reason_of(error)}; {remedy}") from error
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or LOST.search(str(error)):
            raise RunFailed(
                f"another process of this run has ended or cannot be reached ({reason_of(error)}); see its "
                "messages, lower --data.num_workers if memory ran out, and resume with --ckpt_path last"
            ) from error
        raise
