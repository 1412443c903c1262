"""A checkpoint of `fit` as a model: what it holds, put into what its run's configuration names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP
from clip_lightning.run_folder import RunFolder
from clip_lightning.training.module import CLIPModule
from clip_lightning.training.runs import check_fits


def load_checkpoint(file: Path) -> CLIP:
    """The model of `runs/ID/checkpoints/NAME.ckpt`, in eval mode, with what a bundle says of its training.

    Towers that were fixed in training are not in the checkpoint: they are had again by the names in the run's
    config.yaml, and must have the digest that the checkpoint names.

    Raises:
        UserError: no checkpoint, one outside of its run, or a tower that is another one now.
    """
    run = RunFolder.of_checkpoint(file.absolute())
    try:
        config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
        model = {**_model_options(config["model"]), "image_size": config["data"]["image_size"]}
    except (OSError, yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError) as error:
        raise UserError(
            f"{file} is not in the folder of its run: expected its towers' names in {run.config}; "
            "give RUN/checkpoints/best.ckpt"
        ) from error
    try:
        module = _build(model)
        check_fits(file, module)
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        module.on_load_checkpoint(checkpoint)
    except UserError as error:
        raise UserError(str(error).replace("--ckpt_path ", "")) from error
    module.load_state_dict(checkpoint["state_dict"])
    module.clip.metadata = _metadata(run, config, checkpoint, module)
    return module.clip.eval()


def _model_options(model: dict[str, Any]) -> dict[str, Any]:
    """Group the options of heads and towers, which version 0.1.0 wrote one level higher."""
    if "heads" in model:
        return model
    heads = {
        new: model[old] for new, old in (("embed_dim", "embed_dim"), ("kind", "head"), ("dropout", "dropout"))
    }
    return {
        **{
            name: model[name] for name in ("image_tower", "text_tower", "init_from", "freeze", "lora", "loss")
        },
        "heads": heads,
        "towers": {name: model[name] for name in ("max_length", "fix_statistics")},
    }


def _build(values: dict[str, Any]) -> CLIPModule:
    """The module as the command line would build it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(CLIPModule, "model")
    try:
        module: CLIPModule = parser.instantiate(parser.parse_object({"model": values})).model
    except ArgumentError as error:
        raise UserError(f"config.yaml of the run is of another version: {error}") from error
    return module


def _metadata(
    run: RunFolder, config: dict[str, Any], checkpoint: dict[str, Any], module: CLIPModule
) -> dict[str, Any]:
    """As the run itself writes it; the metrics are those of the best epoch, if the checkpoint is of that."""
    metrics = checkpoint["callbacks"].get("RunRecorder", {}).get("metrics", {})
    try:
        record = json.loads(run.metrics.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}  # the run was killed before it wrote any
    names = {"digest": "data_digest", "artifact": "data_artifact"}
    data = {ours: record[theirs] for ours, theirs in names.items() if record.get(theirs)}
    return {
        "metrics": metrics if metrics.get("step") == checkpoint["global_step"] else {},
        "loss": type(module.loss).__name__,
        "training_data": {"dataset": config["data"]["dataset"], **data},
    }
