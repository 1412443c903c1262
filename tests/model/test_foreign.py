"""Models of transformers and open_clip as our CLIP: the same embeddings as theirs, in every command."""

import json
import shutil
import string
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip import factory, pretrained
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from clip_lightning.__main__ import main
from clip_lightning.data.images import ImageTransform, decode_image
from clip_lightning.errors import UserError
from clip_lightning.model.checkpoint import model_identity
from clip_lightning.model.clip import CLIP
from clip_lightning.model.pretrained.open_clip import simple_tokenizer
from clip_lightning.model.towers import Tokenize
from clip_lightning.training.losses import InfoNCE, SigLIP
from clip_lightning.training.module import CLIPModule
from clip_lightning.training.optim import OptimizerConfig, freeze_lower_layers, param_groups

Command = Callable[..., list[str]]
Patch = pytest.MonkeyPatch
TEXTS = ["a dog", "two cats on a Red mat and more words than there is room for", "", "it's 12 &amp; café"]
LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**LAYERS, "image_size": 32, "patch_size": 8}
WORDS = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase), *string.digits]
CLOSE = {"atol": 1e-4, "rtol": 0}
Save = Callable[[Path], None]


def bert_tokenizer() -> hf.BertTokenizer:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return hf.BertTokenizer(vocab={name: i for i, name in enumerate(names)})


