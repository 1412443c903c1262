"""How a model of others wants its pictures, as our `ImageTransform`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor

from clip_lightning.data.images import ImageTransform
from clip_lightning.errors import UserError
from clip_lightning.model.towers.base import first_line

# Whose settings say all that they do. ConvNeXt's, for one, enlarges pictures before it crops.
_PROCESSORS = ("CLIP", "Siglip", "ViT", "DeiT", "Beit", "Bit")
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def transform_of_processor(folder: Path, name: str) -> ImageTransform:
    """The transform of the image processor that transformers has saved in a folder.

    Raises:
        UserError: there is none, or one that does something else than resize, crop and normalise.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{name} does not say how it wants its pictures ({first_line(error)}); expected the "
            "preprocessor_config.json that transformers' processors save"
        ) from error

    def refuse(what: str) -> UserError:
        return UserError(
            f"{name}: its image processor {type(processor).__name__} {what}; expected one that resizes to "
            "the shortest edge and crops the centre, or resizes to height and width"
        )

    if type(processor).__name__.removesuffix("Fast").removesuffix("Pil") not in {
        f"{kind}ImageProcessor" for kind in _PROCESSORS
    }:
        raise refuse("is not known here")
    if not processor.do_resize or not processor.do_rescale or abs(processor.rescale_factor * 255 - 1) > 1e-3:
        raise refuse("does not resize, or does not divide by 255")
    interpolation = _INTERPOLATIONS.get(int(processor.resample))
    if interpolation is None:
        raise refuse(f"resizes by Pillow's method {int(processor.resample)}, not bilinear or bicubic")
    mean, std = (
        (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    )
    shape = _shape(dict(processor.size), dict(processor.crop_size or {}) if processor.do_center_crop else {})
    if shape is None:
        raise refuse(f"has the size {dict(processor.size)}")
    return ImageTransform(interpolation=interpolation, mean=tuple(mean), std=tuple(std), **shape)  # type: ignore[arg-type]


def _shape(size: dict[str, Any], crop: dict[str, Any]) -> dict[str, Any] | None:
    """The transform's `size`, `fit` and `shortest_edge`; None where it has no such."""
    named = {key for key, value in size.items() if value is not None}
    if named == {"height", "width"}:
        whole = (size["height"], size["width"])
        same = not crop or (crop["height"], crop["width"]) == whole
        return {"size": whole, "fit": "squash"} if same else None
    if named == {"shortest_edge"} and crop:
        edge, cropped = size["shortest_edge"], (crop["height"], crop["width"])
        if edge >= max(cropped):
            return {"size": cropped, "shortest_edge": None if cropped == (edge, edge) else edge}
    return None


def transform_of_open_clip(settings: dict[str, Any], name: str) -> ImageTransform:
    """The transform of open_clip's preprocessing settings (`size`, `resize_mode`, `mean`, ...).

    Raises:
        UserError: it pads pictures.
    """
    size, mode = settings["size"], settings["resize_mode"]
    if mode not in ("shortest", "squash"):
        raise UserError(
            f"{name} resizes pictures in open_clip's way {mode!r}, which pads them; expected "
            "'shortest' or 'squash'"
        )
    return ImageTransform(
        size=(size, size) if isinstance(size, int) else tuple(size),
        # `random` is a way to train: open_clip evaluates with bicubic then
        interpolation="bilinear" if settings["interpolation"] == "bilinear" else "bicubic",
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        fit="crop" if mode == "shortest" else "squash",
    )
