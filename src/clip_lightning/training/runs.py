"""Finds the checkpoint to resume, checks that it fits the options, and stores scores with their run."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, LightningModule

from clip_lightning.errors import UserError
from clip_lightning.files import write_atomically
from clip_lightning.model.checkpoint import check_fixed_towers, fixed_towers, preprocessing
from clip_lightning.run_folder import LAST, PREVIOUS, RunFolder
from clip_lightning.tracking.history import history_file
from clip_lightning.tracking.logger import RunLogger
from clip_lightning.training.checkpoints import damage
from clip_lightning.training.optim import param_groups
from clip_lightning.wandb_fetch import default_project, stays_offline

Module = TypeVar("Module", bound=LightningModule)


def find_checkpoint(given: Any, root: Path) -> Path | None:
    """Return the file that `--ckpt_path` names: a path, or `last` or `best` of the newest run under `root`.

    `auto` is the newest `last.ckpt`, or None if there is none, so that a job can be restarted with the same
    command.

    Raises:
        UserError: there is no such file; a run never starts over silently.
    """
    if given is None:
        return None
    given = str(given)
    if given not in ("last", "best", "auto"):
        expected = "expected a checkpoint file, `last`, `best` or `auto`"
        if Path(given).is_dir():
            raise UserError(f"--ckpt_path {given} is a folder; {expected}")
        if not Path(given).is_file():
            raise UserError(f"--ckpt_path {given}: no such file; {expected}")
        return _intact(Path(given), given)
    runs = RunFolder.runs(root)
    if given == "auto":
        saved = [run.last for run in runs if run.last.is_file()]
        return _intact(max(saved, key=lambda file: file.stat().st_mtime), given) if saved else None
    if not runs:
        raise UserError(
            f"--ckpt_path {given}: there is no run in {root}; start one without --ckpt_path, or set "
            "--trainer.default_root_dir to the folder that contains the runs"
        )
    newest = runs[-1]
    checkpoint = newest.last if given == "last" else newest.best
    if not checkpoint.is_file():
        raise UserError(
            f"--ckpt_path {given}: the newest run, {newest.path}, has no {given}.ckpt; "
            "set --ckpt_path to the checkpoint of another run, or remove it to start again"
        )
    return _intact(checkpoint, given)


def _intact(checkpoint: Path, given: Any) -> Path:
    """Return the checkpoint, or `previous.ckpt` in place of a damaged `last.ckpt`."""
    reason = damage(checkpoint)
    if reason is None:
        return checkpoint
    previous = checkpoint.with_name(PREVIOUS)
    if checkpoint.name != LAST or not previous.is_file() or damage(previous) is not None:
        raise UserError(
            f"--ckpt_path {given}: {checkpoint} is damaged ({reason}); choose another checkpoint, or start "
            "again without --ckpt_path"
        )
    print(f"{checkpoint} is damaged ({reason}); using {previous.name} instead", file=sys.stderr)
    return previous


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Map a checkpoint of a `CLIPModule` into memory, without executing code from it.

    Raises:
        UserError: the file is not such a checkpoint.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        _ = [checkpoint[name] for name in ("state_dict", "frozen_towers", "preprocessing")]
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, TypeError) as error:
        raise UserError(f"{file} is not a checkpoint of `clip-lightning fit`") from error
    return checkpoint


def check_fits(file: str | Path, checkpoint: Mapping[str, Any], model: LightningModule) -> None:
    """Reject the checkpoint of a different model.

    Raises:
        UserError: names the first difference.
    """
    frozen, same = checkpoint["frozen_towers"], "set the same --model options as in training"
    if frozen.keys() != fixed_towers(model.clip).keys():
        were = " and ".join(name.removeprefix("clip.") for name in frozen) or "no tower"
        raise UserError(f"{file} was trained with {were} frozen; {same}")
    own = {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if not name.startswith(tuple(f"{tower}." for tower in frozen))
    }
    stored = {name: tensor.shape for name, tensor in checkpoint["state_dict"].items()}
    if stored != own:
        name = next(name for name in {**stored, **own} if stored.get(name) != own.get(name))
        there, here = (f"{tuple(shapes[name])}" if name in shapes else "absent" for shapes in (stored, own))
        raise UserError(f"{file} is of a different model ({name} is {there} there and {here} here); {same}")
    for option, now in preprocessing(model.clip, model.lora).items():
        if (then := checkpoint["preprocessing"].get(option)) != now:
            raise UserError(f"{file} was trained with {option} {then}, and the model has {now}; {same}")
    check_fixed_towers(frozen, model.clip)


def check_resumes(file: Path, model: LightningModule, data: LightningDataModule, ranks: int) -> None:
    """Reject a resume with different data, batches or parameter groups, before anything is computed.

    Args:
        file: a checkpoint that `check_fits` has accepted.
        model: the model to train.
        data: the data module after its `setup`.
        ranks: the number of ranks that will train.

    Raises:
        UserError: names the first difference.
    """
    checkpoint = read_checkpoint(file)
    data.check_resumes(checkpoint.get(type(data).__qualname__, {}), ranks)
    own = _sizes(param_groups(model.clip, model.optimizer))
    for optimizer in checkpoint.get("optimizer_states", ()):
        if (stored := _sizes(optimizer["param_groups"])) != own:
            raise UserError(
                f"{file} was trained with the parameter groups {stored}, and the model has {own}; set "
                "--model.optimizer.layer_decay and freeze_below as in training"
            )


def _sizes(groups: list[dict[str, Any]]) -> str:
    return ", ".join(f"{group['name']}: {len(group['params'])}" for group in groups)


def changed_options(before: str, now: str) -> list[str]:
    """Return one line per option that differs between two configurations in YAML.

    A resumed run uses the new values, except for those whose line says that they are ignored.
    """
    old, new = (dict(_flat(yaml.safe_load(text))) for text in (before, now))
    ignored = ("model.init_from", "model.loss.init_args.init_")
    return [
        f"--{name} {json.dumps(new.get(name))} (was {json.dumps(old.get(name))})"
        + ("; ignored, since the checkpoint contains the weights" if name.startswith(ignored) else "")
        for name in {**new, **old}
        if old.get(name) != new.get(name)
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


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


def run_of(place: str | Path | None) -> Path | None:
    """Return the folder of the run that wrote a checkpoint or a bundle, or None if no run did."""
    folders = Path(place).absolute().parents[:2] if place is not None and Path(place).exists() else ()
    return next((folder for folder in folders if RunFolder(folder).is_run()), None)


def keep_scores(
    folder: Path, name: str, scores: Mapping[str, float], about: Mapping[str, str], *, track: bool
) -> None:
    """Store the scores of `test` or `validate` as `NAME.json` in a run's folder, and in its W&B run.

    Args:
        folder: the folder of the run.
        name: the name of the command.
        scores: the scores by name, without a prefix.
        about: which model was scored, and on which data.
        track: whether to add the scores to the summary of the W&B run, if there is one.
    """
    content = json.dumps({**scores, **about}, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / f"{name}.json", content.encode())
    loggers = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["logger"]
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if track and isinstance(logger, dict) and str(logger.get("class_path")).endswith(".RunLogger"):
            settings = logger.get("init_args") or {}
            run_id = settings.get("id") or os.environ.get("WANDB_RUN_ID") or folder.name
            if history_file(folder, run_id).is_file():  # else W&B was disabled
                run = RunLogger(**{**settings, "save_dir": str(folder), "id": run_id})
                run.summarize({f"{name}/{metric}": score for metric, score in scores.items()})


def build_module(kind: type[Module], stored: dict[str, Any], given: dict[str, Any]) -> Module:
    """Build a module from a stored configuration, as the command line would.

    Args:
        kind: the class of the module.
        stored: its arguments in the form of a configuration file.
        given: arguments that replace stored ones.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "model", skip=set(given), instantiate=False)
    options = {"model": {name: value for name, value in stored.items() if name not in given}}
    try:
        return kind(**parser.instantiate(parser.parse_object(options)).model, **given)
    except ArgumentError as error:
        raise UserError(f"the checkpoint was written by an incompatible version: {error}") from error
