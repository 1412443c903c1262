"""Writes and reads bundles: folders with weights, configuration, tokenizer and model card."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_lightning.digest import weights_digest
from clip_lightning.errors import UserError
from clip_lightning.files import whole_folder

BUNDLE_FORMAT = 1
WEIGHTS = "model.safetensors"
# Endings of the files of tokenizers, which are downloaded with a model.
TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja")
# Files that transformers always loads into a tokenizer if they exist.
TOKENIZER_NAMES = {
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
_CARD = """---
library_name: clip-lightning
pipeline_tag: zero-shot-image-classification
{license_line}tags: [clip, image-text-retrieval]
---

# {image_tower[name]} × {text_tower[name]}

A contrastive image-text model trained with clip-lightning.

| | |
|---|---|
| image tower | `{image_tower[name]}` |
| text tower | `{text_tower[name]}` |
| embedding | {embed_dim}, {heads} heads |
| loss | {loss} |
| trained on | {data} |

{table}
## Use

```python
from clip_lightning import CLIP

clip = CLIP.from_pretrained("{place}")
similarity = clip.embed_texts(["a dog on the beach"]) @ clip.embed_images(["photo.jpg"]).T
```

Images: {height}×{width} pixels, {transform[interpolation]}. Texts: at most {text_tower[max_length]} tokens.
The weights of the towers are subject to the licenses of their authors.
"""


def write_bundle(
    folder: Path, tokenizer: Any, config: dict[str, Any], state: dict[str, Tensor], place: str
) -> Path:
    """Write a bundle; an existing one is replaced when the new one is complete.

    Other files in the folder of an existing bundle are kept.

    Args:
        folder: a bundle, an empty folder or a new one.
        tokenizer: tokenizer of the text tower.
        config: content of config.json without the names of the tokenizer's files.
        state: the weights.
        place: name from which the example on the model card loads the model.
    """
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a new or an empty folder")
    with refusing_damage(str(folder)):
        existing = read_json(folder / "config.json")
    # weights of transformers have the same file name
    keys = {"format", "image_tower", "tokenizer_files"}
    is_bundle = (folder / WEIGHTS).is_file() and keys <= existing.keys()
    present = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if present and not is_bundle:
        raise UserError(f"{folder} contains something other than a bundle; give a new or an empty folder")
    own = {WEIGHTS, "config.json", "README.md", *TOKENIZER_NAMES, *existing.get("tokenizer_files", [])}
    with whole_folder(folder, keep=present - own) as draft:
        tokenizer.save_pretrained(draft)
        names = (file.name for file in draft.iterdir() if file.suffix in TOKENIZER_SUFFIXES)
        config = config | {"tokenizer_files": sorted(names)}
        (draft / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (draft / "README.md").write_text(_model_card(config, place), "utf-8")
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
        metadata = {"format": "pt", "weights": weights_digest(tensors), **_companions(draft, config)}
        save_file(tensors, draft / WEIGHTS, metadata=metadata)
    return folder


def read_bundle(folder: Path, config: dict[str, Any], name: str) -> dict[str, Tensor]:
    """Return the weights of a bundle after checking that its files match.

    Args:
        folder: folder of the bundle.
        config: content of its config.json.
        name: name of the model in messages.
    """
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        recorded = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}
    if config.get("format") != BUNDLE_FORMAT:
        raise UserError(
            f"{name} has format {config.get('format')!r}, expected {BUNDLE_FORMAT}; upgrade clip-lightning, "
            "or give a folder written by save_pretrained"
        )
    if recorded.get("weights", digest := weights_digest(state)) != digest:  # missing in the oldest bundles
        raise ValueError("its weights do not match their checksum")
    _check_values(config)
    for part, digest in _companions(folder, config).items():
        if recorded.get(part) != digest:
            raise UserError(
                f"{name}: the {part} is not the one that the weights were trained with; get the complete "
                "model again"
            )
    return state


@contextlib.contextmanager
def refusing_damage(name: str) -> Iterator[None]:
    """Replace any exception caused by the content of the model `name` by a `UserError`."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # libraries raise nearly any type for an invalid configuration
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(
            f"{name} is damaged ({type(error).__name__}: {reason}); get the complete model again"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty one if the file does not exist."""
    values: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if not isinstance(values, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return values


def find_model(name: str) -> Path:
    """Return the folder of a model; a model on the Hub is downloaded without weights (`fetch_weights`)."""
    if Path(name).is_dir():
        return Path(name)
    if name.startswith("wandb:"):
        from clip_lightning.wandb_fetch import ArtifactName, fetch

        return fetch(ArtifactName.parse(name.removeprefix("wandb:"), "wandb:")).folder
    return _download(name, [*(f"*{suffix}" for suffix in TOKENIZER_SUFFIXES), "README.md"])


def fetch_weights(name: str, *patterns: str) -> None:
    """Download the weights of a model on the Hub that match the first pattern with any match."""
    if not Path(name).is_dir() and not name.startswith("wandb:"):
        next(filter(None, (list(_download(name, [pattern]).glob(pattern)) for pattern in patterns)), None)


def _download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UserError(
            f"no model {name!r}: there is no such folder, and it could not be downloaded from the Hugging "
            "Face Hub; check the path or the name"
        ) from error


def _check_values(config: dict[str, Any]) -> None:
    """Check the values of an untrusted configuration that building the model does not check."""
    for name in config["tokenizer_files"]:
        if Path(name).name != name or "\\" in name:
            raise ValueError(f"{name!r} in tokenizer_files is not the name of a file")
    metrics, data = config.get("metrics") or {}, config.get("training_data") or {}
    if not isinstance(data, dict) or not all(isinstance(value, int | float) for value in metrics.values()):
        raise ValueError("metrics or training_data in config.json have another type")


def _companions(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return SHA-256 of the tokenizer and the transform, which must match the weights.

    The tokenizer's digest covers the files that were saved with it and those that transformers would load.
    """
    tokenizer = hashlib.sha256()
    saved = set(config["tokenizer_files"])
    for name in sorted(saved | {name for name in TOKENIZER_NAMES if (folder / name).is_file()}):
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks the tokenizer file {name}; get the complete model again")
        tokenizer.update(name.encode() + b"\0" + (folder / name).read_bytes())
    tokenizer.update(str(config["text_tower"]["max_length"]).encode())
    if settings := config["text_tower"].get("tokenize"):
        tokenizer.update(json.dumps(settings, sort_keys=True).encode())
    transform = json.dumps(config["transform"], sort_keys=True).encode()
    return {"tokenizer": tokenizer.hexdigest(), "transform": hashlib.sha256(transform).hexdigest()}


def _model_card(config: dict[str, Any], place: str) -> str:
    """Render the card as Markdown, with a table of the metrics, if there are any."""
    head, data = config["head"], config.get("training_data") or {}
    rows = [f"| {name} | {value:.2f} |\n" for name, value in (config.get("metrics") or {}).items()]
    license_name, (height, width) = config.get("license"), config["transform"]["size"]
    return _CARD.format_map(
        {
            "loss": "not recorded",
            **config,
            "license_line": f"license: {license_name}\n" if license_name else "",
            "heads": head if isinstance(head, str) else " and ".join(f"{v} ({k})" for k, v in head.items()),
            "data": ", ".join(f"{key} {value}" for key, value in data.items()) or "not recorded",
            "table": "".join(["On the validation split:\n\n| metric | value |\n|---|---|\n", *rows])
            if rows
            else "",
            "height": height,
            "width": width,
            "place": place,
        }
    )
