"""CLIP: two towers, two projection heads, a learnable scale; saved as a folder that needs nothing else.

B pictures, N texts, H, W pixels, L tokens, D the width of the shared embedding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from clip_lightning.data.images import BrokenImage, ImageTransform
from clip_lightning.errors import UserError
from clip_lightning.model import pretrained as foreign
from clip_lightning.model.bundle import (
    BUNDLE_FORMAT,
    WEIGHTS,
    check_replaceable,
    fetch_weights,
    find_model,
    read_bundle,
    read_json,
    refusing_damage,
    write_bundle,
)
from clip_lightning.model.encode import encode_batches, one_or_many
from clip_lightning.model.lora import LoRAConfig, add_lora, merged_state
from clip_lightning.model.towers import ImageTower, TextTower

HeadKind = Literal["linear", "mlp"]
# What models of others have besides: a bias, two layers with a GELU between them, or no projection at all.
SideHeadKind = Literal["linear", "mlp", "affine", "gelu", "none"]
Freeze = Literal["none", "image", "text", "both"]
MAX_SCALE = 100.0
_log = logging.getLogger(__name__)


class ResidualMLPHead(nn.Module):
    """Linear projection, then one residual block with GELU, dropout and layer norm."""

    def __init__(self, width: int, embed_dim: int, dropout: float) -> None:
        super().__init__()
        self.projection = nn.Linear(width, embed_dim)
        self.hidden = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Embeddings (B, embed_dim) of features (B, width), not yet of unit length."""
        projected = self.projection(features)
        return self.norm(projected + self.dropout(self.hidden(F.gelu(projected))))


class Heads(nn.Module):
    """Both projections into the shared space."""

    def __init__(
        self,
        image_width: int,
        text_width: int,
        embed_dim: int,
        kinds: Mapping[str, SideHeadKind],
        dropout: float,
    ) -> None:
        super().__init__()
        self.image = self._head(image_width, embed_dim, kinds["image"], dropout)
        self.text = self._head(text_width, embed_dim, kinds["text"], dropout)

    @staticmethod
    def _head(width: int, embed_dim: int, kind: SideHeadKind, dropout: float) -> nn.Module:
        if kind == "mlp":
            return ResidualMLPHead(width, embed_dim, dropout)
        if kind == "none":
            return nn.Identity()
        if kind not in ("linear", "affine", "gelu"):
            raise ValueError(f"unknown head {kind!r}")
        if kind == "gelu":
            hidden = (width + embed_dim) // 2
            first, last = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, embed_dim, bias=False)
            return nn.Sequential(nn.Dropout(dropout), first, nn.GELU(), last)
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(width, embed_dim, bias=kind == "affine"))


