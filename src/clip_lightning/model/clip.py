"""CLIP: an image tower, a text tower, two projection heads and a learnable scale, saved as one folder.

B images, N texts, H, W pixels, L tokens, D the width of the shared embedding.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_lightning.data.images import BrokenImage, ImageTransform
from clip_lightning.errors import UserError, check_option
from clip_lightning.model.bundle import BUNDLE_FORMAT, write_bundle
from clip_lightning.model.encode import encode_images, encode_texts, one_or_many
from clip_lightning.model.lora import LoRAConfig, add_lora, merged_state
from clip_lightning.model.towers import ImageTower, TextTower, Tower

HeadKind = Literal["linear", "mlp"]
# Pretrained models may also have a bias, two layers with a GELU between them, or no projection.
SideHeadKind = Literal["linear", "mlp", "affine", "gelu", "none"]
Freeze = Literal["none", "image", "text", "both"]
Errors = Literal["raise", "skip"]
_log = logging.getLogger(__name__)


class NewModelOptions(TypedDict, total=False):
    """Options of the heads and of the loss, which `CLIP` documents."""

    embed_dim: int
    head: HeadKind | dict[str, SideHeadKind]
    dropout: float
    init_scale: float
    init_bias: float | None


class Dropout(nn.Dropout):
    """Draws 16 random bits per value on a CPU, which takes a tenth of the time of torch's dropout."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not 0 < self.p < 1 or input.device.type != "cpu":
            return super().forward(input)
        bits = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        drawn = bits.view(torch.int16)[: input.numel()].view(input.shape)  # -2^15 to 2^15
        dropped = int(self.p * 2**16)
        return input * (drawn >= dropped - 2**15) * (2**16 / (2**16 - dropped))


class _UnitLength(torch.autograd.Function):
    """`F.normalize` of rows, with a backward pass that reads the rows less often."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        norm = rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        unit = rows / norm
        ctx.save_for_backward(rows, unit, norm)
        return unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        rows, unit, norm = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives, these must depend on the rows
            norm = rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            unit = rows / norm
        along = (grad * unit).sum(dim=-1, keepdim=True)  # in fp32 also under autocast, unlike `vecdot`
        return torch.addcmul(grad, unit, along, value=-1).div_(norm)


def unit_length(rows: Tensor) -> Tensor:
    """Return rows (..., D) divided by their norms."""
    unit: Tensor = _UnitLength.apply(rows) if rows.requires_grad else F.normalize(rows, dim=-1)
    return unit


class ResidualMLPHead(nn.Module):
    """A linear projection followed by one residual block with GELU, dropout and layer norm."""

    def __init__(self, width: int, embed_dim: int, dropout: float) -> None:
        super().__init__()
        self.projection = nn.Linear(width, embed_dim)
        self.hidden = nn.Linear(embed_dim, embed_dim)
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Return embeddings (B, embed_dim) of features (B, width), which are not normalized."""
        projected = self.projection(features)
        return self.norm(projected + self.dropout(self.hidden(F.gelu(projected))))


def _head(kind: SideHeadKind, width: int, embed_dim: int, dropout: float) -> nn.Module:
    first = Dropout(dropout)
    match kind:
        case "none":
            return nn.Identity()
        case "mlp":
            return ResidualMLPHead(width, embed_dim, dropout)
        case "linear" | "affine":
            return nn.Sequential(first, nn.Linear(width, embed_dim, bias=kind == "affine"))
        case "gelu":
            inner = (width + embed_dim) // 2
            layers = nn.Linear(width, inner, bias=False), nn.GELU(), nn.Linear(inner, embed_dim, bias=False)
            return nn.Sequential(first, *layers)
    raise ValueError(f"unknown head {kind!r}")


