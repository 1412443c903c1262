"""`CLIPModel`, `SiglipModel` and `VisionTextDualEncoderModel` of transformers, taken apart."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, CLIPModel, SiglipModel, VisionTextDualEncoderModel

from clip_lightning.errors import UserError
from clip_lightning.model.pretrained.parts import Parts
from clip_lightning.model.pretrained.pixels import transform_of_processor
from clip_lightning.model.towers import ImageTower, TextTower, Tokenize
from clip_lightning.model.towers.base import first_line, plain_config
from clip_lightning.model.towers.text import DEFAULT_MAX_LENGTH, TokenizeSettings
from clip_lightning.model.towers.transformers_image import TransformersImage

_MODELS: dict[str, Any] = {
    "clip": CLIPModel,
    "siglip": SiglipModel,
    "vision-text-dual-encoder": VisionTextDualEncoderModel,
}


def load_transformers(folder: Path, name: str) -> Parts:
    """The model in a folder, with its weights in fp32, its image processor and its tokenizer.

    Args:
        folder: as transformers saves it. Nothing else is read, and none of its code is run.
        name: what the user called it.

    Raises:
        UserError: it lacks something, or has a part that cannot be taken.
    """
    transform = transform_of_processor(folder, name)
    tokenizer = load_tokenizer(folder, name)
    model = _load_model(folder, name)
    backbone = TransformersImage(model.vision_model)
    _check_pooled(backbone, transform.size, name)
    vision = plain_config(model.config.vision_config)
    image_tower = ImageTower(
        backbone,
        {"name": f"{name} (image)", "architecture": backbone.ARCHITECTURE, "arguments": vision},
        transform,
    )
    image_projection, text_projection = _projections(model)
    text_tower = _text_tower(model, tokenizer, name)
    return Parts(
        image_tower,
        text_tower,
        {"image": image_projection, "text": text_projection},
        embed_dim=image_tower.width if image_projection is None else image_projection.out_features,
        logit_scale=model.logit_scale.detach(),
        logit_bias=model.logit_bias.detach() if isinstance(model, SiglipModel) else None,
    )


def load_tokenizer(place: Path | str, name: str) -> Any:
    """The tokenizer of transformers in a folder.

    Raises:
        UserError: there is none, or it needs a package that is missing.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except ImportError as error:
        raise UserError(
            f"the tokenizer of {name} needs a package ({first_line(error)}); "
            "pip install sentencepiece protobuf"
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"the tokenizer of {name} cannot be read ({first_line(error)})") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without one
        raise UserError(f"{name} has no tokenizer; expected tokenizer.json or a vocabulary in its folder")
    return tokenizer


def _load_model(folder: Path, name: str) -> Any:
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    try:
        model, info = _MODELS[kind].from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(
            f"{name} cannot be read as a {_MODELS[kind].__name__} ({first_line(error)}); expected "
            "config.json and the weights that belong to it, as safetensors"
        ) from error
    if missing := info["missing_keys"]:
        raise UserError(
            f"the weights of {name} lack {len(missing)} of its tensors, {min(missing)} among them; "
            "get it whole again"
        )
    return model


def _text_tower(model: Any, tokenizer: Any, name: str) -> TextTower:
    config = model.config.text_config
    spec: dict[str, Any] = {
        "name": f"{name} (text)",
        "config": plain_config(config),
        "pooling": "pooler",
        "max_length": config.max_position_embeddings,
    }
    if isinstance(model, SiglipModel):
        # It was trained on texts padded to its length, reads the padding and pools the last token.
        settings: TokenizeSettings | None = {"padding_side": tokenizer.padding_side}
        spec |= {"pooling": "last", "tokenize": settings}
    else:
        settings = None
        if not isinstance(model, CLIPModel):  # BERT's 512 positions are not what it was trained with
            spec["max_length"] = min(DEFAULT_MAX_LENGTH, config.max_position_embeddings)
            if getattr(model.text_model, "pooler", None) is None and config.model_type != "clip_text_model":
                raise UserError(
                    f"{name}: its text model {config.model_type!r} has no pooler, which the projection "
                    "needs; expected a BERT-like one"
                )
    return TextTower(model.text_model, Tokenize(tokenizer, spec["max_length"], settings), spec)


def _projections(model: Any) -> tuple[Any, Any]:
    """The linear layers behind the towers' features, None for none.

    SigLIP's is called the head of its text model; its pictures have none.
    """
    if isinstance(model, SiglipModel):
        return None, model.text_model.head  # the text tower leaves it out
    return model.visual_projection, model.text_projection


@torch.no_grad()
def _check_pooled(backbone: TransformersImage, size: tuple[int, int], name: str) -> None:
    """Refuse vision models that give no vector a picture, or none for pictures of this size."""
    try:
        features = backbone(torch.zeros(1, 3, *size))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{name} cannot take pictures of {size[0]}x{size[1]} pixels, as its image processor makes them "
            f"({first_line(error)})"
        ) from error
    if features is None or features.ndim != 2:
        raise UserError(f"{name}: its vision model gives no pooled output; expected one as ViT's or CLIP's")