def save_clip(folder: Path) -> None:
    letters = ["!", *string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {name: i for i, name in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    end = len(vocabulary) - 1
    text = {**LAYERS, "max_position_embeddings": 24, "vocab_size": end + 1}
    text |= {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    vision = {**VISION, "hidden_size": 48}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    hf.CLIPModel(config).save_pretrained(folder)
    pictures = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    hf.CLIPProcessor(pictures, hf.CLIPTokenizer(vocab=vocabulary, merges=[])).save_pretrained(folder)


def save_siglip(folder: Path) -> None:
    tokenizer = bert_tokenizer()
    text = {**LAYERS, "max_position_embeddings": 16, "vocab_size": len(tokenizer), "projection_size": 32}
    text |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    model = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=VISION))
    with torch.no_grad():
        model.logit_scale.fill_(4.765)  # SigLIP's own values
        model.logit_bias.fill_(-12.9)
    model.save_pretrained(folder)
    hf.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_dual(folder: Path) -> None:
    tokenizer = bert_tokenizer()
    text = hf.BertModel(hf.BertConfig(**LAYERS, vocab_size=len(tokenizer), max_position_embeddings=24))
    model = hf.VisionTextDualEncoderModel(vision_model=hf.ViTModel(hf.ViTConfig(**VISION)), text_model=text)
    model.save_pretrained(folder)
    pictures = hf.ViTImageProcessor(size={"height": 32, "width": 32})
    hf.VisionTextDualEncoderProcessor(pictures, tokenizer).save_pretrained(folder)


OURS: dict[str, tuple[Save, Any]] = {
    "clip": (save_clip, hf.CLIPModel),
    "siglip": (save_siglip, hf.SiglipModel),
    "dual": (save_dual, hf.VisionTextDualEncoderModel),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models as transformers saves them: `clip`, `siglip`, `dual`."""
    root = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, (save, _) in OURS.items():
            save(root / name)
    return root


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Waves and a chequered pattern, 150 wide and 90 high."""
    rows, columns = np.mgrid[0:90, 0:150]
    board = np.where((columns // 12 + rows // 12) % 2, 220, 30)
    waves = [127 + 100 * np.sin(columns / 9 + rows / 17), 127 + 100 * np.cos(columns / 21), board]
    path = tmp_path_factory.mktemp("pictures") / "waves.png"
    Image.fromarray(np.stack(waves, -1).clip(0, 255).astype("uint8")).save(path)
    return path


def of_transformers(kind: str, folder: Path, picture: Path) -> tuple[Tensor, Tensor]:
    """Unit-length embeddings of TEXTS and of the picture, by transformers alone, and the pixels."""
    model = OURS[kind][1].from_pretrained(folder).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    options = {"truncation": True, "max_length": 16 if kind == "siglip" else 24, "return_tensors": "pt"}
    tokens = dict(tokenizer(TEXTS, padding="max_length" if kind == "siglip" else True, **options))
    if kind == "siglip":  # it has never seen a mask
        del tokens["attention_mask"]
    pixels = hf.AutoImageProcessor.from_pretrained(folder)(Image.open(picture), return_tensors="pt")
    with torch.no_grad():
        texts = model.get_text_features(**tokens).pooler_output
        images = model.get_image_features(**pixels).pooler_output
    return F.normalize(texts, dim=-1), F.normalize(images, dim=-1)


@pytest.mark.parametrize("kind", OURS)
def test_embeddings_are_those_of_transformers_and_so_are_those_of_a_bundle(
    models: Path, picture: Path, tmp_path: Path, kind: str, monkeypatch: Patch
):
    clip = CLIP.from_pretrained(models / kind)
    texts, images = of_transformers(kind, models / kind, picture)
    torch.testing.assert_close(clip.embed_texts(TEXTS), texts, **CLOSE)
    # decoded, resized, cropped and normalised by each of us
    torch.testing.assert_close(clip.embed_images([picture]), images, **CLOSE)
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    assert (clip.logit_bias is None) == (kind != "siglip")
    assert_same(CLIP.from_pretrained(clip.save_pretrained(tmp_path / "bundle")), clip, picture)


def assert_same(again: CLIP, clip: CLIP, picture: Path) -> None:
    assert torch.equal(again.embed_texts(TEXTS), clip.embed_texts(TEXTS))
    assert torch.equal(again.embed_images([picture]), clip.embed_images([picture]))
    assert torch.equal(again.scale, clip.scale) and again.bias == clip.bias
    assert again.config() == clip.config()
    assert model_identity(again) == model_identity(clip)


def test_what_makes_siglip_different(models: Path):
    clip = CLIP.from_pretrained(models / "siglip")
    assert clip.config()["head"] == {"image": "none", "text": "affine"}
    assert clip.transform.fit == "squash"
    tokens = clip.tokenize(["a"])
    assert tokens["input_ids"].shape == (1, 16) and tokens["attention_mask"].all()
    assert clip.logit_bias is not None and clip.logit_bias.item() == pytest.approx(-12.9)
    for more in (0, 1):  # no jump in the first step, and no more than it has
        with torch.no_grad():
            clip.logit_scale.add_(more)
        clip.clamp_scale()
        assert clip.scale.item() == pytest.approx(117.33, abs=0.01)


@pytest.mark.parametrize("kind", OURS)
def test_layers_for_decay(models: Path, kind: str):
    clip = CLIP.from_pretrained(models / kind).train()
    config = OptimizerConfig(layer_decay=0.5, freeze_below=0.3)
    for tower in (clip.image_tower, clip.text_tower):
        assert tower.layers().keys() == {name for name, _ in tower.named_parameters()}
        assert set(tower.layers().values()) == {0, 1, 2}
    freeze_lower_layers(clip, config)
    assert not next(clip.text_tower.parameters()).requires_grad
    assert {group["lr"] for group in param_groups(clip, config)} == {1e-3, 1e-5, 0.5e-5}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("clip", {"model__freeze": "none", "data__captions_per_image": 1}),
        ("siglip", {"model__freeze": "image", "model__loss": "SigLIP", "model__micro_batch_size": 2}),
    ],
)
def test_fine_tuning(models: Path, command: Command, tmp_path: Path, kind: str, changes: dict[str, Any]):
    of_the_model = ("image_tower", "text_tower", "heads__embed_dim", "towers__image_size")
    options = {f"model__{name}": ... for name in of_the_model} | {"model__init_from": models / kind}
    options |= {"trainer__precision": "32-true", "trainer__check_val_every_n_epoch": 1}
    options |= {"trainer__max_epochs": 1, "trainer__limit_train_batches": 2}
    before = CLIP.from_pretrained(models / kind)
    config = ["--config", "finetune"] if kind == "clip" else []
    assert main(["fit", *config, *command("fit", tmp_path / "runs", **options, **changes)[1:]]) == 0
    [run] = (tmp_path / "runs").iterdir()
    after = CLIP.from_pretrained(run)
    assert after.config() == before.config()
    assert not torch.equal(after.embed_texts(TEXTS[:2]), before.embed_texts(TEXTS[:2]))
    if kind == "siglip":
        assert after.scale != before.scale and after.bias != before.bias
        weights = before.image_tower.state_dict()
        assert all(torch.equal(after.image_tower.state_dict()[name], weights[name]) for name in weights)


def test_the_loss_must_fit(models: Path):
    with pytest.raises(UserError, match=r"with a bias.* --model\.loss SigLIP"):
        CLIPModule(init_from=str(models / "siglip"), loss=InfoNCE())
    with pytest.raises(UserError, match=r"without a bias.* --model\.loss InfoNCE"):
        CLIPModule(init_from=str(models / "clip"), loss=SigLIP())
    assert CLIPModule(init_from=str(models / "siglip"), loss=SigLIP(), freeze="none").clip.training


# --- pictures


@pytest.mark.parametrize("options", [{"size": {"shortest_edge": 40}}, {"size": {"height": 32, "width": 32}}])
def test_the_transform_is_the_processors(
    models: Path, picture: Path, tmp_path: Path, options: dict[str, Any]
):
    folder = shutil.copytree(models / "clip", tmp_path / "clip")
    (folder / "processor_config.json").unlink()
    theirs = hf.CLIPImageProcessor(crop_size={"height": 32, "width": 32}, resample=2, **options)
    theirs.save_pretrained(folder)
    clip = CLIP.from_pretrained(folder)
    pixels = clip.transform(decode_image(picture)).float()[None] / 255
    ours = (pixels - clip.image_tower.mean) / clip.image_tower.std
    torch.testing.assert_close(ours, theirs(Image.open(picture), return_tensors="pt")["pixel_values"])


def test_a_transform_of_before_is_written_as_before():
    fields = {"size": [8, 8], "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
    transform = ImageTransform.from_dict(fields)
    assert transform.as_dict() == fields
    other = ImageTransform.from_dict(fields | {"fit": "squash", "shortest_edge": 9})
    assert ImageTransform.from_dict(other.as_dict()) == other != transform


# --- open_clip

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TIMM = {"image_size": 96, "timm_model_name": "test_vit"}
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "clip": {"vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True},
    "bidirectional": {"vision_cfg": VIT, "text_cfg": {**TEXT, "no_causal_mask": True}, "custom_text": True},
    "resnet": {
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
        "text_cfg": TEXT,
    },
    "siglip": {
        "init_logit_bias": -10.0,
        "vision_cfg": {**TIMM, "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {
            **{**TEXT, "vocab_size": 80, "width": 64, "no_causal_mask": True, "pool_type": "last"},
            **{"proj_bias": True, "hf_tokenizer_name": "x", "tokenizer_kwargs": {"clean": "canonicalize"}},
        },
        "custom_text": True,
    },
    "bert": {
        "vision_cfg": {**TIMM, "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": {
            **{"hf_model_name": "BERT", "hf_tokenizer_name": "BERT", "context_length": 16},
            **{"hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"},
        },
    },
}


def write_open_clip(folder: Path, kind: str, resize_mode: str = "shortest") -> Path:
    """A tiny model of random weights, as open_clip's `local-dir:` wants it."""
    text = json.dumps({"embed_dim": 64, **OPEN_CLIP[kind]})
    config = json.loads(text.replace("BERT", str(folder / "bert")))
    preprocess = {"size": config["vision_cfg"]["image_size"], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    preprocess |= {"interpolation": "bicubic", "resize_mode": "squash" if kind == "siglip" else resize_mode}
    folder.mkdir(parents=True)
    tokenizer = bert_tokenizer()
    for place in (folder, folder / "bert"):
        tokenizer.save_pretrained(place)
    bert = hf.BertModel(hf.BertConfig(**LAYERS, vocab_size=len(tokenizer)), add_pooling_layer=False)
    bert.save_pretrained(folder / "bert")
    file = folder / "open_clip_config.json"
    file.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = open_clip.create_model(f"local-dir:{folder}").state_dict()
    state = {name: value.contiguous() for name, value in state.items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_embeddings_are_those_of_open_clip(tmp_path: Path, picture: Path, kind: str):
    place = f"local-dir:{write_open_clip(tmp_path / kind, kind)}"
    model, _, preprocess = open_clip.create_model_and_transforms(place)
    tokens = open_clip.get_tokenizer(place)(TEXTS)
    clip = CLIP.from_pretrained(tmp_path / kind)
    ours = clip.transform(decode_image(picture))[None]
    theirs = preprocess(Image.open(picture))
    mean, std = clip.image_tower.mean, clip.image_tower.std
    with torch.no_grad():
        texts = F.normalize(model.eval().encode_text(tokens), dim=-1)
        images = F.normalize(model.encode_image((ours / 255 - mean) / std), dim=-1)
    torch.testing.assert_close(clip.embed_texts(TEXTS), texts, **CLOSE)
    torch.testing.assert_close(clip.embed_images([picture]), images, **CLOSE)
    # Pillow resizes there, torch here: both round, and bicubic ends one grey level apart now and then
    levels = ((theirs * std + mean) * 255 - ours).abs()
    assert levels.max() < 1.01 and levels.mean() < 0.1
    assert_same(CLIP.from_pretrained(clip.save_pretrained(tmp_path / "bundle")), clip, picture)
    for tower in (clip.image_tower, clip.text_tower):
        assert tower.layers().keys() == {name for name, _ in tower.named_parameters()}


def test_weights_trained_with_quick_gelu_get_it(tmp_path: Path, picture: Path, monkeypatch: Patch):
    """open_clip:ViT-B-32/openai, say: the tag knows it, the architecture's name does not."""
    folder = write_open_clip(tmp_path / "clip", "clip")
    content = json.loads((folder / "open_clip_config.json").read_text())
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", content["model_cfg"] | {"quick_gelu": False})
    tag = pretrained._pcfg("nowhere", quick_gelu=True, **dict.fromkeys(["mean", "std"], (0.5, 0.4, 0.3)))
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", {"tag": tag})
    file = folder / "open_clip_model.safetensors"
    monkeypatch.setattr(factory, "download_pretrained", lambda *_, **__: file)
    clip, plain = CLIP.from_pretrained("open_clip:tiny/tag"), CLIP.from_pretrained(folder)
    assert_same(CLIP.from_pretrained(clip.save_pretrained(tmp_path / "bundle")), clip, picture)
    for model in (clip, CLIP.from_pretrained(f"open_clip:local-dir:{folder}")):
        assert torch.equal(model.embed_texts(TEXTS), plain.embed_texts(TEXTS))
    # alone, a text has no padding; among longer ones, and in open_clip, it has
    torch.testing.assert_close(plain.embed_texts(TEXTS[:1]), plain.embed_texts(TEXTS)[:1], **CLOSE)


@cache
def both_tokenizers() -> tuple[Any, Tokenize]:
    own = open_clip.get_tokenizer("ViT-B-32")
    options = {"clean": "lower+words", "padding_side": "right", "pad_id": 0}
    return own, Tokenize(simple_tokenizer(own), 77, options)


ODD = st.text(alphabet="ab'sSté🦆 .,!#12\n\x1c<>_&;") | st.just("!<end_of_text> <END_of_text>a")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=30) | ODD, min_size=1, max_size=3))
def test_open_clips_tokens(texts: list[str]):
    own, ours = both_tokenizers()
    assert torch.equal(ours(texts)["input_ids"], own(texts))


# --- what is refused

PROCESSOR, CONVNEXT = "preprocessor_config.json", "ConvNextImageProcessor"
EDGES = "height", "width"


def change(folder: Path, file: str, **values: Any) -> None:
    content = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("clip", lambda f: change(f, "config.json", model_type="blip"), "'blip', expected one of clip"),
        ("clip", lambda f: change(f, "config.json", model_type="siglip2"), "'siglip2', expected one of clip"),
        ("clip", lambda f: (f / "processor_config.json").unlink(), "Can't load image processor"),
        ("clip", lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
        ("clip", lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
        ("clip", lambda f: (f / "model.safetensors").write_bytes(b"{}"), "SafetensorError"),
        ("clip", lambda f: (f / "config.json").write_text("{"), "JSONDecodeError"),
        ("clip", lambda f: (f / "config.json").write_text("[]"), r"config\.json is not a JSON object"),
        ("siglip", lambda f: change(f, PROCESSOR, resample=1), "SiglipImageProcessor .*bicubic"),
        ("siglip", lambda f: change(f, PROCESSOR, do_resize=False), "that resizes"),
        ("siglip", lambda f: change(f, PROCESSOR, image_processor_type=CONVNEXT), f"{CONVNEXT} with its"),
        ("siglip", lambda f: change(f, PROCESSOR, size=dict.fromkeys(EDGES, 40)), r"images of \(40, 40\)"),
    ],
)
def test_what_cannot_be_taken(
    models: Path, tmp_path: Path, kind: str, spoil: Callable[[Path], object], message: str
):
    folder = shutil.copytree(models / kind, tmp_path / kind)
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        CLIP.from_pretrained(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_it_is_not_replaced_by_a_bundle(models: Path, tmp_path: Path):
    folder = shutil.copytree(models / "clip", tmp_path / "clip")
    with pytest.raises(UserError, match="something other than a bundle"):
        CLIP.from_pretrained(folder).save_pretrained(folder)
    assert torch.isfinite(CLIP.from_pretrained(folder).embed_texts(TEXTS)).all()


def test_a_pickle_runs_nothing(models: Path, tmp_path: Path):
    folder = shutil.copytree(models / "clip", tmp_path / "clip")
    (folder / "model.safetensors").unlink()
    weights = hf.CLIPModel.from_pretrained(models / "clip").state_dict()
    torch.save(weights, folder / "pytorch_model.bin")
    expected = CLIP.from_pretrained(models / "clip").embed_texts(TEXTS)
    torch.testing.assert_close(CLIP.from_pretrained(folder).embed_texts(TEXTS), expected)

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "touched",)

    torch.save(weights | {"evil": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="UnpicklingError: Weights only load failed"):
        CLIP.from_pretrained(folder)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-B-3/laion2b_s34b_b79k", "'ViT-B-3' not found in built-ins"),
        ("open_clip:ViT-B-32/laion", "'laion' is not a known tag"),
        ("open_clip:ViT-B-32", "Required pretrained weights"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "Failed to download weights"),
        ("open_clip:coca_ViT-B-32/laion2b_s13b_b90k", "CoCa"),
        ("open_clip:local-dir:/nowhere", "No such file"),
    ],
)
def test_no_such_open_clip(name: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        CLIP.from_pretrained(name)
    assert "\n" not in str(caught.value)


def test_an_open_clip_that_cannot_be_taken(tmp_path: Path, monkeypatch: Patch):
    folder = write_open_clip(tmp_path / "clip", "clip", resize_mode="longest")
    with pytest.raises(UserError, match="fit='longest'"):
        CLIP.from_pretrained(folder)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match="Required pretrained weights"):
        CLIP.from_pretrained(folder)
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(UserError, match=r"pip install open_clip_torch"):
        CLIP.from_pretrained(folder)


def test_from_the_hub(models: Path, tmp_path: Path, monkeypatch: Patch):
    """What is asked of the hub: first what says which kind of model it is, then only that kind's weights."""
    cache, asked = tmp_path / "snapshot", []
    hub = shutil.copytree(models / "clip", tmp_path / "hub")
    for name in ("pytorch_model.bin", "open_clip_model.safetensors", "code.py"):
        (hub / name).write_bytes(b"not wanted")

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        assert name == "owner/name"
        asked.append(allow_patterns)
        cache.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for file in hub.glob(pattern):
                shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    clip = CLIP.from_pretrained("owner/name")
    assert torch.equal(clip.embed_texts(TEXTS), CLIP.from_pretrained(models / "clip").embed_texts(TEXTS))
    assert {file.name for file in cache.iterdir()} == {file.name for file in (models / "clip").iterdir()}
    assert asked[1:] == [["model*.safetensors"]]
