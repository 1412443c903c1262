"""Writes and reads the model in a checkpoint: frozen towers by digest, adapters, and the preprocessing."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from clip_lightning.errors import UserError
from clip_lightning.model.lora import LoRAConfig, merged_state
from clip_lightning.model.towers import Tower
from clip_lightning.model.towers.base import weights_digest
from clip_lightning.run_folder import RunFolder

if TYPE_CHECKING:
    from clip_lightning.model.clip import CLIP


def leave_out_fixed_towers(checkpoint: dict[str, Any], clip: CLIP, lora: LoRAConfig | None) -> None:
    """Replace the weights of fixed towers in a checkpoint by digests, and move adapters to an entry."""
    state = checkpoint["state_dict"]
    checkpoint["preprocessing"] = preprocessing(clip, lora)
    checkpoint["adapters"] = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    checkpoint["frozen_towers"] = {}
    for name, tower in fixed_towers(clip).items():
        checkpoint["frozen_towers"][name] = tower.digest()
        for key in tower.state_dict():
            del state[f"{name}.{key}"]


def put_back_fixed_towers(checkpoint: dict[str, Any], clip: CLIP, lora: LoRAConfig | None) -> None:
    """Undo `leave_out_fixed_towers` after checking that the towers and their preprocessing are the same."""
    remedy = "use the towers and --model options of that run"
    stored = checkpoint.get("preprocessing", {})
    for name, own in preprocessing(clip, lora).items():
        if stored.get(name) != own:
            raise UserError(f"the checkpoint was trained with {name} {stored.get(name)}, got {own}; {remedy}")
    for name, digest in checkpoint.get("frozen_towers", {}).items():
        side = name.removeprefix("clip.")
        tower = getattr(clip, side)
        if tower.digest() != digest:
            raise UserError(
                f"the checkpoint was trained with another frozen {side} than {tower.spec['name']!r}; {remedy}"
            )
        weights = tower.state_dict()
        checkpoint["state_dict"] |= {f"{name}.{key}": value for key, value in weights.items()}
    checkpoint["state_dict"] |= checkpoint.get("adapters", {})


def preprocessing(clip: CLIP, lora: LoRAConfig | None) -> dict[str, Any]:
    """Return how images and texts are prepared for the towers, which must match the weights."""
    image, text = clip.image_tower.spec, clip.text_tower.spec
    return {
        "image tower": [image["architecture"], image["arguments"]],
        "pictures": clip.transform.as_dict(),
        "text pooling": text["pooling"],
        "longest text": text["max_length"],
        "tokenizer": clip.tokenize.digest(),
        "LoRA": None if lora is None else asdict(lora),
    }


def model_identity(clip: CLIP) -> str:
    """Return SHA-256 (hex) of all that decides the embeddings, but not of names, the scale and the bias."""
    state = merged_state(clip, clip.state_dict())
    weights = {name: value for name, value in state.items() if name not in ("logit_scale", "logit_bias")}
    about = preprocessing(clip, None), clip.text_tower.spec["config"], weights_digest(weights)
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def fixed_towers(clip: CLIP) -> dict[str, Tower]:
    """Return the towers whose own weights are not trained, by their names in a checkpoint."""
    towers = {"clip.image_tower": clip.image_tower, "clip.text_tower": clip.text_tower}
    return {name: tower for name, tower in towers.items() if tower.frozen or tower.adapted}


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Map a checkpoint of a `CLIPModule` into memory, without executing code from it."""
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        _ = [checkpoint[name] for name in ("state_dict", "frozen_towers", "preprocessing")]
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, TypeError) as error:
        raise UserError(
            f"{file} is not a checkpoint of `clip-lightning fit`, or is damaged; give a complete one"
        ) from error
    return checkpoint


def load_checkpoint(clip_class: type[CLIP], file: Path) -> CLIP:
    """Load the model in a checkpoint, with the metadata of its bundle.

    Towers that were fixed in training are not in the checkpoint. They are built by name, and their digests
    must match.
    """
    checkpoint = read_checkpoint(file)
    weights, options = checkpoint["state_dict"], options_of(checkpoint, file)
    lora = LoRAConfig(**options["lora"]) if options["lora"] else None
    if options["init_from"]:
        clip = clip_class.from_pretrained(options["init_from"])
    else:
        heads, towers = options["heads"], options["towers"]
        clip = clip_class.from_towers(
            options["image_tower"],
            options["text_tower"],
            image_size=towers.get("image_size"),
            max_length=towers["max_length"],
            embed_dim=heads["embed_dim"],
            head=heads["kind"],
            dropout=heads["dropout"],
            init_bias=0.0 if "clip.logit_bias" in weights else None,
        )
    if lora is not None:
        clip.add_lora(lora)
    put_back_fixed_towers(checkpoint, clip, lora)
    clip.load_state_dict(
        {name[len("clip.") :]: tensor for name, tensor in weights.items() if name.startswith("clip.")}
    )
    loss = options["loss"] or "InfoNCE"
    path = loss["class_path"] if isinstance(loss, dict) else loss
    clip.metadata = bundle_metadata(file, checkpoint, path.rpartition(".")[2])
    return clip


def options_of(checkpoint: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the arguments of `CLIPModule` with which a checkpoint was trained.

    Those of version 0.1.0 are in config.yaml of its run, with the ones of heads and towers one level higher.
    """
    if "hyper_parameters" in checkpoint:
        return dict(checkpoint["hyper_parameters"]["model"])
    config = yaml.safe_load(RunFolder.of_checkpoint(file.absolute()).config.read_text("utf-8"))
    model, size = config["model"], {"image_size": config["data"]["image_size"]}
    same = ("image_tower", "text_tower", "init_from", "freeze", "lora", "loss")
    return {
        **{name: model[name] for name in same},
        "heads": {"embed_dim": model["embed_dim"], "kind": model["head"], "dropout": model["dropout"]},
        "towers": {name: model[name] for name in ("max_length", "fix_statistics")} | size,
    }


def bundle_metadata(file: Path, checkpoint: Mapping[str, Any], loss: str) -> dict[str, Any]:
    """Return what is known of the run's bundle; metrics only if the checkpoint is from the best epoch."""
    run = RunFolder.of_checkpoint(file.absolute())
    metrics = checkpoint.get("callbacks", {}).get("RunRecorder", {}).get("metrics", {})
    try:
        record = json.loads(run.metrics.read_text("utf-8"))
    except (OSError, ValueError):
        record = {}  # not written yet, or the checkpoint was moved
    names = {"digest": "data_digest", "artifact": "data_artifact"}
    return {
        "metrics": metrics if metrics.get("step") == checkpoint["global_step"] else {},
        "loss": loss,
        "matryoshka": sorted(options_of(checkpoint, file).get("matryoshka") or []),
        "training_data": {ours: record[theirs] for ours, theirs in names.items() if record.get(theirs)},
    }
