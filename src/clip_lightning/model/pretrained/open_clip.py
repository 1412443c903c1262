"""Loads models of open_clip as `CLIP`."""

from __future__ import annotations

import difflib
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from clip_lightning.data.images import ImageTransform
from clip_lightning.errors import UserError
from clip_lightning.model.pretrained.assemble import assemble
from clip_lightning.model.towers import ImageTower, TextTower, Tokenize
from clip_lightning.model.towers.base import first_line, plain_config
from clip_lightning.model.towers.open_clip import WORDS, OpenCLIPImage, OpenCLIPText, open_clip_package
from clip_lightning.model.towers.tokenize import TokenizeSettings

if TYPE_CHECKING:
    from clip_lightning.model.clip import CLIP

_PLACES = ("local-dir:", "hf-hub:")
_HF_POOLERS = {"MeanPooler": "mean", "ClsPooler": "pooler", "ClsLastHiddenStatePooler": "cls"}
_CLEANINGS = ("lower", "whitespace", "canonicalize")
_NOT_LOADED = (
    *(OSError, HfHubHTTPError, LocalEntryNotFoundError, pickle.UnpicklingError, SafetensorError),
    *(RuntimeError, ValueError, TypeError, KeyError, AssertionError),
)


def load_named(clip_class: type[CLIP], place: str, name: str) -> CLIP:
    """Load a model in fp32, with its preprocessing and its tokenizer.

    Args:
        clip_class: class of the result.
        place: `NAME/TAG`, `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.
        name: name of the model in messages.
    """
    package = open_clip_package()
    architecture, tag = (place, None) if place.startswith(_PLACES) else _architecture_and_tag(package, place)
    try:
        config = package.get_model_config(architecture)
        if "multimodal_cfg" in config:
            raise UserError(
                f"{name} is a CoCa model, which also generates captions; expected a model with only an image "
                "tower and a text tower"
            )
        if tag and package.get_pretrained_cfg(architecture, tag).get("quick_gelu"):
            config["quick_gelu"] = True  # these weights need it; open_clip only warns
        model = package.create_model(
            architecture,
            tag,
            precision="fp32",
            force_quick_gelu=config.get("quick_gelu", False),
            force_custom_text=True,
            require_pretrained=True,
        )
        tokenizer = package.get_tokenizer(architecture)
    except UserError:
        raise
    except _NOT_LOADED as error:
        raise UserError(
            f"open_clip cannot load {name} ({first_line(error)[:300]}); check the name, or connect once"
        ) from error
    shared = {"embed_dim": config["embed_dim"], "quick_gelu": config.get("quick_gelu", False)}
    image = OpenCLIPImage(model.visual)
    image_projection = image.take_projection()
    # timm must not load its own weights when the tower is built again
    arguments = {**shared, "vision_cfg": {**config["vision_cfg"], "timm_model_pretrained": False}}
    spec = {"name": f"{name} (image)", "architecture": image.ARCHITECTURE, "arguments": arguments}
    preprocess = open_clip_package("open_clip.model").get_model_preprocess_cfg(model)
    if type(model.text).__name__ == "HFTextEncoder":
        text_tower, text_projection = _transformers_text(model.text, tokenizer, name)
    else:
        text_tower, text_projection = _own_text(model.text, shared, config["text_cfg"], tokenizer, name)
    return assemble(
        clip_class,
        ImageTower(image, spec, _transform(preprocess, name)),
        text_tower,
        {"image": image_projection, "text": text_projection},
        embed_dim=config["embed_dim"],
        logit_scale=model.logit_scale.detach(),
        logit_bias=None if model.logit_bias is None else model.logit_bias.detach(),
    )


def _architecture_and_tag(package: Any, place: str) -> tuple[str, str]:
    architecture, _, tag = place.partition("/")
    if architecture not in package.list_models():
        similar = difflib.get_close_matches(architecture, package.list_models(), n=3) or ["ViT-B-32"]
        raise UserError(
            f"open_clip has no model {architecture!r}; expected open_clip:NAME/TAG or "
            f"open_clip:local-dir:FOLDER; similar names: {', '.join(similar)}"
        )
    tags = package.list_pretrained_tags_by_model(architecture)
    if tag not in tags and not Path(tag).is_file():
        known = ", ".join(tags) or "none"
        if not tag:
            raise UserError(f"open_clip:{architecture} names no weights; append /TAG, one of {known}")
        raise UserError(f"open_clip has no weights {tag!r} for {architecture}; expected one of {known}")
    return architecture, tag


