"""Loads `CLIPModel`, `SiglipModel` and `VisionTextDualEncoderModel` of transformers as `CLIP`."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoImageProcessor, CLIPModel, SiglipModel

from clip_lightning.data.images import ImageTransform
from clip_lightning.errors import UserError
from clip_lightning.model.pretrained.assemble import assemble
from clip_lightning.model.towers import ImageTower, TextTower, Tokenize
from clip_lightning.model.towers.base import first_line, plain_config
from clip_lightning.model.towers.image import TransformersImage
from clip_lightning.model.towers.text import DEFAULT_MAX_LENGTH
from clip_lightning.model.towers.tokenize import TokenizeSettings, load_tokenizer

if TYPE_CHECKING:
    from clip_lightning.model.clip import CLIP

# Image processors that do nothing but what their settings describe. ConvNeXt's also enlarges before it crops.
_PROCESSORS = ("CLIP", "Siglip", "ViT", "DeiT", "Beit", "Bit")
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def load_transformers(clip_class: type[CLIP], folder: Path, model_class: str, name: str) -> CLIP:
    """Load a model in fp32, with its image processor and its tokenizer.

    Args:
        clip_class: class of the result.
        folder: folder that transformers saved. No other files are read, and no code in the folder is run.
        model_class: name of the model's class in transformers.
        name: name of the model in messages.
    """
    transform = _transform(folder, name)
    tokenizer = load_tokenizer(folder, name)
    try:
        model, info = getattr(transformers, model_class).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(
            f"{name} cannot be read as a {model_class} ({first_line(error)}); expected "
            "config.json and the weights that belong to it, as safetensors"
        ) from error
    if missing := info["missing_keys"]:
        raise UserError(
            f"the weights of {name} lack {len(missing)} of its tensors, {min(missing)} among them; "
            "get the complete model again"
        )
    backbone = TransformersImage(model.vision_model)
    spec = {
        "name": f"{name} (image)",
        "architecture": backbone.ARCHITECTURE,
        "arguments": plain_config(model.config.vision_config),
    }
    try:
        image_tower = ImageTower(backbone, spec, transform)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if isinstance(model, SiglipModel):  # the projection is part of its text model
        image_projection, text_projection = None, model.text_model.head
    else:
        image_projection, text_projection = model.visual_projection, model.text_projection
    return assemble(
        clip_class,
        image_tower,
        _text_tower(model, tokenizer, name),
        {"image": image_projection, "text": text_projection},
        embed_dim=image_tower.width if image_projection is None else image_projection.out_features,
        logit_scale=model.logit_scale.detach(),
        logit_bias=model.logit_bias.detach() if isinstance(model, SiglipModel) else None,
    )


def _text_tower(model: Any, tokenizer: Any, name: str) -> TextTower:
    config = model.config.text_config
    length, settings = config.max_position_embeddings, None
    spec: dict[str, Any] = {"name": f"{name} (text)", "config": plain_config(config), "pooling": "pooler"}
    if isinstance(model, SiglipModel):
        # SigLIP is trained on padded texts, attends to the padding, and pools the last token.
        settings = TokenizeSettings(padding_side=tokenizer.padding_side)
        spec |= {"pooling": "last", "tokenize": settings}
    elif not isinstance(model, CLIPModel):  # it was trained on fewer tokens than BERT's 512 positions
        length = min(DEFAULT_MAX_LENGTH, length)
        if getattr(model.text_model, "pooler", None) is None and config.model_type != "clip_text_model":
            raise UserError(
                f"{name}: the text model {config.model_type!r} has no pooler; expected a model like "
                "BERT, whose pooled output is projected"
            )
    return TextTower(model.text_model, Tokenize(tokenizer, length, settings), spec | {"max_length": length})


def _transform(folder: Path, name: str) -> ImageTransform:
    """Return the transform of the image processor in a folder."""
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"the image processor of {name} cannot be read ({first_line(error)}); expected the "
            "preprocessor_config.json that transformers saves"
        ) from error
    kind = type(processor).__name__
    if kind.removesuffix("Fast").removesuffix("Pil").removesuffix("ImageProcessor") not in _PROCESSORS:
        problem = "is not supported"
    elif (
        not processor.do_resize or not processor.do_rescale or abs(processor.rescale_factor * 255 - 1) > 1e-3
    ):
        problem = "does not resize, or does not divide by 255"
    elif int(processor.resample) not in _INTERPOLATIONS:
        problem = f"resizes by Pillow's method {int(processor.resample)} instead of bilinear or bicubic"
    elif (shape := _shape(processor)) is None:
        problem = f"has the size {dict(processor.size)}"
    else:
        mean, std = processor.image_mean, processor.image_std
        return ImageTransform(
            interpolation=_INTERPOLATIONS[int(processor.resample)],  # type: ignore[arg-type]
            mean=tuple(mean) if processor.do_normalize else (0.0,) * 3,
            std=tuple(std) if processor.do_normalize else (1.0,) * 3,
            **shape,
        )
    raise UserError(
        f"{name}: the image processor {kind} {problem}; expected one that resizes the shortest edge and "
        "crops the center, or resizes to height and width"
    )


def _shape(processor: Any) -> dict[str, Any] | None:
    """Return `size`, `fit` and `shortest_edge` of the transform, or None if it cannot be expressed."""
    size = {key: value for key, value in dict(processor.size).items() if value is not None}
    crop = processor.crop_size if processor.do_center_crop else None
    cropped = (crop["height"], crop["width"]) if crop else None
    if size.keys() == {"height", "width"}:
        full = (size["height"], size["width"])
        return {"size": full, "fit": "squash"} if cropped in (None, full) else None
    if size.keys() != {"shortest_edge"} or cropped is None or size["shortest_edge"] < max(cropped):
        return None
    edge = size["shortest_edge"]
    return {"size": cropped, "shortest_edge": None if cropped == (edge, edge) else edge}
