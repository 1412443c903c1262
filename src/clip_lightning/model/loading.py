"""Loads a bundle, a run, a checkpoint, or a model of transformers or open_clip by its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
from torch import nn

from clip_lightning.errors import UserError, as_user_error
from clip_lightning.model.bundle import TOKENIZER_SUFFIXES, WEIGHTS, read_bundle, read_json
from clip_lightning.model.checkpoint import load_checkpoint
from clip_lightning.model.pretrained.hugging_face import load_transformers
from clip_lightning.model.pretrained.open_clip import load_open_clip
from clip_lightning.model.towers import ImageTower, TextTower
from clip_lightning.model.towers.base import OWN
from clip_lightning.run_folder import RunFolder

if TYPE_CHECKING:
    from clip_lightning.model.clip import CLIP, SideHeadKind

TRANSFORMERS = ("clip", "siglip", "vision-text-dual-encoder")


def load(clip_class: type[CLIP], name: str) -> CLIP:
    """Load a model in eval mode; see `CLIP.from_pretrained`."""
    with as_user_error(f"{name} cannot be loaded", "check the name, or get the complete model again"):
        clip = _load(clip_class, name)
    if wrong := [weight for weight, tensor in clip.named_parameters() if not tensor.isfinite().all()]:
        raise UserError(f"{name} has weights that are not finite ({wrong[0]}); train it again")
    clip.max_logit_scale = max(clip.max_logit_scale, clip.logit_scale.item())  # SigLIP's is log(117)
    return clip.eval()


def _load(clip_class: type[CLIP], name: str) -> CLIP:
    if Path(name).is_file():
        return load_checkpoint(clip_class, Path(name))
    if name.startswith("open_clip:"):
        return _assemble(clip_class, load_open_clip(name.removeprefix("open_clip:"), name))
    if (run := RunFolder(Path(name))).is_run():
        for path in (run.model, run.best, run.last):
            if path.exists():
                return _load(clip_class, str(path))
        raise UserError(f"the run {name} has neither {run.model.name} nor a checkpoint; give another run")
    folder = _find(name)
    config = read_json(folder / "config.json")
    model_type = None if "format" in config else config.get("model_type")
    if model_type in TRANSFORMERS:
        _fetch_weights(name, "model*.safetensors", "pytorch_model*.bin")
        return _assemble(clip_class, load_transformers(folder, name))
    if "format" not in config and (folder / "open_clip_config.json").is_file():
        _fetch_weights(name, "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        return _assemble(clip_class, load_open_clip(f"local-dir:{folder}", name))
    if "image_tower" not in config:
        raise UserError(
            f"{name} is not a clip-lightning bundle (config.json and {WEIGHTS}) or a model of open_clip, and "
            f"its type in transformers is {model_type!r}, expected one of {', '.join(TRANSFORMERS)}"
        )
    _fetch_weights(name, WEIGHTS)
    return _load_bundle(clip_class, folder, config, name)


def _find(name: str) -> Path:
    """Return the folder of a model; a model on the Hub is downloaded without weights (`_fetch_weights`)."""
    if Path(name).is_dir():
        return Path(name)
    if name.startswith("wandb:"):
        from clip_lightning.wandb_fetch import ArtifactName, fetch

        return fetch(ArtifactName.parse(name.removeprefix("wandb:"), "wandb:")).folder
    patterns = [*(f"*{suffix}" for suffix in TOKENIZER_SUFFIXES), "README.md"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # huggingface_hub has no base class for its errors
        raise UserError(
            f"no model {name!r}: there is no such folder, and it could not be downloaded from the Hugging "
            "Face Hub; check the path or the name"
        ) from error


def _fetch_weights(name: str, *patterns: str) -> None:
    """Download the weights of a model on the Hub that match the first pattern with any match."""
    if Path(name).is_dir() or name.startswith("wandb:"):
        return
    for pattern in patterns:
        if any(Path(huggingface_hub.snapshot_download(name, allow_patterns=[pattern])).glob(pattern)):
            return


def _load_bundle(clip_class: type[CLIP], folder: Path, config: dict[str, Any], name: str) -> CLIP:
    state = read_bundle(folder, config)
    if OWN in (config["image_tower"]["architecture"], config["text_tower"]["config"]["model_type"]):
        raise UserError(f"a tower of {name} is a custom module; use CLIP.from_towers, and load {WEIGHTS}")
    try:  # compare the shapes before memory is allocated
        with torch.device("meta"):
            described = clip_class.from_config(config, folder)
    except UserError:
        raise
    except Exception:  # some architectures cannot be built on the meta device
        pass
    else:
        described.load_state_dict(state, assign=True)
    clip = clip_class.from_config(config, folder)
    clip.load_state_dict(state)
    own = {*clip.config(), "tokenizer_files"}
    clip.metadata = {key: value for key, value in config.items() if key not in own}
    return clip


@torch.no_grad()
def _assemble(clip_class: type[CLIP], parts: tuple[ImageTower, TextTower, dict[str, Any], int, Any]) -> CLIP:
    """Combine towers, their projections, the width of the embeddings, and the scale and bias of a model."""
    image_tower, text_tower, projections, embed_dim, model = parts
    kinds = {side: _head_kind(layer) for side, layer in projections.items()}
    head: Any = "linear" if {*kinds.values()} == {"linear"} else kinds
    bias = None if getattr(model, "logit_bias", None) is None else model.logit_bias.item()
    clip = clip_class(image_tower, text_tower, embed_dim=embed_dim, head=head, init_bias=bias)
    for side, layer in projections.items():
        if layer is not None:  # the head begins with a dropout
            layers = layer if isinstance(layer, nn.Sequential) else [layer]
            clip.heads[side].load_state_dict(nn.Sequential(nn.Identity(), *layers).state_dict())
    clip.logit_scale.fill_(model.logit_scale.item())
    # Copied, as the alignment of memory-mapped weights can change the last bit of a product.
    for tensor in (*clip.parameters(), *clip.buffers()):
        tensor.data = tensor.data.clone()
    return clip


def _head_kind(layer: nn.Module | None) -> SideHeadKind:
    if layer is None:
        return "none"
    if isinstance(layer, nn.Linear):
        return "linear" if layer.bias is None else "affine"
    return "gelu"
