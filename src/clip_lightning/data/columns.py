"""Which columns of a Hugging Face data set hold pictures, captions and splits, told by type and usual names.

Features are those of the package `datasets`, which is not needed here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clip_lightning.data.readers import CAPTION_COLUMNS, IMAGE_COLUMNS
from clip_lightning.errors import UserError

IMAGE_NAMES = (*IMAGE_COLUMNS, "images", "img", "picture", "photo", "jpg", "png")
CAPTION_NAMES = (*CAPTION_COLUMNS, "texts", "sentences", "sentence", "raw", "txt", "description")
_NUMBERED = re.compile(r"(caption|sentence|text)s?[ _-]?\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Columns:
    """Names of columns; `split` where there is one."""

    image: str
    captions: tuple[str, ...]
    split: str | None

    def names(self) -> list[str]:
        """Each of them once."""
        return list(dict.fromkeys([self.image, *self.captions, *filter(None, [self.split])]))


def find_columns(features: Mapping[str, Any], image: str | None, captions: str | None) -> Columns:
    """Choose the columns.

    Args:
        features: name → type of each column.
        image: the column of pictures, if given.
        captions: the column of captions, or several with commas between, if given.

    Raises:
        UserError: a given column is none, or none is clearly meant; it lists those that there are.
    """
    pictures = [name for name, feature in features.items() if _holds_pictures(feature)]
    typed = [name for name in pictures if is_image(features[name])]
    texts = [name for name, feature in features.items() if _holds_texts(feature)]
    if image is not None:
        chosen = [image] if image in pictures else []
    else:
        chosen = typed if len(typed) == 1 else _usual(IMAGE_NAMES, typed or pictures)
    if captions is not None:
        wanted = [name.strip() for name in captions.split(",")]
        words = wanted if set(wanted) <= set(texts) else []
    else:
        words = _usual(CAPTION_NAMES, texts) or [name for name in texts if _NUMBERED.fullmatch(name)]
    if not chosen:
        raise _no_column("--data.hub_image", image, "pictures", features)
    if not words:
        raise _no_column("--data.hub_captions", captions, "sentences", features)
    split = next((name for name in texts if name.lower() == "split"), None)
    return Columns(chosen[0], tuple(words), split)


def is_image(feature: Any) -> bool:
    """Whether this is the type Image of `datasets`."""
    return type(feature).__name__ == "Image"


def _holds_pictures(feature: Any) -> bool:
    """The type Image, or bytes, bare or as Image keeps them."""
    if isinstance(feature, dict):
        feature = feature.get("bytes")
    return is_image(feature) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _holds_texts(feature: Any) -> bool:
    """Strings, lists of strings, and lists of what COCO has: dictionaries with `raw`."""
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return _holds_texts(inner)
    if isinstance(feature, dict):
        return "raw" in feature and _holds_texts(feature["raw"])
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _usual(names: tuple[str, ...], columns: list[str]) -> list[str]:
    """The column with the first of these names that there is, as a list of one or none."""
    lower = {column.lower(): column for column in reversed(columns)}
    return [lower[name] for name in names if name in lower][:1]


def _no_column(option: str, given: str | None, what: str, features: Mapping[str, Any]) -> UserError:
    there = ", ".join(f"{name} ({_type(feature)})" for name, feature in features.items())
    wrong = f"{option} {given} is no column of {what}" if given else f"no column is clearly that of {what}"
    return UserError(f"{wrong}; the data set has {there}; give {option} COLUMN")


def _type(feature: Any) -> str:
    if is_image(feature):
        return "Image"
    return str(getattr(feature, "dtype", None) or type(feature).__name__)
