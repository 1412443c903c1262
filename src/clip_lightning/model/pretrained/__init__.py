"""Models that others have trained, as the parts of a `CLIP`: those of transformers and of open_clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from clip_lightning.errors import UserError
from clip_lightning.model.pretrained.parts import Parts

Kind = Literal["transformers", "open_clip"]
WEIGHTS: dict[Kind, tuple[str, ...]] = {
    "transformers": ("model*.safetensors", "pytorch_model*.bin"),
    "open_clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
}
"""Files on the hub that a model of each kind needs, the safer ones first."""
TRANSFORMERS = {
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
    "vision-text-dual-encoder": "VisionTextDualEncoderModel",
}
OPEN_CLIP_CONFIG = "open_clip_config.json"


def kind_of(folder: Path, config: dict[str, Any], name: str) -> Kind | None:
    """Whose model lies in a folder, None for anything else than theirs.

    Args:
        folder: of the model.
        config: its config.json, empty where there is none.
        name: what the user called it, for messages.

    Raises:
        UserError: it is a model of transformers that cannot be taken.
    """
    if "format" in config:
        return None
    model_type = config.get("model_type")
    if model_type in TRANSFORMERS:
        return "transformers"
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return "open_clip"
    if model_type is not None:
        known = ", ".join(f"{kind} ({model})" for kind, model in TRANSFORMERS.items())
        raise UserError(
            f"{name} is a model of type {model_type!r}, which has no two towers with a shared embedding; "
            f"expected a bundle, an open_clip model, or one of {known}"
        )
    return None


def load(kind: Kind, folder: Path, name: str) -> Parts:
    """The model of that kind in a folder.

    Raises:
        UserError: it cannot be read or taken.
    """
    if kind == "open_clip":
        return load_open_clip(f"open_clip:local-dir:{folder}", name)
    from clip_lightning.model.pretrained.hugging_face import load_transformers

    return load_transformers(folder, name)


def load_open_clip(place: str, name: str | None = None) -> Parts:
    """The model `open_clip:NAME/TAG` or `open_clip:local-dir:FOLDER`.

    Args:
        place: as open_clip finds it.
        name: what the user called it, where that is something else.

    Raises:
        UserError: it cannot be read or taken, or open_clip is not installed.
    """
    from clip_lightning.model.pretrained.open_clip import load_named

    return load_named(place.removeprefix("open_clip:"), name or place)
