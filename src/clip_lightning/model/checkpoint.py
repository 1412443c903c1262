"""What a checkpoint holds of a model: fixed towers by digest, adapters beside the rest, the preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP
from clip_lightning.model.lora import LoRAConfig, adapter_state
from clip_lightning.model.towers import Tower


def leave_out_fixed_towers(checkpoint: dict[str, Any], clip: CLIP, lora: LoRAConfig | None) -> None:
    """Name fixed towers in a checkpoint by their digest instead of storing them again.

    Args:
        checkpoint: its `state_dict` has every weight of a module whose `clip` this is.
        clip: the model.
        lora: its adapters, which are stored beside the rest.
    """
    checkpoint["preprocessing"] = preprocessing(clip, lora)
    checkpoint["adapters"] = adapter_state(checkpoint["state_dict"]) if clip.adapted else {}
    checkpoint["frozen_towers"] = {}
    for name, tower in fixed_towers(clip).items():
        checkpoint["frozen_towers"][name] = tower.digest()
        for key in tower.state_dict():
            del checkpoint["state_dict"][f"{name}.{key}"]


def put_back_fixed_towers(checkpoint: dict[str, Any], clip: CLIP, lora: LoRAConfig | None) -> None:
    """Undo `leave_out_fixed_towers`, after checking that the towers are the same.

    Raises:
        UserError: the checkpoint was trained on another fixed tower, or with other adapters.
    """
    adapters, own = checkpoint.get("preprocessing", {}).get("LoRA"), preprocessing(clip, lora)["LoRA"]
    if adapters != own:
        raise UserError(
            f"the checkpoint was trained with --model.lora {adapters}, here it is {own}; give the same"
        )
    digests = checkpoint.get("frozen_towers", {})
    check_fixed_towers(digests, clip)
    for name in digests:
        weights = _towers(clip)[name].state_dict()
        checkpoint["state_dict"] |= {f"{name}.{key}": value for key, value in weights.items()}
    checkpoint["state_dict"] |= checkpoint.get("adapters", {})


def check_fixed_towers(digests: Mapping[str, str], clip: CLIP) -> None:
    """Compare fixed towers with the digests in a checkpoint.

    Raises:
        UserError: one of them is another tower.
    """
    for name, digest in digests.items():
        tower = _towers(clip)[name]
        if tower.digest() != digest:
            raise UserError(
                f"the checkpoint was trained on another frozen {name.removeprefix('clip.')} than "
                f"{tower.spec['name']!r}; give the same --model options as then"
            )


def preprocessing(clip: CLIP, lora: LoRAConfig | None) -> dict[str, Any]:
    """What weights depend on and do not show: how pictures and texts reach the towers."""
    image, text = clip.image_tower.spec, clip.text_tower.spec
    return {
        "image tower": [image["architecture"], image["arguments"]],
        "pictures": clip.transform.as_dict(),
        "text pooling": text["pooling"],
        "longest text": text["max_length"],
        "tokenizer": clip.tokenize.digest(),
        "LoRA": None if lora is None else asdict(lora),
    }


def fixed_towers(clip: CLIP) -> dict[str, Tower]:
    """Those whose own weights stay as they are, with or without adapters, by their names in a checkpoint."""
    return {name: tower for name, tower in _towers(clip).items() if tower.frozen or tower.adapted}


def _towers(clip: CLIP) -> dict[str, Tower]:
    return {"clip.image_tower": clip.image_tower, "clip.text_tower": clip.text_tower}
