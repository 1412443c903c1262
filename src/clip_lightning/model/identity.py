"""Which model made an index: loading it, and a digest of all that decides its embeddings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from clip_lightning.model.clip import CLIP
from clip_lightning.model.lora import merged_state


def load_model(name: str | Path) -> CLIP:
    """The model that `CLIP.from_pretrained` finds by this name, on the GPU where there is one.

    Raises:
        UserError: there is none.
    """
    return CLIP.from_pretrained(name).to("cuda" if torch.cuda.is_available() else "cpu")


def location(name: str | Path) -> str:
    """The name under which the model is found from any folder."""
    prefix = "open_clip:local-dir:"
    if str(name).startswith(prefix):
        return prefix + str(Path(str(name).removeprefix(prefix)).resolve())
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def model_identity(clip: CLIP) -> str:
    """SHA-256 (hex) over weights, architecture, transform and tokenizer.

    Not over names and places: a copy of a bundle is the same model. The scale and the bias of the loss do not
    change embeddings and do not count.
    """
    state = merged_state(clip, clip.state_dict()) if clip.adapted else clip.state_dict()
    image, text = clip.image_tower.spec, clip.text_tower.spec
    about = {
        "image": [image["architecture"], image["arguments"]],
        "text": [text["config"], text["pooling"], text["max_length"]],
        "transform": clip.transform.as_dict(),
        "tokenizer": clip.tokenize.digest(),
    }
    sha = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        if name not in ("logit_scale", "logit_bias"):
            sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()
