"""A bundle on disk: weights, configuration, tokenizer and card, written whole and checked when read."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_lightning.digest import weights_digest
from clip_lightning.errors import UserError
from clip_lightning.files import whole_folder
from clip_lightning.model.model_card import model_card

BUNDLE_FORMAT = 1
WEIGHTS = "model.safetensors"
# What a tokenizer saves, and what a download of a model therefore needs beside the weights.
TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja")
# What transformers reads into a tokenizer wherever it finds it.
TOKENIZER_NAMES = {
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def write_bundle(
    folder: Path, tokenizer: Any, config: dict[str, Any], state: dict[str, Tensor], place: str = "FOLDER"
) -> None:
    """Write a bundle, all or nothing; an older one is replaced once the new one is complete.

    Files that somebody has put beside the older bundle stay.

    Args:
        folder: absolute; see `check_replaceable`.
        tokenizer: of the text tower.
        config: all of config.json but the names of the tokenizer's files.
        state: the weights.
        place: the name that the card loads the model by.
    """
    older = read_json(folder / "config.json", str(folder)).get("tokenizer_files", [])
    own = {WEIGHTS, "config.json", "README.md", *TOKENIZER_NAMES, *older}
    others = {entry.name for entry in folder.iterdir()} - own if folder.is_dir() else set()
    with whole_folder(folder, keep=others) as draft:
        tokenizer.save_pretrained(draft)
        config = config | {"tokenizer_files": _tokenizer_files(draft)}
        (draft / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (draft / "README.md").write_text(model_card(config, place), "utf-8")
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
        metadata = {"format": "pt", "weights": weights_digest(tensors), **_companions(draft, config)}
        save_file(tensors, draft / WEIGHTS, metadata=metadata)


def read_bundle(folder: Path, config: dict[str, Any], name: str) -> dict[str, Tensor]:
    """The weights of a bundle, after checking that everything in it belongs together.

    Args:
        folder: of the bundle.
        config: its config.json.
        name: what the user called it, for messages.

    Raises:
        UserError: it is damaged, of another format, or its tokenizer or transform are not its weights'.
    """
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            recorded = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{name} is damaged ({error}); get it whole again") from error
    if config.get("format") != BUNDLE_FORMAT:
        raise UserError(
            f"{name} has format {config.get('format')!r}, this version reads {BUNDLE_FORMAT}; "
            "upgrade clip-lightning, or give a folder written by save_pretrained"
        )
    checksum = recorded.get("weights")  # bundles of before have none
    if checksum is not None and checksum != weights_digest(state):
        raise UserError(f"{name} is damaged (its weights do not match their checksum); get it whole again")
    with refusing_damage(name):
        _check_values(config)
        companions = _companions(folder, config)
    for part, digest in companions.items():
        if recorded.get(part) != digest:
            raise UserError(
                f"{name}: its {part} is not the one its weights were trained with; get it whole again"
            )
    return state


@contextlib.contextmanager
def refusing_damage(name: str) -> Iterator[None]:
    """Turn whatever goes wrong with the content of the model called `name` into one line.

    Raises:
        UserError: something did.
    """
    try:
        yield
    except UserError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # the libraries raise what they like for a configuration that is none
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(
            f"{name} is damaged ({type(error).__name__}: {reason}); get it whole again"
        ) from error


def read_json(file: Path, name: str) -> dict[str, Any]:
    """A configuration of the model that the user called `name`; empty where there is no such file.

    Raises:
        UserError: it is damaged.
    """
    if not file.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is damaged ({error}); get it whole again") from error
    if not isinstance(values, dict):
        raise UserError(f"{name} is damaged ({file.name} holds no JSON object); get it whole again")
    return values


def check_replaceable(folder: Path) -> None:
    """Check that `write_bundle` may write there: into a bundle, an empty folder or a new one.

    Raises:
        UserError: the folder holds something else, or is a file.
    """
    # a model of transformers has weights of that name, too
    config = read_json(folder / "config.json", str(folder))
    is_bundle = (folder / WEIGHTS).is_file() and {"format", "image_tower", "tokenizer_files"} <= config.keys()
    if folder.is_dir() and any(folder.iterdir()) and not is_bundle:
        raise UserError(f"{folder} holds something else than a bundle; give a new or an empty folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a new or an empty folder")


def find_model(name: str) -> Path:
    """The folder of a model; of one on the hub, everything but the weights (`fetch_weights`).

    Args:
        name: a folder, a Hugging Face hub id, or `wandb:ENTITY/PROJECT/NAME:ALIAS`.

    Raises:
        UserError: there is none.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.startswith("wandb:"):
        from clip_lightning.wandb_fetch import ArtifactName, fetch

        return fetch(ArtifactName.parse(name.removeprefix("wandb:"), "wandb:")).folder
    return _download(name, [*(f"*{suffix}" for suffix in TOKENIZER_SUFFIXES), "README.md"])


def fetch_weights(name: str, folder: Path, *patterns: str) -> None:
    """Have the weights of a model from the hub beside the rest of it.

    Args:
        name: of the model.
        folder: what `find_model` gave.
        patterns: of files, in order of preference; after the first that finds one, the others are left out.
    """
    if Path(name).is_dir() or name.startswith("wandb:"):
        return
    for pattern in patterns:
        if any(_download(name, [pattern]).glob(pattern)):
            return


def _download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UserError(
            f"no model at {name!r}: no such folder, and the Hugging Face hub did not give it; check the "
            "path or the name"
        ) from error


def _tokenizer_files(folder: Path) -> list[str]:
    """Names of the files that a tokenizer may have saved there."""
    return sorted(
        file.name
        for file in folder.iterdir()
        if file.suffix in TOKENIZER_SUFFIXES and file.name != "config.json" and file.is_file()
    )


def _check_values(config: dict[str, Any]) -> None:
    """Check what is used of a stranger's configuration before, or long after, the model is built from it.

    Raises:
        ValueError: a tokenizer's file is not in the bundle, or the card could not be written again.
    """
    for name in config["tokenizer_files"]:
        if Path(name).name != name or "\\" in name:
            raise ValueError(f"{name!r} in tokenizer_files is not the name of a file in the bundle")
    metrics, data = config.get("metrics") or {}, config.get("training_data") or {}
    if not isinstance(data, dict) or not all(isinstance(value, int | float) for value in metrics.values()):
        raise ValueError("metrics or training_data in config.json are of another kind")


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
    if settings := config["text_tower"].get("tokenize"):
        tokenizer.update(json.dumps(settings, sort_keys=True).encode())
    transform = json.dumps(config["transform"], sort_keys=True).encode()
    return {"tokenizer": tokenizer.hexdigest(), "transform": hashlib.sha256(transform).hexdigest()}
