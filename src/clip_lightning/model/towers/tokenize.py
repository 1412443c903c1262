"""Tokenizes texts for the text tower.

N texts, L tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import AutoTokenizer

from clip_lightning.model.towers.open_clip import clean_text

MOST_TOKENS = 131_072


def load_tokenizer(place: Path | str) -> Any:
    """Load the tokenizer of a model of transformers from its folder or Hub id."""
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers returns this if there are no files
        raise ValueError("it has no tokenizer")
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError("its tokenizer has neither a padding nor an end token")
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
