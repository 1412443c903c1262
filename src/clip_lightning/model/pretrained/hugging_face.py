"""Loads `CLIPModel`, `SiglipModel` and `VisionTextDualEncoderModel` of transformers as `CLIP`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModel, CLIPModel, SiglipModel

from clip_lightning.data.images import ImageTransform
from clip_lightning.model.towers import ImageTower, TextTower
from clip_lightning.model.towers.base import plain_config, without_weight_bars
from clip_lightning.model.towers.image import TransformersImage
from clip_lightning.model.towers.text import DEFAULT_MAX_LENGTH, TokenizeSettings, load_tokenizer

# Image processors that do nothing but what their settings describe. ConvNeXt's also enlarges before it crops.
_PROCESSORS = ("CLIP", "Siglip", "ViT", "DeiT", "Beit", "Bit")
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def load_transformers(folder: Path, name: str) -> tuple[ImageTower, TextTower, dict[str, Any], int, Any]:
    """Return the towers in fp32, their projections, the width of the embeddings, and the original model.

    No other files in the folder are read, and no code in it is run.
    """
    transform = _transform(folder)
    tokenizer = load_tokenizer(folder)
    options = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}
    with without_weight_bars():
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True, **options)
    if missing := info["missing_keys"]:  # transformers only logs them
        raise ValueError(f"the weights lack {len(missing)} tensors, such as {min(missing)}")
    text = model.config.text_config
    length, pooling, settings = text.max_position_embeddings, "pooler", None
    if isinstance(model, SiglipModel):
        # It is trained on padded texts, attends to the padding, and pools the last token. The projection is
        # part of its text model.
        projections = {"image": None, "text": model.text_model.head}
        pooling, settings = "last", TokenizeSettings(padding_side=tokenizer.padding_side)
    else:
        projections = {"image": model.visual_projection, "text": model.text_projection}
        if not isinstance(model, CLIPModel):  # it was trained on fewer tokens than BERT's 512 positions
            length = min(DEFAULT_MAX_LENGTH, length)
    image_spec = {
        "name": f"{name} (image)",
        "architecture": TransformersImage.ARCHITECTURE,
        "arguments": plain_config(model.config.vision_config),
    }
    text_spec = {"name": f"{name} (text)", "config": plain_config(text), "pooling": pooling}
    text_spec |= {"max_length": length} | ({"tokenize": settings} if settings else {})
    image_tower = ImageTower(TransformersImage(model.vision_model), image_spec, transform)
    text_tower = TextTower(model.text_model, tokenizer, text_spec)
    return image_tower, text_tower, projections, projections["text"].out_features, model


def _transform(folder: Path) -> ImageTransform:
    """Return the transform of the image processor in a folder."""
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    kind = type(processor).__name__
    if (
        kind.removesuffix("Fast").removesuffix("Pil").removesuffix("ImageProcessor") not in _PROCESSORS
        or not (processor.do_resize and processor.do_rescale)
        or abs(processor.rescale_factor * 255 - 1) > 1e-3
        or processor.resample not in _INTERPOLATIONS
        or (shape := _shape(processor)) is None
    ):
        raise ValueError(
            f"the image processor {kind} with its settings is not supported; expected one of CLIP, SigLIP or "
            "ViT that resizes, bilinear or bicubic, and crops the center, and divides by 255"
        )
    return ImageTransform(
        interpolation=_INTERPOLATIONS[processor.resample],  # type: ignore[arg-type]
        mean=tuple(processor.image_mean) if processor.do_normalize else (0.0,) * 3,
        std=tuple(processor.image_std) if processor.do_normalize else (1.0,) * 3,
        **shape,
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