class CLIP(nn.Module):
    """An image tower and a text tower that embed matching images and texts close to each other.

    Attributes:
        transform: turns an image into the pixels that the image tower expects.
        tokenize: turns texts into `input_ids` and `attention_mask`.
        metadata: further values of the bundle, such as metrics and training data.
        dims: width of the embeddings.
    """

    def __init__(
        self,
        image_tower: ImageTower,
        text_tower: TextTower,
        *,
        embed_dim: int = 512,
        head: HeadKind | dict[str, SideHeadKind] = "linear",
        dropout: float = 0.0,
        init_scale: float = 1 / 0.07,
        init_bias: float | None = None,
    ) -> None:
        """Combine two towers with new projection heads; `from_towers` accepts names and modules.

        Args:
            image_tower: tower for images.
            text_tower: tower for texts.
            embed_dim: width of the embeddings.
            head: `linear`, or `mlp` with one residual block; or a dictionary with one kind for `image` and
                one for `text`, which may also be `affine` (linear with bias), `gelu` (two layers) or `none`.
            dropout: fraction of features (linear) or hidden units (mlp) that is dropped in training.
            init_scale: initial value of the learnable inverse temperature.
            init_bias: initial value of the learnable bias of the logits (SigLIP), or None for no bias.
        """
        super().__init__()
        for tower in (image_tower, text_tower):
            if not isinstance(tower, Tower):
                raise TypeError(f"{tower!r} is not a tower; CLIP.from_towers accepts names and modules")
        if embed_dim < 1 or not 0 <= dropout < 1:
            raise UserError(
                f"embed_dim {embed_dim} and dropout {dropout}: expected a width of 1 or more, and a fraction "
                "of at least 0 and below 1"
            )
        self.image_tower = image_tower
        self.text_tower = text_tower
        kinds: dict[str, Any] = {"image": head, "text": head} if isinstance(head, str) else head
        widths = {"image": image_tower.width, "text": text_tower.width}
        self.heads = nn.ModuleDict(
            {side: _head(kinds[side], width, embed_dim, dropout) for side, width in widths.items()}
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(init_scale)))
        self.logit_bias = None if init_bias is None else nn.Parameter(torch.tensor(init_bias))
        self.max_logit_scale = math.log(100)
        self.transform = image_tower.transform
        self.tokenize = text_tower.tokenize
        self.metadata: dict[str, Any] = {}
        self.dims = embed_dim
        self._head_config: dict[str, Any] = {"embed_dim": embed_dim, "head": head, "dropout": dropout}

    @classmethod
    def from_towers(
        cls,
        image_tower: str | nn.Module,
        text_tower: str | nn.Module,
        *,
        image_size: int | None = None,
        max_length: int | None = None,
        **options: Unpack[NewModelOptions],
    ) -> CLIP:
        """Build a model with new heads from the names of towers, or from your own modules.

        A module needs a `width`, the number of features that it returns. An image module is called with
        pixels (B, 3, H, W), normalized by its `transform` (an `ImageTransform`) or, if it has none, from 0 to
        1. A text module is called with the `input_ids` and `attention_mask` (N, L) of its `tokenizer`, a
        tokenizer of transformers.

        Args:
            image_tower: a module, or a name (see `ImageTower.from_name`).
            text_tower: a module, or a name (see `TextTower.from_name`).
            image_size: side of the square input in pixels; by default, the one that the tower was trained
                with.
            max_length: maximum number of tokens per text; by default 77, or the tower's limit if it is lower.
            options: `embed_dim` (512), `head` ("linear"), `dropout` (0.0), `init_scale` (1 / 0.07) and
                `init_bias` (None), which the constructor of `CLIP` describes.

        Raises:
            UserError: a tower does not exist or is not supported.
        """
        image: Any = ImageTower.from_name if isinstance(image_tower, str) else ImageTower.from_module
        text: Any = TextTower.from_name if isinstance(text_tower, str) else TextTower.from_module
        return cls(image(image_tower, image_size), text(text_tower, max_length), **options)

    def __repr__(self) -> str:
        towers = f"image_tower={self.image_tower.spec['name']!r}, text_tower={self.text_tower.spec['name']!r}"
        millions = sum(parameter.numel() for parameter in self.parameters()) / 1e6
        return f"CLIP({towers}, embed_dim={self.dims}, {millions:.1f}M parameters, {self.device})"

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.logit_scale.dtype

    @property
    def scale(self) -> Tensor:
        """Inverse temperature in fp32."""
        return self.logit_scale.float().exp()

    @property
    def bias(self) -> float | None:
        """Bias that a sigmoid model adds to scaled similarities; None for a softmax model."""
        return None if self.logit_bias is None else self.logit_bias.item()

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Clamp the scale to 100, or to that of the loaded model; call this after each optimizer step.

        The parameter itself is clamped, because clamping in the forward pass would set its gradient to zero.
        """
        self.logit_scale.clamp_(max=self.max_logit_scale)

    def freeze(self, which: Freeze) -> None:
        """Freeze one tower, both or none."""
        if which in ("image", "both"):
            self.image_tower.freeze()
        if which in ("text", "both"):
            self.text_tower.freeze()

    def add_lora(self, config: LoRAConfig) -> None:
        """Freeze towers and add trainable adapters, which are merged when a bundle is saved."""
        add_lora({"image": self.image_tower, "text": self.text_tower}, config)
        self.train(self.training)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the embeddings of `encode_image` (B, D) and of `encode_text` (N, D)."""
        return self.encode_image(pixel_values), self.encode_text(input_ids, attention_mask)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Return unit-length embeddings (B, D) fp32 of pixels (B, 3, H, W), uint8 or float in 0..1."""
        return self.project_image(self.image_tower(pixel_values))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return unit-length embeddings (N, D) fp32 of tokens (N, L)."""
        return self.project_text(self.text_tower(input_ids, attention_mask))

    def project_image(self, features: Tensor) -> Tensor:
        """Return unit-length embeddings (B, D) fp32 of the image tower's features (B, width)."""
        return unit_length(self.heads["image"](features).float()[..., : self.dims])

    def project_text(self, features: Tensor) -> Tensor:
        """Return unit-length embeddings (N, D) fp32 of the text tower's features (N, width)."""
        return unit_length(self.heads["text"](features).float()[..., : self.dims])

    def with_dims(self, dims: int) -> CLIP:
        """Return this model with the first `dims` numbers of its embeddings, normalized again.

        The result shares the towers and the scale. Linear heads are cut, so what is saved is narrower, too.
        Its metrics are those of `dims` if the model was trained and evaluated with this width.

        Raises:
            UserError: `dims` is not from 1 to the width of the embeddings.
        """
        expected = f"a number from 1 to {self.dims}, the width of the embeddings"
        check_option("dims", dims, 1 <= dims <= self.dims, expected)
        if dims == self.dims:
            return self
        short = copy.copy(self)
        short.dims = dims
        metrics = self.metadata.get("metrics") or {}
        known = {name: metrics[name] for name in metrics if name.startswith(f"dims{dims}_")}
        short.metadata = self.metadata | {
            "metrics": {name.partition("_")[2]: value for name, value in known.items()},
            "matryoshka": [prefix for prefix in self.metadata.get("matryoshka") or [] if prefix < dims],
        }
        heads: Any = copy.deepcopy(self.heads)
        if all(isinstance(head, nn.Sequential) and len(head) == 2 for head in heads.values()):
            for linear in (head[1] for head in heads.values()):
                for name, parameter in linear.named_parameters():
                    setattr(linear, name, nn.Parameter(parameter[:dims].detach().clone()))
            short._modules = self._modules | {"heads": heads}
            short._head_config = self._head_config | {"embed_dim": dims}
        return short

    def embed_images(
        self,
        images: Any,
        batch_size: int | None = None,
        errors: Errors = "raise",
        progress: bool = False,
    ) -> Tensor:
        """Return unit-length embeddings (B, D) of images, on the CPU.

        Args:
            images: one image, or any iterable of images, including generators. An image is the name of a
                file, the content of a file as bytes, a file object, a PIL image, a uint8 array (H, W, 3) in
                RGB, or a uint8 tensor (3, H, W). Arrays (B, H, W, 3) and tensors (B, 3, H, W) are several
                images.
            batch_size: number of images per forward pass; by default 64, or 512 on a GPU.
            errors: `raise`, or `skip` to leave out images that cannot be read and log a warning for each.
            progress: whether to show a progress bar.

        Raises:
            BrokenImage: an image cannot be read; the message names the first one.
        """
        _check_errors(errors)
        self.eval()
        parts, items, title = [], one_or_many(images), "images" if progress else ""
        for batch in encode_images(
            self.image_tower, items, project=self.project_image, batch_size=batch_size, progress=title
        ):
            for _, name, reason in batch.broken:
                problem = f"{name} cannot be read: {reason}"
                if errors == "raise":
                    raise BrokenImage(problem) from reason
                _log.warning("skipped: %s", problem)
            parts.append(batch.features)
        return torch.cat(parts)

    def embed_texts(
        self,
        texts: str | Iterable[str],
        batch_size: int | None = None,
        errors: Errors = "raise",
        progress: bool = False,
    ) -> Tensor:
        """Return unit-length embeddings (N, D) of texts, on the CPU.

        `texts` is one text, or any iterable of texts. `errors="skip"` leaves out items that are not strings,
        and logs a warning for each; the other arguments are those of `embed_images`. By default, 128 texts
        are encoded at a time, or 512 on a GPU.

        Raises:
            TypeError: an item is not a string.
        """
        _check_errors(errors)
        items: list[Any] = [texts] if isinstance(texts, str) else list(texts)
        for row, text in enumerate(items):
            if not isinstance(text, str):
                problem = f"text {row} is {text!r}; expected a string"
                if errors == "raise":
                    raise TypeError(problem)
                _log.warning("skipped: %s", problem)
        self.eval()
        valid, title = [text for text in items if isinstance(text, str)], "texts" if progress else ""
        return encode_texts(
            self.text_tower, valid, project=self.project_text, batch_size=batch_size, progress=title
        )

    def zero_shot_classifier(
        self,
        labels: str | Iterable[str | Iterable[str]],
        templates: str | Iterable[str] = ("a photo of a {}.",),
    ) -> Tensor:
        """Return unit-length embeddings (C, D) of classes, on the CPU (Radford et al. 2021, section 3.1.4).

        Args:
            labels: one entry per class: a name, or several names.
            templates: one or several captions with `{}` in place of a name; other braces are kept. The mean
                of the unit-length embeddings of all captions of a class is normalized again.

        Raises:
            ValueError: there are no classes or no templates, or a class has no name.
        """
        classes = [labels] if isinstance(labels, str) else labels
        names = [[entry] if isinstance(entry, str) else list(entry) for entry in classes]
        templates = [templates] if isinstance(templates, str) else list(templates)
        if not names or not all(names) or not templates:
            raise ValueError("expected one or more classes, each with a name, and one or more templates")
        captions = [[text.replace("{}", name) for name in entry for text in templates] for entry in names]
        embedded = self.embed_texts([caption for entry in captions for caption in entry])
        means = [part.mean(0) for part in embedded.split([len(entry) for entry in captions])]
        return F.normalize(torch.stack(means), dim=-1)

    def classify(
        self, images: Any, labels: str | Iterable[str | Iterable[str]] | Tensor, errors: Errors = "raise"
    ) -> Tensor:
        """Return the probability (B, C) of each label for each image, on the CPU.

        Args:
            images: images in any form that `embed_images` accepts.
            labels: names of the classes, or embeddings (C, D) returned by `zero_shot_classifier`.
            errors: see `embed_images`.
        """
        embeddings = self.embed_images(images, errors=errors)
        classes = labels if isinstance(labels, Tensor) else self.zero_shot_classifier(labels)
        return probabilities(embeddings @ classes.T, self.scale.item(), self.bias).float()

    def config(self) -> dict[str, Any]:
        """Return the JSON values from which `from_config` builds the model, without weights and tokenizer."""
        return {
            "format": BUNDLE_FORMAT,
            "image_tower": self.image_tower.spec,
            "text_tower": self.text_tower.spec,
            "transform": self.transform.as_dict(),
            **self._head_config,
            "embed_dim": self.dims,
            "logit_bias": self.logit_bias is not None,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], tokenizer_folder: Path) -> CLIP:
        """Build the architecture in `config`, with random weights and without network access."""
        transform = ImageTransform.from_dict(config["transform"])
        return cls(
            ImageTower.from_spec(config["image_tower"], transform),
            TextTower.from_spec(config["text_tower"], tokenizer_folder),
            embed_dim=config["embed_dim"],
            head=config["head"],
            dropout=config["dropout"],
            init_bias=0.0 if config["logit_bias"] else None,
        )

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        weights: dict[str, Tensor] | None = None,
        metadata: dict[str, Any] | None = None,
        place: str = "FOLDER",
    ) -> Path:
        """Save the model as a bundle with weights, configuration, tokenizer and model card.

        Args:
            folder: a new or empty folder, or a bundle, which is replaced when the new one is complete.
            weights: a complete state dict to save instead of the current weights, such as the best epoch's.
            metadata: further values for config.json and the model card, such as `metrics`, `loss`,
                `training_data` and `license`.
            place: name from which the example on the model card loads the model.

        Raises:
            UserError: the folder contains something other than a bundle.
            ValueError: `weights` do not match this model.
        """
        is_cut = self.dims == self._head_config["embed_dim"]
        check_option("dims", self.dims, is_cut, f"a model with linear heads, got {self._head_config['head']}")
        state = self.state_dict() if weights is None else weights
        if wrong := state.keys() ^ self.state_dict().keys():
            raise ValueError(f"{len(wrong)} weights are missing or unexpected, such as {min(wrong)}")
        values = self.config() | (metadata or {})
        return write_bundle(Path(folder), self.tokenize.tokenizer, values, merged_state(self, state), place)

    def push_to_hub(self, repo: str, *, private: bool | None = None) -> str:
        """Upload the bundle to the Hugging Face Hub, and return the URL of the commit.

        Args:
            repo: repository OWNER/NAME, which is created if it does not exist.
            private: whether a new repository is private; by default, the owner's settings apply.
        """
        from huggingface_hub import HfApi

        repo = HfApi().create_repo(repo_id=repo, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            bundle = self.save_pretrained(Path(folder) / "model", metadata=self.metadata, place=repo)
            message = "Upload a clip-lightning bundle"
            return str(HfApi().upload_folder(repo_id=repo, folder_path=bundle, commit_message=message))

    @classmethod
    def from_pretrained(cls, name: str | Path) -> CLIP:
        """Load a trained model, in eval mode.

        Args:
            name: a bundle, the folder of a run, a checkpoint RUN/checkpoints/NAME.ckpt, a Hugging Face Hub
                id, a W&B artifact `wandb:ENTITY/PROJECT/NAME:ALIAS`, or `open_clip:NAME/TAG`. A folder or Hub
                repository contains a bundle, a `CLIPModel`, `SiglipModel` or `VisionTextDualEncoderModel` of
                transformers, or an open_clip model with `open_clip_config.json`.

        Raises:
            UserError: the model does not exist, is damaged or not supported, has weights that are not finite,
                or is a bundle whose tokenizer or transform does not match its weights.
        """
        from clip_lightning.model.loading import load

        return load(cls, str(name))


def zero_shot_classifier(
    clip: CLIP,
    class_names: str | Iterable[str | Iterable[str]],
    templates: str | Iterable[str] = ("a photo of a {}.",),
) -> Tensor:
    """Return `clip.zero_shot_classifier(class_names, templates)`."""
    return clip.zero_shot_classifier(class_names, templates)


def probabilities(similarity: Tensor, scale: float, bias: float | None) -> Tensor:
    """Convert similarities (B, C) of images and classes to probabilities, as the model was trained.

    A model without a bias was trained to choose one of several texts: the result is a softmax over the
    classes, which sums to 1. A model with a bias (SigLIP) was trained to judge each pair independently: the
    result is a sigmoid, whose sum is between 0 and C.
    """
    logits = similarity.double() * scale
    return logits.softmax(-1) if bias is None else (logits + bias).sigmoid()


def parameter_counts(clip: CLIP) -> dict[str, int]:
    """Return the number of `parameters`, and of `parameters_trained`."""
    parameters = list(clip.parameters())
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "parameters_trained": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    }


def _check_errors(errors: str) -> None:
    if errors not in get_args(Errors):
        raise ValueError(f"errors={errors!r}: expected 'raise' or 'skip'")