class CLIP(nn.Module, PyTorchModelHubMixin):
    """An image tower and a text tower whose embeddings of what belongs together are close.

    Attributes:
        transform: how a picture becomes the image tower's pixels.
        tokenize: texts → `input_ids` and `attention_mask`.
        metadata: what its bundle says besides (metrics, loss, training data, licence).
    """

    def __init__(
        self,
        image_tower: ImageTower,
        text_tower: TextTower,
        *,
        embed_dim: int = 512,
        head: HeadKind | Mapping[str, SideHeadKind] = "linear",
        dropout: float = 0.0,
        init_scale: float = 1 / 0.07,
        init_bias: float | None = None,
    ) -> None:
        """Put two towers together with fresh projection heads.

        Args:
            image_tower: gives features of pictures.
            text_tower: gives features of texts.
            embed_dim: width of the shared space.
            head: `linear`, or `mlp` with one residual block; or a kind for `image` and one for `text`, among
                which `affine` (linear with a bias), `gelu` (two layers) and `none` too.
            dropout: share of features (linear) or hidden units (mlp) dropped in training.
            init_scale: where the learnable inverse temperature starts.
            init_bias: where the learnable bias on logits starts; None for no bias.
        """
        super().__init__()
        if embed_dim < 1 or not 0 <= dropout < 1:
            raise UserError(
                f"--model.embed_dim {embed_dim} and --model.dropout {dropout}: expected a width of 1 or more "
                "and a share of at least 0 and below 1"
            )
        self.image_tower = image_tower
        self.text_tower = text_tower
        kinds: Mapping[str, SideHeadKind] = {"image": head, "text": head} if isinstance(head, str) else head
        self.heads = Heads(image_tower.width, text_tower.width, embed_dim, kinds, dropout)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(init_scale)))
        self.logit_bias = None if init_bias is None else nn.Parameter(torch.tensor(init_bias))
        self.transform = image_tower.transform
        self.tokenize = text_tower.tokenize
        self.metadata: dict[str, Any] = {}
        self._embed_dim = embed_dim
        self._max_logit_scale = math.log(MAX_SCALE)
        self._head_config: dict[str, Any] = {
            "embed_dim": embed_dim,
            "head": head if isinstance(head, str) else dict(head),
            "dropout": dropout,
        }

    @property
    def scale(self) -> Tensor:
        """The inverse temperature, fp32."""
        return self.logit_scale.float().exp()

    @property
    def bias(self) -> float | None:
        """What a sigmoid model adds to scaled similarities; None for a softmax model."""
        return None if self.logit_bias is None else self.logit_bias.item()

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the scale at or below 100, or what a loaded model came with; call after each optimiser step.

        The parameter itself is clamped: clamping in the forward pass would leave it without gradient, stuck.
        """
        self.logit_scale.clamp_(max=self._max_logit_scale)

    def freeze(self, which: Freeze) -> None:
        """Fix the weights of one tower, both or none."""
        if which in ("image", "both"):
            self.image_tower.freeze()
        if which in ("text", "both"):
            self.text_tower.freeze()

    def add_lora(self, config: LoRAConfig) -> None:
        """Put trainable adapters into towers, whose own weights are fixed; a bundle has them merged in."""
        add_lora({"image": self.image_tower, "text": self.text_tower}, config)
        self.train(self.training)

    @property
    def adapted(self) -> bool:
        """Whether a tower has adapters."""
        return self.image_tower.adapted or self.text_tower.adapted

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Unit-length embeddings (B, D) fp32 of `pixel_values` (B, 3, H, W), uint8 or float in 0..1."""
        return self.project_image(self.image_tower(pixel_values))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit-length embeddings (N, D) fp32 of tokens (N, L)."""
        return self.project_text(self.text_tower(input_ids, attention_mask))

    def project_image(self, features: Tensor) -> Tensor:
        """Unit-length embeddings (B, D) fp32 of the image tower's features (B, width)."""
        return F.normalize(self.heads.image(features).float(), dim=-1)

    def project_text(self, features: Tensor) -> Tensor:
        """Unit-length embeddings (N, D) fp32 of the text tower's features (N, width)."""
        return F.normalize(self.heads.text(features).float(), dim=-1)

    @torch.inference_mode()
    def embed_images(
        self, images: Any, batch_size: int = 64, errors: Literal["raise", "skip"] = "raise"
    ) -> Tensor:
        """Return unit-length embeddings (B, D) of images, on the CPU.

        Args:
            images: one image or any iterable of them, a generator too. An image is the name of a file, its
                content as bytes, a file object, a PIL image, a uint8 array (H, W, 3) in RGB, or a uint8
                tensor (3, H, W); arrays (B, H, W, 3) and tensors (B, 3, H, W) are several.
            batch_size: images that the tower sees at once.
            errors: `skip` leaves images that cannot be read out of the result and logs a warning for each.

        Raises:
            BrokenImage: an image cannot be read; names the first one.
            ValueError: an argument is not one of those described above.
        """
        if errors not in ("raise", "skip") or batch_size < 1:
            raise ValueError(
                f"expected errors='raise' or 'skip' and batch_size >= 1, got {errors!r} and {batch_size}"
            )
        self.eval()
        parts = [torch.empty(0, self._embed_dim)]
        for batch in encode_batches(self, one_or_many(images), batch_size):
            for row, name, reason in batch.broken:
                where = name if name == f"image {row}" else f"image {row}, {name}"
                if errors == "raise":
                    raise BrokenImage(f"{where} cannot be read: {reason}") from reason
                _log.warning("skipped %s: %s", where, reason)
            parts.append(self.project_image(batch.features).cpu())
        return torch.cat(parts)

    @torch.inference_mode()
    def embed_texts(self, texts: str | Iterable[str], batch_size: int = 256) -> Tensor:
        """Return unit-length embeddings (N, D) of one text or any iterable of them, on the CPU.

        Raises:
            TypeError: an item is not a string.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        self.eval()
        parts = [torch.empty(0, self._embed_dim)]
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenize(texts[start : start + batch_size])
            device = self.logit_scale.device
            parts.append(
                self.encode_text(tokens["input_ids"].to(device), tokens["attention_mask"].to(device)).cpu()
            )
        return torch.cat(parts)

    def config(self) -> dict[str, Any]:
        """Everything but the weights and the tokenizer that `from_config` needs, as plain JSON values."""
        return {
            "format": BUNDLE_FORMAT,
            "image_tower": self.image_tower.spec,
            "text_tower": self.text_tower.spec,
            "transform": self.transform.as_dict(),
            **self._head_config,
            "logit_bias": self.logit_bias is not None,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], tokenizer_folder: Path) -> CLIP:
        """Build the architecture that `config` describes, with fresh weights and no network."""
        transform = ImageTransform.from_dict(config["transform"])
        return cls(
            ImageTower.from_spec(config["image_tower"], transform),
            TextTower.from_spec(config["text_tower"], tokenizer_folder),
            embed_dim=config["embed_dim"],
            head=config["head"],
            dropout=config["dropout"],
            init_bias=0.0 if config["logit_bias"] else None,
        )

    def save_pretrained(  # type: ignore[override]
        self,
        folder: str | Path,
        *,
        weights: dict[str, Tensor] | None = None,
        metadata: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Write the bundle: weights, configuration, tokenizer and model card, all or nothing.

        Args:
            folder: a bundle that is there already is replaced, once the new one is complete.
            weights: a complete state dict to write in place of the present weights (the best epoch's, say).
            metadata: `metrics`, `loss`, `training_data`, `license`, ...: kept in config.json and on the card.
            config: the same, by the name under which `push_to_hub` hands it on.
            model_card_kwargs: `place`, the name that the card loads the model by; from `push_to_hub`, too.

        Returns:
            The folder.

        Raises:
            UserError: the folder holds something else than a bundle.
            ValueError: `weights` are not those of this model.
        """
        folder = Path(folder).absolute()
        check_replaceable(folder)
        state = self.state_dict() if weights is None else weights
        if wrong := state.keys() ^ self.state_dict().keys():
            raise ValueError(f"weights lack or add {len(wrong)} tensors, {min(wrong)} among them")
        if self.adapted:
            state = merged_state(self, state)
        values = self.config() | (metadata or config or {})
        write_bundle(folder, self.tokenize.tokenizer, values, state, **(model_card_kwargs or {}))
        return folder

    @classmethod
    def from_pretrained(cls, name: str | Path) -> CLIP:  # type: ignore[override]
        """Load a bundle, or a model of transformers or open_clip with its own weights, in eval mode.

        Args:
            name: a folder (no network is touched), a Hugging Face hub id, a W&B artifact as
                `wandb:ENTITY/PROJECT/NAME:ALIAS`, or `open_clip:NAME/TAG`. A folder or hub repository holds a
                bundle, a `CLIPModel`, `SiglipModel` or `VisionTextDualEncoderModel` of transformers, or an
                open_clip model with its `open_clip_config.json`.

        Raises:
            UserError: no such model there, a damaged one, one of another kind, one whose weights are not
                finite, or a bundle whose tokenizer or transform does not belong to its weights.
        """
        name = str(name)
        if name.startswith("open_clip:"):
            return cls._from_parts(foreign.load_open_clip(name), name)
        folder = find_model(name)
        config = read_json(folder / "config.json", name)
        if kind := foreign.kind_of(folder, config, name):
            fetch_weights(name, folder, *foreign.WEIGHTS[kind])
            with refusing_damage(name):
                return cls._from_parts(foreign.load(kind, folder, name), name)
        fetch_weights(name, folder, WEIGHTS)
        if not config or not (folder / WEIGHTS).is_file():
            raise UserError(
                f"{name} is no clip-lightning bundle: expected config.json and {WEIGHTS} in it, or a CLIP of "
                "transformers or open_clip"
            )
        state = read_bundle(folder, config, name)
        with refusing_damage(name):
            cls._check_shapes(config, folder, state)
            model = cls.from_config(config, folder)
            model.load_state_dict(state)
        own = {*model.config(), "tokenizer_files"}
        model.metadata = {key: value for key, value in config.items() if key not in own}
        return model._ready(name)

    @classmethod
    def _check_shapes(cls, config: dict[str, Any], folder: Path, state: Mapping[str, Tensor]) -> None:
        """Compare the configuration with the weights before memory is taken for what it describes.

        Raises:
            ValueError: they do not belong together.
        """
        try:
            with torch.device("meta"):
                described = cls.from_config(config, folder).state_dict()
        except UserError:
            raise
        except Exception:  # some architectures compute with values when they are built
            return
        for name, tensor in described.items():
            if name not in state or state[name].shape != tensor.shape:
                there = tuple(state[name].shape) if name in state else "missing"
                raise ValueError(f"{name} is {tuple(tensor.shape)} in config.json, {there} in {WEIGHTS}")

    @classmethod
    def _from_parts(cls, parts: foreign.Parts, name: str) -> CLIP:
        model = cls(
            parts.image_tower,
            parts.text_tower,
            embed_dim=parts.embed_dim,
            head=parts.head,
            init_bias=None if parts.logit_bias is None else 0.0,
        )
        model.heads.load_state_dict(parts.heads)
        # a bundle's weights lie in memory of their own: beside a file's, the last bit of a product can differ
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        with torch.no_grad():
            model.logit_scale.copy_(parts.logit_scale.reshape(()))
            if model.logit_bias is not None and parts.logit_bias is not None:
                model.logit_bias.copy_(parts.logit_bias.reshape(()))
        return model._ready(name)

    def _ready(self, name: str) -> CLIP:
        """In eval mode, with room for the scale that the weights came with (SigLIP's own is 117).

        Raises:
            UserError: weights are not finite, and so would be all embeddings.
        """
        for weight, tensor in self.named_parameters():
            if not tensor.isfinite().all():
                raise UserError(f"{name} has weights that are not finite ({weight}): its training failed")
        self._max_logit_scale = max(self._max_logit_scale, self.logit_scale.item())
        return self.eval()


def parameter_counts(clip: CLIP) -> dict[str, int]:
    """`parameters` in all, and `parameters_trained` of them."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in clip.parameters()]
    return {
        "parameters": sum(size for size, _ in sizes),
        "parameters_trained": sum(size for size, trained in sizes if trained),
    }
