"""Exports a folder that open_clip loads as `local-dir:FOLDER`, with the same embeddings."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from clip_lightning.errors import UserError, as_user_error
from clip_lightning.model.clip import CLIP
from clip_lightning.model.export.onnx import EXAMPLES, TOLERANCE
from clip_lightning.model.towers.base import plain_config
from clip_lightning.model.towers.open_clip import open_clip_package
from clip_lightning.terminal import note

# Prefixes of weights → those of open_clip
PARTS = {
    "image_tower.backbone.": "visual.trunk.",
    "heads.image.1.": "visual.head.proj.",
    "text_tower.backbone.": "text.transformer.",
    "heads.text.1.": "text.proj.",
    "logit_": "logit_",
}
POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler", "pooler": "cls_pooler"}
# Text models for which open_clip builds the encoder.
TEXT_MODELS = ("bert", "roberta", "xlm-roberta")


def write_open_clip(clip: CLIP, folder: Path, final: Path) -> float:
    """Write a model into `folder`, which is later moved to `final`, and return its largest difference.

    open_clip loads the text model's configuration from the Hub or, if it is not available there, from the
    absolute path of the folder: `hf_model_name` must then be changed if the folder is moved again.
    """
    open_clip_package()
    head, pooling = clip.config()["head"], clip.text_tower.pooling
    kind = clip.text_tower.spec["config"]["model_type"]
    if head != "linear" or kind not in TEXT_MODELS or pooling not in POOLERS:
        raise UserError(
            f"open_clip does not support {head} heads and {kind} pooled by {pooling}; expected linear heads, "
            f"{', '.join(TEXT_MODELS)}, and {', '.join(POOLERS)}; try --to onnx or --to hub"
        )
    clip = copy.deepcopy(clip).cpu().eval()
    config: Any = clip.text_tower.backbone.config
    config.dtype = torch.float32  # the configuration may name another precision
    config.save_pretrained(folder)
    clip.tokenize.tokenizer.save_pretrained(folder)
    state = {}
    for name, tensor in clip.state_dict().items():
        part = next(part for part in PARTS if name.startswith(part))
        state[PARTS[part] + name.removeprefix(part)] = tensor.clone().contiguous()
    weights = folder / "open_clip_model.safetensors"
    save_file(state, weights, metadata={"format": "pt"})
    on_hub = _name_on_hub(clip)
    _write_config(clip, folder, on_hub or str(folder))
    shutil.copymode(folder / "open_clip_config.json", weights)  # safetensors creates a private file
    difference = _check(clip, folder)
    if not on_hub:
        note(
            "open_clip finds the text tower by the absolute path of the folder: if you move it, set "
            "hf_model_name in open_clip_config.json to its new path"
        )
    _write_config(clip, folder, on_hub or str(final.absolute()))
    return difference


def _name_on_hub(clip: CLIP) -> str | None:
    """Return the Hub name of the text tower if its configuration there is identical."""
    tower = clip.text_tower.spec
    name = tower["name"].removesuffix(f"@{tower['pooling']}")
    if Path(name).exists():
        return None
    try:
        same = plain_config(AutoConfig.from_pretrained(name)) == tower["config"]
    except (OSError, ValueError):
        return None
    return name if same else None


def _write_config(clip: CLIP, folder: Path, text_model: str) -> None:
    image, transform = clip.image_tower.spec, clip.transform
    model = {
        "embed_dim": clip.config()["embed_dim"],
        "vision_cfg": {
            "timm_model_name": image["architecture"],
            "timm_pool": image["arguments"].get("global_pool", ""),  # "": the architecture's default
            "timm_proj": "linear",
            "image_size": transform.size[0],
        },
        "text_cfg": {
            "hf_model_name": text_model,
            "hf_tokenizer_name": text_model,  # must be set; the tokenizer is loaded from the folder
            "hf_proj_type": "linear",
            "hf_pooler_type": POOLERS[clip.text_tower.pooling],
            "context_length": clip.tokenize.max_length,
        },
    }
    if clip.bias is not None:
        model["init_logit_bias"] = clip.bias
    preprocessing = {
        "mean": transform.mean,
        "std": transform.std,
        "interpolation": transform.interpolation,
        "resize_mode": "shortest",
    }
    content = {"model_cfg": model, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n")


@torch.inference_mode()
def _check(clip: CLIP, folder: Path) -> float:
    """Load the folder with open_clip, and return the largest difference of its embeddings from ours."""
    open_clip, name = open_clip_package(), f"local-dir:{folder}"
    with as_user_error("open_clip builds a tower of this model differently", "try --to onnx or --to hub"):
        model = open_clip.create_model(name).eval()
        tokenize = open_clip.get_tokenizer(name)
        noise = torch.Generator().manual_seed(0)
        pixels = torch.rand(3, 3, *clip.transform.size, generator=noise)
        mean, std = clip.image_tower.mean, clip.image_tower.std
        pairs = [(model.encode_image((pixels - mean) / std, normalize=True), clip.encode_image(pixels))]
        for texts in EXAMPLES:
            pairs.append((model.encode_text(tokenize(texts), normalize=True), clip.embed_texts(texts)))
    worst = torch.stack([(theirs - ours).abs().max() for theirs, ours in pairs]).max().item()
    bias = None if model.logit_bias is None else model.logit_bias.item()
    if not worst <= TOLERANCE or not torch.equal(model.logit_scale, clip.logit_scale) or bias != clip.bias:
        raise UserError(
            f"open_clip's embeddings differ by {worst:.1e}, more than {TOLERANCE}, or its scale or bias "
            "differs; try --to onnx"
        )
    return worst
