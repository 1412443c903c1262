"""The checkpoint to resume from: where it is, and whether it fits."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
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


def find_checkpoint(given: Any, root: Path) -> Path | None:
    """The file that `--ckpt_path` means: a path, or `last` or `best` of the newest run under `root`.

    `auto` is the newest `last` that there is, and None where there is none: for a job that is started again
    by the same command.

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
        return _sound(Path(given), given)
    runs = RunFolder.runs(root)
    if given == "auto":
        saved = [run.last for run in runs if run.last.is_file()]
        return _sound(max(saved, key=lambda file: file.stat().st_mtime), given) if saved else None
    if not runs:
        raise UserError(
            f"--ckpt_path {given}: no run under {root}; start one without --ckpt_path, "
            "or give its --trainer.default_root_dir"
        )
    newest = runs[-1]
    checkpoint = newest.last if given == "last" else newest.best
    if not checkpoint.is_file():
        raise UserError(
            f"--ckpt_path {given}: the newest run, {newest.path}, has no {given}.ckpt; "
            "name the checkpoint of another run, or start anew without --ckpt_path"
        )
    return _sound(checkpoint, given)


def _sound(checkpoint: Path, given: Any) -> Path:
    """The checkpoint, or in place of a damaged last one the one before.

    Raises:
        UserError: it is damaged, and there is none to take in its place.
    """
    wrong = damage(checkpoint)
    if wrong is None:
        return checkpoint
    before = checkpoint.with_name(PREVIOUS)
    if checkpoint.name != LAST or not before.is_file() or damage(before) is not None:
        raise UserError(
            f"--ckpt_path {given}: {checkpoint} is damaged ({wrong}); name another checkpoint, or start anew"
        )
    print(f"{checkpoint} is damaged ({wrong}); the one before is taken, {before.name}", file=sys.stderr)
    return before


def check_fits(file: Path, model: LightningModule) -> None:
    """Refuse what is no checkpoint, or one of another model.

    Raises:
        UserError: says what is different.
    """
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        stored, frozen = checkpoint["state_dict"], checkpoint["frozen_towers"]
        then = checkpoint["preprocessing"]
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, TypeError) as error:
        raise UserError(f"--ckpt_path {file} is no checkpoint of `clip-lightning fit`") from error
    same = "give the same --model options as in training (they are in config.yaml of the run)"
    if frozen.keys() != fixed_towers(model.clip).keys():
        were = " and ".join(name.removeprefix("clip.") for name in frozen) or "no tower"
        raise UserError(f"--ckpt_path {file} was trained with {were} frozen; {same}")
    own = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(tuple(f"{tower}." for tower in frozen))
    }
    if differing := _differing(stored, own):
        raise UserError(f"--ckpt_path {file} is of another model ({differing}); {same}")
    for what, now in preprocessing(model.clip, model.lora).items():
        if then.get(what) != now:
            raise UserError(f"--ckpt_path {file}: its {what} is {then.get(what)}, here {now}; {same}")
    check_fixed_towers(frozen, model.clip)


def check_resumes(file: Path, model: LightningModule, data: LightningDataModule, ranks: int) -> None:
    """Refuse to resume with other data, batches or groups of weights, before anything is computed or written.

    Args:
        file: a checkpoint that `check_fits` has accepted.
        model: to train.
        data: after its `setup`.
        ranks: how many will train.

    Raises:
        UserError: says what is different.
    """
    checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    data.check_resumes(checkpoint.get(type(data).__qualname__, {}), ranks)
    for optimizer in checkpoint.get("optimizer_states", ()):
        stored = [(group["name"], len(group["params"])) for group in optimizer["param_groups"]]
        own = [(group["name"], len(group["params"])) for group in param_groups(model.clip, model.optimizer)]
        if stored != own:
            raise UserError(
                f"--ckpt_path {file} was trained with other groups of weights ({_listed(stored)}; here "
                f"{_listed(own)}); give the same --model.optimizer.layer_decay and freeze_below as then"
            )


def _listed(groups: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in groups)


def changed_options(before: str, now: str) -> list[str]:
    """List the options that differ between two configurations in YAML, a line for each.

    A resumed run takes the new values, unless the line says that it ignores one.
    """
    old, new = (dict(_flat(yaml.safe_load(text))) for text in (before, now))
    ignored = ("model.init_from", "model.loss.init_args.init_")
    return [
        f"--{name} {json.dumps(new.get(name))} (was {json.dumps(old.get(name))})"
        + ("; ignored, since the checkpoint has these weights" if name.startswith(ignored) else "")
        for name in {**new, **old}
        if old.get(name) != new.get(name)
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _differing(stored: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str:
    """The first tensor that `own` lacks or has in another shape; nothing if there is none."""
    for name, tensor in stored.items():
        if name not in own:
            return f"it has {name}"
        if tensor.shape != own[name].shape:
            return f"{name} is {tuple(tensor.shape)} there, {tuple(own[name].shape)} here"
    for name in own:
        if name not in stored:
            return f"it lacks {name}"
    return ""


def place_logger(logger: Namespace, folder: Path) -> None:
    """Let a logger write into the run's folder, under the run's id."""
    settings = logger.init_args
    kind = logger.class_path.rpartition(".")[2]
    if kind in ("RunLogger", "WandbLogger"):
        run_id = settings.get("id") or os.environ.get("WANDB_RUN_ID") or folder.name
        settings.update(Namespace(save_dir=str(folder), id=run_id))
    if kind == "WandbLogger":  # Lightning's, which asks for a key, and refuses to log models offline
        settings.project = settings.get("project") or default_project()
        if settings.get("offline") or stays_offline(None):
            settings.update(Namespace(mode="offline", log_model=False))
    elif kind in ("CSVLogger", "TensorBoardLogger"):
        # Lightning's CSVLogger deletes what it finds: a resumed run gets a folder of its own
        earlier = (folder / "metrics.csv").exists()
        version = f"resumed-{len(list(folder.glob('resumed-*'))) + 1}" if earlier else ""
        settings.update(Namespace(save_dir=str(folder), name="", version=version))


def run_of(place: str | Path | None) -> Path | None:
    """Return the folder of the run that has left a checkpoint or a bundle at this place, if it is one's."""
    folders = Path(place).absolute().parents[:2] if place is not None and Path(place).exists() else ()
    return next((folder for folder in folders if RunFolder(folder).is_run()), None)


def keep_scores(
    folder: Path, name: str, scores: Mapping[str, float], about: Mapping[str, str], *, track: bool
) -> None:
    """Keep the scores of `test` or `validate` as `NAME.json` in a run's folder, and in its W&B run.

    Args:
        folder: of the run.
        name: of the command.
        scores: by their plain names.
        about: what was scored, and on which data.
        track: whether the W&B run, if there is one, gets them in its summary.
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
                run.summarise({f"{name}/{metric}": score for metric, score in scores.items()})
