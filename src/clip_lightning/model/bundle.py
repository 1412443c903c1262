"""Writes and reads bundles: folders with weights, configuration, tokenizer and model card."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_lightning.errors import UserError, as_user_error
from clip_lightning.files import whole_folder
from clip_lightning.model.towers.base import weights_digest

BUNDLE_FORMAT = 1
WEIGHTS = "model.safetensors"
# Endings of the files of tokenizers, which are downloaded with a model.
TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja")
# Files that transformers always loads into a tokenizer if they exist.
TOKENIZER_NAMES = {"added_tokens.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"}


def files_to_keep(folder: Path) -> set[str]:
    """Return the names in the folder that a new bundle does not replace; refuse all folders but bundles.

    A folder that is empty or does not exist is accepted as well.
    """
    remedy = "give a new or an empty folder"
    with as_user_error(f"the config.json in {folder} cannot be read", remedy):
        existing = read_json(folder / "config.json")
    keys = {"format", "image_tower", "tokenizer_files"}  # weights of transformers have the same file name
    is_bundle = (folder / WEIGHTS).is_file() and keys <= existing.keys()
    present = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or (present and not is_bundle):
        raise UserError(f"{folder} is a file, or contains something other than a bundle; {remedy}")
    own = {WEIGHTS, "config.json", "README.md", *TOKENIZER_NAMES, *existing.get("tokenizer_files", [])}
    return present - own


def write_bundle(
    folder: Path, tokenizer: Any, config: dict[str, Any], state: dict[str, Tensor], place: str
) -> Path:
    """Write a bundle; an existing one is replaced when the new one is complete, and its other files are kept.

    `config` is the content of config.json without `tokenizer_files`, and `place` the name from which the
    example on the model card loads the model.
    """
    folder = folder.absolute()
    with whole_folder(folder, keep=files_to_keep(folder)) as draft:
        tokenizer.save_pretrained(draft)
        names = (file.name for file in draft.iterdir() if file.suffix in TOKENIZER_SUFFIXES)
        config = config | {"tokenizer_files": sorted(names)}
        (draft / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (draft / "README.md").write_text(_model_card(config, place), "utf-8")
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
        metadata = {"format": "pt", "weights": weights_digest(tensors), **_companions(draft, config)}
        save_file(tensors, draft / WEIGHTS, metadata=metadata)
        shutil.copymode(draft / "config.json", draft / WEIGHTS)  # safetensors creates a private file
    return folder


def read_bundle(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a bundle after checking that its files match."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        recorded = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}
    if config.get("format") != BUNDLE_FORMAT:
        raise ValueError(f"its format is not {BUNDLE_FORMAT}; upgrade clip-lightning")
    if recorded.get("weights", digest := weights_digest(state)) != digest:  # missing in the oldest bundles
        raise ValueError("its weights do not match their checksum")
    for name in config["tokenizer_files"]:
        if Path(name).name != name or "\\" in name:
            raise ValueError(f"{name!r} in tokenizer_files is not the name of a file")
    metrics, data = config.get("metrics") or {}, config.get("training_data") or {}
    if not isinstance(data, dict) or not all(isinstance(value, int | float) for value in metrics.values()):
        raise ValueError("its training_data is not an object, or its metrics are not numbers")
    if not all(isinstance(value, int) for value in config.get("matryoshka") or []):
        raise ValueError("its matryoshka is not a list of whole numbers")
    for part, digest in _companions(folder, config).items():
        if recorded.get(part) != digest:
            raise ValueError(f"the {part} is not the one that the weights were trained with")
    return state


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty one if the file does not exist."""
    values: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if not isinstance(values, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return values


def _companions(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return SHA-256 of the tokenizer and the transform, which must match the weights.

    The tokenizer's digest covers the files that were saved with it and those that transformers would load.
    """
    tokenizer = hashlib.sha256()
    saved = set(config["tokenizer_files"])
    for name in sorted(saved | {name for name in TOKENIZER_NAMES if (folder / name).is_file()}):
        tokenizer.update(name.encode() + b"\0" + (folder / name).read_bytes())
    tokenizer.update(str(config["text_tower"]["max_length"]).encode())
    if settings := config["text_tower"].get("tokenize"):
        tokenizer.update(json.dumps(settings, sort_keys=True).encode())
    transform = json.dumps(config["transform"], sort_keys=True).encode()
    return {"tokenizer": tokenizer.hexdigest(), "transform": hashlib.sha256(transform).hexdigest()}


def _model_card(config: dict[str, Any], place: str) -> str:
    """Render the card as Markdown, with a table of the metrics, if there are any."""
    image, text, transform = config["image_tower"], config["text_tower"], config["transform"]
    size = "×".join(map(str, transform["size"]))
    license_line = f"license: {config['license']}\n" if config.get("license") else ""
    data = ", ".join(f"{key} {value}" for key, value in (config.get("training_data") or {}).items())
    metrics = config.get("metrics") or {}
    prefixes = config.get("matryoshka") or []
    short = f"; also trained at {', '.join(map(str, prefixes))} dimensions" if prefixes else ""
    rows = [f"| {name} | {metrics[name]:.2f} |\n" for name in metrics if name not in ("epoch", "step")]
    table = ["On the validation split:\n\n| metric | value |\n|---|---|\n", *rows] if rows else []
    return f"""---
library_name: clip-lightning
pipeline_tag: zero-shot-image-classification
{license_line}tags: [clip, image-text-retrieval]
---

# {image["name"]} × {text["name"]}

A contrastive image-text model trained with clip-lightning.

| | |
|---|---|
| image tower | `{image["name"]}` |
| text tower | `{text["name"]}` |
| embedding | {config["embed_dim"]}, heads: {config["head"]}{short} |
| loss | {config.get("loss", "not recorded")} |
| trained on | {data or "not recorded"} |

{"".join(table)}
## Use

```python
from clip_lightning import CLIP

clip = CLIP.from_pretrained("{place}")
similarity = clip.embed_texts(["a dog on the beach"]) @ clip.embed_images(["photo.jpg"]).T
```

Images: {size} pixels, {transform["interpolation"]}. Texts: at most {text["max_length"]} tokens.
The weights of the towers are subject to the licenses of their authors.
"""
