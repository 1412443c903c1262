"""Loads a bundle, a run, a checkpoint, or a model of transformers or open_clip by its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clip_lightning.errors import UserError
from clip_lightning.model.bundle import (
    WEIGHTS,
    fetch_weights,
    find_model,
    read_bundle,
    read_json,
    refusing_damage,
)
from clip_lightning.model.checkpoint import load_checkpoint
from clip_lightning.run_folder import RunFolder

if TYPE_CHECKING:
    from clip_lightning.model.clip import CLIP

TRANSFORMERS = {
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
    "vision-text-dual-encoder": "VisionTextDualEncoderModel",
}


def load(clip_class: type[CLIP], name: str) -> CLIP:
    """Load a model in eval mode; see `CLIP.from_pretrained`."""
    if Path(name).is_file():
        clip = load_checkpoint(clip_class, Path(name))
    elif name.startswith("open_clip:"):
        clip = _load_open_clip(clip_class, name.removeprefix("open_clip:"), name)
    elif (run := RunFolder(Path(name))).is_run():
        return load(clip_class, _model_of(run))
    else:
        folder = find_model(name)
        with refusing_damage(name):
            config = read_json(folder / "config.json")
            clip = _load_folder(clip_class, folder, config, name)
    for weight, tensor in clip.named_parameters():
        if not tensor.isfinite().all():
            raise UserError(f"{name} has weights that are not finite ({weight}); train it again")
    clip.keep_scale()
    return clip.eval()


def _model_of(run: RunFolder) -> str:
    """Return the bundle of a run, or its best or last checkpoint if there is no bundle."""
    for path in (run.model, run.best, run.last):
        if path.exists():
            return str(path)
    raise UserError(f"the run {run.path} has neither {run.model.name} nor a checkpoint; give another run")


def _load_folder(clip_class: type[CLIP], folder: Path, config: dict[str, Any], name: str) -> CLIP:
    """Load a bundle, or a model of transformers or open_clip; weights on the Hub are downloaded."""
    model_type = None if "format" in config else config.get("model_type")
    if model_type in TRANSFORMERS:
        from clip_lightning.model.pretrained.hugging_face import load_transformers

        fetch_weights(name, "model*.safetensors", "pytorch_model*.bin")
        return load_transformers(clip_class, folder, TRANSFORMERS[model_type], name)
    if "format" not in config and (folder / "open_clip_config.json").is_file():
        fetch_weights(name, "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        return _load_open_clip(clip_class, f"local-dir:{folder}", name)
    if model_type is not None:
        known = ", ".join(f"{named} ({model})" for named, model in TRANSFORMERS.items())
        raise UserError(
            f"{name} is a model of type {model_type!r}, which does not embed images and texts in one space; "
            f"expected a bundle, an open_clip model, or one of {known}"
        )
    return _load_bundle(clip_class, folder, config, name)


def _load_open_clip(clip_class: type[CLIP], place: str, name: str) -> CLIP:
    from clip_lightning.model.pretrained.open_clip import load_named

    return load_named(clip_class, place, name)


def _load_bundle(clip_class: type[CLIP], folder: Path, config: dict[str, Any], name: str) -> CLIP:
    fetch_weights(name, WEIGHTS)
    if not config or not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{name} is not a clip-lightning bundle; expected a folder with config.json and {WEIGHTS}, or a "
            "CLIP of transformers or open_clip"
        )
    state = read_bundle(folder, config, name)
    _check_shapes(clip_class, config, folder, state)
    clip = clip_class.from_config(config, folder)
    clip.load_state_dict(state)
    own = {*clip.config(), "tokenizer_files"}
    clip.metadata = {key: value for key, value in config.items() if key not in own}
    return clip


def _check_shapes(
    clip_class: type[CLIP], config: dict[str, Any], folder: Path, state: dict[str, Tensor]
) -> None:
    """Compare the configuration with the weights before memory is allocated for the model."""
    try:
        with torch.device("meta"):
            described = clip_class.from_config(config, folder).state_dict()
    except UserError:
        raise
    except Exception:  # some architectures cannot be built on the meta device
        return
    for name, tensor in described.items():
        if name not in state or state[name].shape != tensor.shape:
            saved = tuple(state[name].shape) if name in state else "missing"
            raise ValueError(f"{name} is {tuple(tensor.shape)} in config.json, but {saved} in {WEIGHTS}")
