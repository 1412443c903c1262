"""open_clip's models, taken apart."""

from __future__ import annotations

import difflib
import pickle
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from clip_lightning.errors import UserError
from clip_lightning.model.pretrained.parts import Parts
from clip_lightning.model.pretrained.pixels import transform_of_open_clip
from clip_lightning.model.towers import ImageTower, TextTower, Tokenize
from clip_lightning.model.towers.base import first_line, plain_config
from clip_lightning.model.towers.open_clip import WORDS, OpenCLIPImage, OpenCLIPText, open_clip_package
from clip_lightning.model.towers.text import TokenizeSettings

_PLACES = ("local-dir:", "hf-hub:")
_HF_POOLERS = {"MeanPooler": "mean", "ClsPooler": "pooler", "ClsLastHiddenStatePooler": "cls"}
_CLEANINGS = ("lower", "whitespace", "canonicalize")


def load_named(place: str, name: str) -> Parts:
    """The model at a place, with its weights in fp32, its preprocessing and its tokenizer.

    Args:
        place: `NAME/TAG`, `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.
        name: what the user called it.

    Raises:
        UserError: open_clip is missing, there is no such model, or it has a part that cannot be taken.
    """
    package = open_clip_package()
    architecture, tag = (place, None) if place.startswith(_PLACES) else _architecture_and_tag(package, place)
    try:
        config = package.get_model_config(architecture)
        if "multimodal_cfg" in config:
            raise UserError(
                f"{name} is a CoCa model, whose text tower also writes captions; expected one with two "
                "towers only"
            )
        if tag and package.get_pretrained_cfg(architecture, tag).get("quick_gelu"):
            config["quick_gelu"] = True  # as these weights were trained; open_clip itself only warns
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
    except _NOT_HAD + _NOT_BUILT as error:
        raise UserError(
            f"open_clip cannot load {name} ({first_line(error)[:300]}); check it, or connect once"
        ) from error
    return _take_apart(model, config, tokenizer, name)


_NOT_HAD = (OSError, HfHubHTTPError, LocalEntryNotFoundError, pickle.UnpicklingError, SafetensorError)
_NOT_BUILT = (RuntimeError, ValueError, TypeError, KeyError, AssertionError)


def _architecture_and_tag(package: Any, place: str) -> tuple[str, str]:
    architecture, _, tag = place.partition("/")
    if architecture not in package.list_models():
        near = ", ".join(difflib.get_close_matches(architecture, package.list_models(), n=3)) or "ViT-B-32"
        raise UserError(
            f"open_clip has no model {architecture!r}; near names: {near} (expected open_clip:NAME/TAG, or "
            "open_clip:local-dir:FOLDER)"
        )
    tags = package.list_pretrained_tags_by_model(architecture)
    if tag not in tags and not Path(tag).is_file():
        known = ", ".join(tags) or "none"
        if not tag:
            raise UserError(f"open_clip:{architecture} names no weights; add /TAG, one of {known}")
        raise UserError(f"open_clip has no weights {tag!r} of {architecture}; there are {known}")
    return architecture, tag


def _take_apart(model: Any, config: dict[str, Any], tokenizer: Any, name: str) -> Parts:
    shared = {"embed_dim": config["embed_dim"], "quick_gelu": config.get("quick_gelu", False)}
    image = OpenCLIPImage(model.visual)
    image_projection = image.take_projection()
    preprocess = open_clip_package("open_clip.model").get_model_preprocess_cfg(model)
    # weights are of this model now, not timm's own
    arguments = {**shared, "vision_cfg": {**config["vision_cfg"], "timm_model_pretrained": False}}
    spec = {"name": f"{name} (image)", "architecture": image.ARCHITECTURE, "arguments": arguments}
    image_tower = ImageTower(image, spec, transform_of_open_clip(preprocess, name))
    if type(model.text).__name__ == "HFTextEncoder":
        text_tower, text_projection = _transformers_text(model.text, tokenizer, name)
    else:
        text_tower, text_projection = _own_text(model.text, shared, config["text_cfg"], tokenizer, name)
    return Parts(
        image_tower,
        text_tower,
        {"image": image_projection, "text": text_projection},
        embed_dim=config["embed_dim"],
        logit_scale=model.logit_scale.detach(),
        logit_bias=None if model.logit_bias is None else model.logit_bias.detach(),
    )


def _own_text(
    text: Any, shared: dict[str, Any], text_cfg: dict[str, Any], tokenizer: Any, name: str
) -> tuple[TextTower, nn.Module | None]:
    """open_clip's own transformer, with whichever tokenizer."""
    backbone = OpenCLIPText(text)
    projection = backbone.take_projection()
    settings = _cleaning(tokenizer, name)
    if type(tokenizer).__name__ == "SimpleTokenizer":
        words = simple_tokenizer(tokenizer)
        settings["clean"] += WORDS
        if backbone.reads_padding:
            settings |= {"padding_side": "right", "pad_id": 0}
    else:
        words = tokenizer.tokenizer
        settings |= {"padding_side": words.padding_side}
    spec = {
        "name": f"{name} (text)",
        "config": {"model_type": backbone.ARCHITECTURE, **shared, "text_cfg": text_cfg},
        "pooling": "own",
        "max_length": tokenizer.context_length,
        "tokenize": settings,
    }
    return TextTower(backbone, Tokenize(words, tokenizer.context_length, settings), spec), projection


def _transformers_text(text: Any, tokenizer: Any, name: str) -> tuple[TextTower, nn.Module | None]:
    """A text model of transformers, which needs nothing of open_clip any more."""
    pooling = _HF_POOLERS.get(type(text.pooler).__name__)
    if pooling is None or text.config.is_encoder_decoder or text.config.pad_token_id is None:
        raise UserError(
            f"{name}: its text tower {text.config.model_type!r} with {type(text.pooler).__name__} cannot be "
            "taken; expected an encoder that pools its first token, the mean or the model's own pooler"
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
    """What happens to a text before open_clip's tokenizer sees it.

    Raises:
        UserError: more than that happens.
    """
    own = open_clip_package("open_clip.tokenizer")
    ways = {own.get_clean_fn(way): way for way in _CLEANINGS}
    way = ways.get(getattr(tokenizer, "clean_fn", None))
    special = any(
        getattr(tokenizer, name, None) for name in ("tokenizer_mode", "strip_sep_token", "reduction_fn")
    )
    if way is None or special or len(getattr(tokenizer, "all_special_ids", "..")) != 2:
        raise UserError(
            f"{name}: its tokenizer changes tokens in a way of its own ({type(tokenizer).__name__}); "
            "expected open_clip's own tokenizer, or one of transformers that pads and cuts"
        )
    return {"clean": way}


def simple_tokenizer(own: Any) -> PreTrainedTokenizerFast:
    """open_clip's `SimpleTokenizer` as one of transformers, for texts split by `clean_text`."""
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
