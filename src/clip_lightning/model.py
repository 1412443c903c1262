"""CLIP: two towers, two projection heads, a learnable scale; saved as a folder that needs nothing else.

B pictures, N texts, H, W pixels, L tokens, D the width of the shared embedding.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clip_lightning.data.transforms import ImageTransform, decode_image
from clip_lightning.errors import UserError
from clip_lightning.lora import LoRAConfig, add_lora, merged_state
from clip_lightning.model_card import model_card
from clip_lightning.towers import ImageTower, TextTower

HeadKind = Literal["linear", "mlp"]
Freeze = Literal["none", "image", "text", "both"]
BUNDLE_FORMAT = 1
MAX_SCALE = 100.0
# What a tokenizer saves, and what a download of a bundle therefore needs beside the weights.
TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja")
# What transformers reads into a tokenizer wherever it finds it.
TOKENIZER_NAMES = {
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


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
        self, image_width: int, text_width: int, embed_dim: int, kind: HeadKind, dropout: float
    ) -> None:
        super().__init__()
        self.image = self._head(image_width, embed_dim, kind, dropout)
        self.text = self._head(text_width, embed_dim, kind, dropout)

    @staticmethod
    def _head(width: int, embed_dim: int, kind: HeadKind, dropout: float) -> nn.Module:
        if kind == "mlp":
            return ResidualMLPHead(width, embed_dim, dropout)
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(width, embed_dim, bias=False))


class CLIP(nn.Module):
    """An image tower and a text tower whose embeddings of what belongs together are close.

    Attributes:
        transform: how a picture becomes the image tower's pixels.
        tokenize: texts → `input_ids` and `attention_mask`.
    """

    def __init__(
        self,
        image_tower: ImageTower,
        text_tower: TextTower,
        *,
        embed_dim: int = 512,
        head: HeadKind = "linear",
        dropout: float = 0.0,
        init_scale: float = 1 / 0.07,
        init_bias: float | None = None,
    ) -> None:
        """Put two towers together with fresh projection heads.

        Args:
            image_tower: gives features of pictures.
            text_tower: gives features of texts.
            embed_dim: width of the shared space.
            head: `linear`, or `mlp` with one residual block.
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
        self.heads = Heads(image_tower.width, text_tower.width, embed_dim, head, dropout)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(init_scale)))
        self.logit_bias = None if init_bias is None else nn.Parameter(torch.tensor(init_bias))
        self.transform = image_tower.transform
        self.tokenize = text_tower.tokenize
        self._embed_dim = embed_dim
        self._head_config: dict[str, Any] = {"embed_dim": embed_dim, "head": head, "dropout": dropout}

    @property
    def scale(self) -> Tensor:
        """The inverse temperature, fp32."""
        return self.logit_scale.float().exp()

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the scale at or below 100; call after each optimiser step.

        The parameter itself is clamped: clamping in the forward pass would leave it without gradient, stuck.
        """
        self.logit_scale.clamp_(max=math.log(MAX_SCALE))

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
    def embed_images(self, paths: Sequence[str | Path], batch_size: int = 64) -> Tensor:
        """Unit-length embeddings (B, D) of picture files, on the CPU.

        Raises:
            BrokenImage: a file that is no readable picture.
        """
        self.eval()
        parts = [torch.empty(0, self._embed_dim)]
        for start in range(0, len(paths), batch_size):
            chunk = paths[start : start + batch_size]
            pixels = torch.stack([self.transform(decode_image(Path(path))) for path in chunk])
            parts.append(self.encode_image(pixels.to(self.logit_scale.device)).cpu())
        return torch.cat(parts)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Unit-length embeddings (N, D) of texts, on the CPU."""
        self.eval()
        parts = [torch.empty(0, self._embed_dim)]
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenize(list(texts[start : start + batch_size]))
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

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        weights: dict[str, Tensor] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Path:
        """Write the bundle: weights, configuration, tokenizer and model card, all or nothing.

        Args:
            folder: a bundle that is there already is replaced, once the new one is complete.
            weights: a complete state dict to write in place of the present weights (the best epoch's, say).
            metadata: `metrics`, `loss`, `training_data`, `license`, ...: kept in config.json and on the card.

        Returns:
            The folder.

        Raises:
            UserError: the folder holds something else than a bundle.
            ValueError: `weights` are not those of this model.
        """
        folder = Path(folder).absolute()
        _check_replaceable(folder)
        state = self.state_dict() if weights is None else weights
        if wrong := state.keys() ^ self.state_dict().keys():
            raise ValueError(f"weights lack or add {len(wrong)} tensors, {min(wrong)} among them")
        if self.adapted:
            state = merged_state(self, state)
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            self.tokenize.tokenizer.save_pretrained(draft)
            config = self.config() | (metadata or {}) | {"tokenizer_files": _tokenizer_files(draft)}
            (draft / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
            (draft / "README.md").write_text(model_card(config))
            tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
            about = {"format": "pt", **_companions(draft, config)}
            save_file(tensors, draft / "model.safetensors", metadata=about)
            draft.chmod(0o755)  # mkdtemp makes it private
            _replace_folder(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return folder

    @classmethod
    def from_pretrained(cls, name: str | Path) -> CLIP:
        """Load a bundle, in eval mode.

        Args:
            name: a folder (no network is touched), a Hugging Face hub id, or a W&B artifact as
                `wandb:ENTITY/PROJECT/NAME:ALIAS`.

        Raises:
            UserError: no bundle there, a damaged one, or one whose tokenizer or transform does not belong to
                its weights.
        """
        folder = Path(name)
        if not folder.is_dir():
            folder = _from_wandb(str(name)) if str(name).startswith("wandb:") else _download(str(name))
        weights, config_file = folder / "model.safetensors", folder / "config.json"
        if not weights.is_file() or not config_file.is_file():
            raise UserError(
                f"{name} is no clip-lightning bundle: expected config.json and model.safetensors in it"
            )
        try:
            config = json.loads(config_file.read_text())
            recorded, state = _read_weights(weights)
        except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
            raise UserError(f"{name} is damaged ({error}); get it whole again") from error
        if config.get("format") != BUNDLE_FORMAT:
            raise UserError(
                f"{name} has format {config.get('format')!r}, this version reads {BUNDLE_FORMAT}; "
                "upgrade clip-lightning, or give a folder written by save_pretrained"
            )
        for part, digest in _companions(folder, config).items():
            if recorded.get(part) != digest:
                raise UserError(
                    f"{name}: its {part} is not the one its weights were trained with; get it whole again"
                )
        model = cls.from_config(config, folder)
        model.load_state_dict(state)
        return model.eval()


def _read_weights(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}


def _tokenizer_files(folder: Path) -> list[str]:
    """Names of the files that a tokenizer may have saved there."""
    return sorted(
        file.name
        for file in folder.iterdir()
        if file.suffix in TOKENIZER_SUFFIXES and file.name != "config.json" and file.is_file()
    )


def _companions(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of what must not be exchanged under the weights: tokenizer and transform.

    Of the folder's files, those count that were saved with the tokenizer, and those that one would read.
    """
    tokenizer = hashlib.sha256()
    saved = set(config["tokenizer_files"])
    for name in sorted(saved | {name for name in TOKENIZER_NAMES if (folder / name).is_file()}):
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks its tokenizer's file {name}; get it whole again")
        tokenizer.update(name.encode() + b"\0" + (folder / name).read_bytes())
    tokenizer.update(str(config["text_tower"]["max_length"]).encode())
    transform = json.dumps(config["transform"], sort_keys=True).encode()
    return {"tokenizer": tokenizer.hexdigest(), "transform": hashlib.sha256(transform).hexdigest()}


def _check_replaceable(folder: Path) -> None:
    """Only a bundle or an empty folder may give way: everything in it will be gone."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder} holds something else than a bundle; give a new or an empty folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a new or an empty folder")


def _replace_folder(draft: Path, folder: Path) -> None:
    """Put `draft` in the place of `folder`; at no moment is there half a bundle."""
    if not folder.exists():
        os.replace(draft, folder)
        return
    attic = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    try:
        os.replace(folder, attic / folder.name)
        try:
            os.replace(draft, folder)
        except BaseException:
            os.replace(attic / folder.name, folder)
            raise
    finally:
        shutil.rmtree(attic)


def _from_wandb(name: str) -> Path:
    from clip_lightning.tracking.artifacts import ArtifactName, fetch

    return fetch(ArtifactName.parse(name.removeprefix("wandb:"), "wandb:")).folder


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [*(f"*{suffix}" for suffix in TOKENIZER_SUFFIXES), "model.safetensors", "README.md"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UserError(
            f"no bundle at {name!r}: no such folder, and the Hugging Face hub did not give it; check the "
            "path or the name"
        ) from error
