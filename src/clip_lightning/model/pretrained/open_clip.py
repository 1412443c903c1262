"""Loads models of open_clip as `CLIP`."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from clip_lightning.data.images import ImageTransform
from clip_lightning.model.towers import ImageTower, TextTower
from clip_lightning.model.towers.base import plain_config
from clip_lightning.model.towers.open_clip import (
    WORDS,
    OpenCLIPImage,
    OpenCLIPText,
    open_clip_package,
    take_projection,
)
from clip_lightning.model.towers.text import TokenizeSettings

_HF_POOLERS = {"MeanPooler": "mean", "ClsPooler": "pooler", "ClsLastHiddenStatePooler": "cls"}
_CLEANINGS = ("lower", "whitespace", "canonicalize")


def load_open_clip(place: str, name: str) -> tuple[ImageTower, TextTower, dict[str, Any], int, Any]:
    """Return the towers in fp32, their projections, the width of the embeddings, and the original model.

    `place` is `NAME/TAG`, `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.
    """
    package = open_clip_package()
    architecture, tag = place, None
    if not place.startswith(("local-dir:", "hf-hub:")):
        architecture, _, tag = place.partition("/")
    config = package.get_model_config(architecture) or {}
    if "multimodal_cfg" in config:
        raise ValueError("CoCa models, which also generate captions, are not supported")
    if tag and package.get_pretrained_cfg(architecture, tag).get("quick_gelu"):
        config["quick_gelu"] = True  # these weights need it; open_clip only warns
    quick_gelu = config.get("quick_gelu", False)
    model = package.create_model(
        architecture, tag, force_quick_gelu=quick_gelu, force_custom_text=True, require_pretrained=True
    )
    shared = {"embed_dim": config["embed_dim"], "quick_gelu": quick_gelu}
    projections: dict[str, nn.Module | None] = {"image": take_projection(model.visual)}
    # timm must not load its own weights when the tower is built again
    arguments = {**shared, "vision_cfg": {**config["vision_cfg"], "timm_model_pretrained": False}}
    spec = {"name": f"{name} (image)", "architecture": OpenCLIPImage.ARCHITECTURE, "arguments": arguments}
    settings = open_clip_package("open_clip.model").get_model_preprocess_cfg(model)
    size, fit = settings["size"], settings["resize_mode"]
    transform = ImageTransform(
        size=(size, size) if isinstance(size, int) else tuple(size),
        # with `random`, which is for training, open_clip evaluates with bicubic
        interpolation="bilinear" if settings["interpolation"] == "bilinear" else "bicubic",
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        fit="crop" if fit == "shortest" else fit,  # "longest", which pads, is refused
    )
    image_tower = ImageTower(OpenCLIPImage(model.visual), spec, transform)
    text_config, tokenizer = shared | {"text_cfg": config["text_cfg"]}, package.get_tokenizer(architecture)
    text_tower, projections["text"] = _text_tower(model.text, text_config, tokenizer, name)
    return image_tower, text_tower, projections, config["embed_dim"], model


def _text_tower(
    text: Any, own_config: dict[str, Any], tokenizer: Any, name: str
) -> tuple[TextTower, nn.Module | None]:
    """Convert open_clip's text transformer, or one of transformers, which then needs no open_clip."""
    settings = _cleaning(tokenizer)
    converted = getattr(tokenizer, "tokenizer", None)
    if type(text).__name__ == "HFTextEncoder":
        pooling = _HF_POOLERS.get(type(text.pooler).__name__)
        if pooling is None or text.config.is_encoder_decoder or text.config.pad_token_id is None:
            kind = text.config.model_type
            raise ValueError(f"its text tower {kind!r} with {type(text.pooler).__name__} is not supported")
        if pooling == "pooler" and getattr(text.transformer, "pooler", None) is None:
            pooling = "cls"
        backbone, config = text.transformer, plain_config(text.config)
        projection = None if isinstance(text.proj, nn.Identity) else text.proj
    else:
        projection = take_projection(text)
        backbone, pooling = OpenCLIPText(text), "own"
        config = {"model_type": backbone.ARCHITECTURE, **own_config}
        if converted is not None:
            settings["padding_side"] = converted.padding_side
        else:
            converted = simple_tokenizer(tokenizer)
            settings["clean"] += WORDS
            if text.attn_mask is None or text.pool_type not in ("argmax", "eos"):  # it reads the padding
                settings |= {"padding_side": "right", "pad_id": 0}
    spec = {"name": f"{name} (text)", "config": config, "pooling": pooling}
    spec |= {"max_length": tokenizer.context_length, "tokenize": settings}
    return TextTower(backbone, converted, spec), projection


def _cleaning(tokenizer: Any) -> TokenizeSettings:
    """Return how open_clip cleans a text before it is tokenized."""
    clean_fn = getattr(tokenizer, "clean_fn", None)
    functions = open_clip_package("open_clip.tokenizer")
    clean = next((clean for clean in _CLEANINGS if functions.get_clean_fn(clean) == clean_fn), None)
    unusual = ("tokenizer_mode", "strip_sep_token", "reduction_fn")
    special = any(getattr(tokenizer, option, None) for option in unusual)
    if clean is None or special or len(getattr(tokenizer, "all_special_ids", "..")) != 2:
        raise ValueError(f"its tokenizer {type(tokenizer).__name__} changes tokens in an unsupported way")
    return {"clean": clean}


def simple_tokenizer(own: Any) -> PreTrainedTokenizerFast:
    """Convert open_clip's `SimpleTokenizer` to transformers, for texts that `clean_text` has split."""
    merges = sorted(own.bpe_ranks, key=own.bpe_ranks.__getitem__)
    tokenizer = Tokenizer(models.BPE(vocab=own.encoder, merges=merges, end_of_word_suffix="</w>"))
    words = pre_tokenizers.Split(" ", behavior="removed")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    tokenizer.decoder = decoders.ByteLevel()
    start, end = (own.decoder[number] for number in (own.sot_token_id, own.eot_token_id))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, own.sot_token_id), (end, own.eot_token_id)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token=end)
