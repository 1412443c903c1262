"""A folder that open_clip loads as `local-dir:FOLDER`, with the same embeddings."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP
from clip_lightning.model.export.onnx import EXAMPLES, TOLERANCE
from clip_lightning.model.towers.base import first_line

# Our name of a part → open_clip's
PARTS = {
    "image_tower.backbone.": "visual.trunk.",
    "heads.image.1.": "visual.head.proj.",
    "text_tower.backbone.": "text.transformer.",
    "heads.text.1.": "text.proj.",
    "logit_": "logit_",
}
POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler", "pooler": "cls_pooler"}
# Those of open_clip's table of text models whose encoder it builds by that name.
TEXT_MODELS = ("bert", "roberta", "xlm-roberta")


def write_open_clip(clip: CLIP, folder: Path, final: Path) -> float:
    """Write configuration, weights and tokenizer into `folder`, which will be moved to `final`.

    open_clip finds the text model's config.json by the absolute path in its configuration: the folder can be
    moved again only if `hf_model_name` in open_clip_config.json is changed with it.

    Returns:
        The largest absolute difference between open_clip's embeddings and ours, of test inputs.

    Raises:
        UserError: open_clip is not installed, cannot express the model, or gives other embeddings.
    """
    try:
        import open_clip  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            "--to open_clip checks what it writes with open_clip: pip install open_clip_torch"
        ) from error
    if reason := inexpressible(clip):
        raise UserError(f"open_clip cannot express this model: {reason}; try --to onnx or --to hub")
    clip = copy.deepcopy(clip).cpu().eval()
    config: Any = copy.deepcopy(clip.text_tower.backbone.config)
    config.dtype = torch.float32  # open_clip would build it in the precision that it was once saved in
    config.save_pretrained(folder)
    clip.tokenize.tokenizer.save_pretrained(folder)
    state = {_their_name(name): tensor.clone().contiguous() for name, tensor in clip.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    _write_config(clip, folder, folder)
    difference = _check(clip, folder)
    _write_config(clip, folder, final.absolute())
    return difference


def inexpressible(clip: CLIP) -> str | None:
    """Why open_clip has no such model, in a few words; None where it has."""
    image, text = clip.image_tower.spec, clip.text_tower.spec
    height, width = clip.transform.size
    heads: Any = clip.heads
    if not timm.is_model(image["architecture"]):
        return f"its image tower {image['architecture']} is not timm's"
    if not all(_is_linear(head) for head in (heads.image, heads.text)):
        return "its heads are not linear"
    if clip.adapted:
        return "it has adapters; export the bundle, which has them merged in"
    if height != width:
        return f"pictures of {height}x{width} pixels are not square"
    if odd := {key: value for key, value in image["arguments"].items() if key != "global_pool"}:
        default = timm.get_pretrained_cfg(image["architecture"], allow_unregistered=True)
        if odd != {"img_size": default.input_size[1] if default else None}:
            return f"its image tower is built with {odd}"
    if text["config"]["model_type"] not in TEXT_MODELS:
        return f"its text tower is a {text['config']['model_type']}, open_clip has {', '.join(TEXT_MODELS)}"
    if text["pooling"] not in POOLERS:
        return f"its text tower is pooled by {text['pooling']!r}, open_clip has {', '.join(POOLERS)}"
    if clip.tokenize.tokenizer.pad_token_id != text["config"].get("pad_token_id"):
        return "its tokenizer pads with another token than its text tower's configuration says"
    return None


def _is_linear(head: nn.Module) -> bool:
    layers = [layer for layer in head.modules() if not isinstance(layer, nn.Sequential | nn.Dropout)]
    return len(layers) == 1 and isinstance(layers[0], nn.Linear) and layers[0].bias is None


def _their_name(name: str) -> str:
    ours = next(ours for ours in PARTS if name.startswith(ours))
    return PARTS[ours] + name.removeprefix(ours)


def _write_config(clip: CLIP, folder: Path, text_model: Path) -> None:
    image, transform = clip.image_tower.spec, clip.transform
    model = {
        "embed_dim": clip.config()["embed_dim"],
        "vision_cfg": {
            "timm_model_name": image["architecture"],
            "timm_pool": image["arguments"].get("global_pool", ""),  # "": the architecture's own
            "timm_proj": "linear",
            "image_size": transform.size[0],
        },
        "text_cfg": {
            "hf_model_name": str(text_model),
            "hf_tokenizer_name": str(text_model),
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
    """The largest difference between what open_clip, from the folder, and we make of test inputs."""
    import open_clip

    name = f"local-dir:{folder}"
    try:
        model = open_clip.create_model(name).eval()
        tokenize = open_clip.get_tokenizer(name)
        noise = torch.Generator().manual_seed(0)
        pixels = torch.rand(3, 3, *clip.transform.size, generator=noise)
        mean, std = clip.image_tower.mean, clip.image_tower.std
        pairs = [(model.encode_image((pixels - mean) / std, normalize=True), clip.encode_image(pixels))]
        for texts in EXAMPLES:
            pairs.append((model.encode_text(tokenize(texts), normalize=True), clip.embed_texts(texts)))
    except (RuntimeError, ValueError, TypeError, AssertionError, KeyError) as error:
        raise UserError(
            f"open_clip cannot express this model: it builds {clip.image_tower.spec['architecture']} or the "
            f"text tower otherwise ({first_line(error)[:300]}); try --to onnx or --to hub"
        ) from error
    worst = max((theirs - ours).abs().max().item() for theirs, ours in pairs)
    same = _equal(model.logit_scale, clip.logit_scale) and _equal(model.logit_bias, clip.logit_bias)
    if not same or not worst <= TOLERANCE:
        raise UserError(
            f"open_clip's embeddings of this model differ by {worst:.1e}, more than {TOLERANCE}, or its "
            "scale differs; try --to onnx"
        )
    return worst


def _equal(theirs: Any, ours: Tensor | None) -> bool:
    if theirs is None or ours is None:
        return theirs is ours
    return bool(torch.equal(theirs, ours))