def _transform(settings: dict[str, Any], name: str) -> ImageTransform:
    """Convert the preprocessing settings of open_clip (`size`, `resize_mode`, `mean`, ...)."""
    size, mode = settings["size"], settings["resize_mode"]
    if mode not in ("shortest", "squash"):
        raise UserError(
            f"{name} resizes images with open_clip's mode {mode!r}, which pads them; expected 'shortest' or "
            "'squash'"
        )
    return ImageTransform(
        size=(size, size) if isinstance(size, int) else tuple(size),
        # with `random`, which is for training, open_clip evaluates with bicubic
        interpolation="bilinear" if settings["interpolation"] == "bilinear" else "bicubic",
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        fit="crop" if mode == "shortest" else "squash",
    )


def _own_text(
    text: Any, shared: dict[str, Any], text_cfg: dict[str, Any], tokenizer: Any, name: str
) -> tuple[TextTower, nn.Module | None]:
    """Convert open_clip's own text transformer, with any tokenizer."""
    backbone = OpenCLIPText(text)
    projection = backbone.take_projection()
    settings = _cleaning(tokenizer, name)
    if type(tokenizer).__name__ == "SimpleTokenizer":
        converted = simple_tokenizer(tokenizer)
        settings["clean"] += WORDS
        if backbone.reads_padding:
            settings |= {"padding_side": "right", "pad_id": 0}
    else:
        converted = tokenizer.tokenizer
        settings |= {"padding_side": converted.padding_side}
    spec = {
        "name": f"{name} (text)",
        "config": {"model_type": backbone.ARCHITECTURE, **shared, "text_cfg": text_cfg},
        "pooling": "own",
        "max_length": tokenizer.context_length,
        "tokenize": settings,
    }
    return TextTower(backbone, Tokenize(converted, tokenizer.context_length, settings), spec), projection


def _transformers_text(text: Any, tokenizer: Any, name: str) -> tuple[TextTower, nn.Module | None]:
    """Convert a text model of transformers, which then works without open_clip."""
    pooling = _HF_POOLERS.get(type(text.pooler).__name__)
    if pooling is None or text.config.is_encoder_decoder or text.config.pad_token_id is None:
        raise UserError(
            f"{name}: the text tower {text.config.model_type!r} with {type(text.pooler).__name__} is not "
            "supported; expected an encoder that pools the first token, the mean, or with its own pooler"
        )
    if pooling == "pooler" and getattr(text.transformer, "pooler", None) is None:
        pooling = "cls"
    settings = _cleaning(tokenizer, name)
    spec = {
        "name": f"{name} (text)",
        "config": plain_config(text.config),
        "pooling": pooling,
        "max_length": tokenizer.context_length,
        "tokenize": settings,
    }
    projection = None if isinstance(text.proj, nn.Identity) else text.proj
    tokenize = Tokenize(tokenizer.tokenizer, tokenizer.context_length, settings)
    return TextTower(text.transformer, tokenize, spec), projection


def _cleaning(tokenizer: Any, name: str) -> TokenizeSettings:
    """Return how open_clip cleans a text before it is tokenized."""
    clean_fn = getattr(tokenizer, "clean_fn", None)
    functions = open_clip_package("open_clip.tokenizer")
    name_of_clean = next((clean for clean in _CLEANINGS if functions.get_clean_fn(clean) == clean_fn), None)
    unusual = ("tokenizer_mode", "strip_sep_token", "reduction_fn")
    special = any(getattr(tokenizer, option, None) for option in unusual)
    if name_of_clean is None or special or len(getattr(tokenizer, "all_special_ids", "..")) != 2:
        raise UserError(
            f"{name}: the tokenizer {type(tokenizer).__name__} changes tokens in an unsupported way; "
            "expected open_clip's own tokenizer, or one of transformers that only pads and truncates"
        )
    return {"clean": name_of_clean}


def simple_tokenizer(own: Any) -> PreTrainedTokenizerFast:
    """Convert open_clip's `SimpleTokenizer` to transformers, for texts that `clean_text` has split."""
    merges = sorted(own.bpe_ranks, key=own.bpe_ranks.__getitem__)
    tokenizer = Tokenizer(models.BPE(vocab=own.encoder, merges=merges, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", behavior="removed"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    start, end = (own.decoder[number] for number in (own.sot_token_id, own.eot_token_id))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, own.sot_token_id), (end, own.eot_token_id)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token=end)
