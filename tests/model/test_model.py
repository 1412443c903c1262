"""The model and its bundle: what is saved comes back bit for bit, and nothing else is taken for it."""

import io
import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import clip_lightning.model.bundle as bundle_module
from clip_lightning.data.images import BrokenImage, decode_image
from clip_lightning.errors import UserError
from clip_lightning.model.checkpoint import model_identity
from clip_lightning.model.clip import CLIP, Dropout, ResidualMLPHead, unit_length
from clip_lightning.training.losses import info_nce

Logged = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch
MakeClip = Callable[..., CLIP]
TEXTS = ["a large red circle left of a small blue square", "a star", "", "🦆"]


@pytest.fixture
def pictures(scenes: Path) -> list[Path]:
    return sorted(scenes.glob("*.jpg"))[:5]


@pytest.fixture
def bundle(make_clip: MakeClip, tmp_path: Path) -> Path:
    return make_clip().save_pretrained(tmp_path / "model")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_embeddings_have_unit_length_in_fp32(make_clip: MakeClip, pictures: list[Path], head: str) -> None:
    clip = make_clip(head=head)
    with torch.autocast("cpu", torch.bfloat16):
        in_autocast = clip.encode_text(**clip.tokenize(TEXTS))
    embedded = (clip.embed_images(pictures), 5), (clip.embed_texts(TEXTS), 4), (in_autocast, 4)
    for embeddings, count in embedded:
        assert embeddings.shape == (count, 16)
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(count), rtol=1e-5, atol=0)
    assert clip.embed_images([]).shape == clip.embed_texts([]).shape == (0, 16)


def test_unit_length_has_the_gradient_of_normalize() -> None:
    rows = [torch.tensor([[3.0, -4.0], [0.0, 0.0]]).requires_grad_() for _ in range(2)]
    for each, normalize in zip(rows, (unit_length, F.normalize), strict=True):
        (normalize(each) * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    torch.testing.assert_close(rows[0].grad, rows[1].grad)
    assert torch.autograd.gradgradcheck(unit_length, torch.rand(3, 4).double().requires_grad_())


def test_embeddings_do_not_depend_on_the_batch(make_clip: MakeClip, pictures: list[Path]) -> None:
    clip = make_clip(image="random:test_resnet", dropout=0.5).train()
    torch.testing.assert_close(clip.embed_images(pictures, batch_size=2), clip.embed_images(pictures))
    torch.testing.assert_close(clip.embed_texts(TEXTS, batch_size=1), clip.embed_texts(TEXTS))
    # a single text is one item
    assert torch.equal(clip.embed_texts("a star"), clip.embed_texts(["a star"]))
    assert torch.equal(clip.embed_texts(text for text in TEXTS), clip.embed_texts(TEXTS))
    assert clip.tokenize("a star")["input_ids"].shape[0] == 1


IMAGE_FORMS: dict[str, Callable[[Path], Any]] = {
    "name": str,
    "path": lambda path: path,
    "bytes": Path.read_bytes,
    "file": lambda path: io.BytesIO(path.read_bytes()),
    "PIL": Image.open,
    "array": lambda path: np.array(Image.open(path)),
    "tensor": decode_image,
}


@pytest.mark.parametrize("form", IMAGE_FORMS)
def test_images_in_any_form_one_or_several(make_clip: MakeClip, tmp_path: Path, form: str) -> None:
    clip, make = make_clip(), IMAGE_FORMS[form]
    paths = [tmp_path / f"{name}.png" for name in range(3)]
    for number, path in enumerate(paths):
        Image.effect_noise((40, 50), 20 * number + 20).convert("RGB").save(path)
    expected = clip.embed_images(paths)
    torch.testing.assert_close(clip.embed_images(make(paths[0])), expected[:1])
    torch.testing.assert_close(clip.embed_images((make(path) for path in paths), batch_size=2), expected)
    if form in ("array", "tensor"):
        stacked = np.stack if form == "array" else torch.stack
        torch.testing.assert_close(clip.embed_images(stacked([make(path) for path in paths])), expected)
    assert torch.equal(clip.transform(make(paths[1])), clip.transform(decode_image(paths[1])))


def test_what_cannot_be_read(
    make_clip: MakeClip, pictures: list[Path], tmp_path: Path, caplog: Logged
) -> None:
    clip, missing = make_clip(), tmp_path / "missing.jpg"
    with pytest.raises(BrokenImage, match=r"missing\.jpg cannot be read: No such file"):
        clip.embed_images([*pictures[:3], missing], batch_size=2)
    several = [pictures[0], missing, b"", pictures[1], torch.rand(3, 8, 8), 7]
    several.append(np.zeros((0, 4, 3), np.uint8))
    torch.testing.assert_close(clip.embed_images(several, errors="skip"), clip.embed_images(pictures[:2]))
    skipped = [record.message.partition(" cannot")[0] for record in caplog.records]
    assert skipped == [f"skipped: {name}" for name in (missing, "image 2", "image 4", "image 5", "image 6")]
    assert "it is torch.float32 values of shape (3, 8, 8); expected" in caplog.text
    caplog.clear()
    texts: list[Any] = ["a star", float("nan"), "a dog"]
    torch.testing.assert_close(clip.embed_texts(texts, errors="skip"), clip.embed_texts(["a star", "a dog"]))
    assert [record.message for record in caplog.records] == ["skipped: text 1 is nan; expected a string"]
    with pytest.raises(TypeError, match="text 1 is nan; expected a string"):
        clip.embed_texts(texts)
    for embed, items in ((clip.embed_images, pictures), (clip.embed_texts, ["a star"])):
        with pytest.raises(ValueError, match="batch_size 0: expected 1 or more"):
            embed(items, batch_size=0)
        with pytest.raises(ValueError, match="errors='skpi': expected 'raise' or 'skip'"):
            embed(items, errors="skpi")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="errors='skpi'"):
        clip.classify(pictures, ["star"], errors="skpi")  # type: ignore[arg-type]


def test_the_scale_is_clamped_and_can_come_down_again(make_clip: MakeClip) -> None:
    clip = make_clip(init_scale=99.0)
    optimizer = torch.optim.SGD([clip.logit_scale], lr=1.0)
    (-clip.scale).backward()
    optimizer.step()
    assert clip.scale > 100
    clip.clamp_scale()
    assert clip.scale.item() == pytest.approx(100, rel=1e-6)
    optimizer.zero_grad()
    image = torch.nn.functional.normalize(torch.randn(8, 4), dim=-1)
    info_nce(image, image.flip(0), clip.scale).backward()  # all wrong: a lower scale is better
    assert clip.logit_scale.grad is not None and clip.logit_scale.grad > 0
    optimizer.step()
    clip.clamp_scale()
    assert clip.scale < 99


def test_the_residual_head_by_hand() -> None:
    torch.manual_seed(0)
    head, features = ResidualMLPHead(6, 4, 0.5).eval(), torch.randn(3, 6)
    first = features @ head.projection.weight.T + head.projection.bias
    second = nn.functional.gelu(first) @ head.hidden.weight.T + head.hidden.bias
    total = first + second
    variance = total.var(1, unbiased=False, keepdim=True)
    expected = (total - total.mean(1, keepdim=True)) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("image", "options"),
    [
        ("random:test_resnet", {}),
        ("random:test_vit@cls", {"head": "mlp", "dropout": 0.2}),
        ("random:test_efficientnet", {"init_bias": -10.0, "init_scale": 10.0}),
    ],
)
def test_a_bundle_gives_the_same_embeddings(
    make_clip: MakeClip, tmp_path: Path, pictures: list[Path], image: str, options: dict[str, float]
) -> None:
    clip = make_clip(image=image, **options)
    for tensor in clip.state_dict().values():  # no fresh initialisation looks like this
        if tensor.is_floating_point():
            tensor.mul_(1.01).add_(0.001)
    clip.embed_texts(TEXTS)
    folder = clip.save_pretrained(tmp_path / "model")
    again = CLIP.from_pretrained(folder)
    assert not again.training
    assert torch.equal(again.embed_images(pictures), clip.embed_images(pictures))
    assert torch.equal(again.embed_texts(TEXTS), clip.embed_texts(TEXTS))
    assert torch.equal(again.scale, clip.scale)
    assert (again.logit_bias is None) == ("init_bias" not in options)
    assert again.config() == clip.config()
    assert again.transform == clip.transform
    assert again.tokenize.digest() == clip.tokenize.digest()
    once_more = CLIP.from_pretrained(again.save_pretrained(tmp_path / "again"))
    assert torch.equal(once_more.embed_texts(TEXTS), clip.embed_texts(TEXTS))
    for name in ("config.json", "README.md", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_text() == (folder / name).read_text()


def test_bundles_need_no_trainer_or_network(bundle: Path, make_clip: MakeClip, pictures: list[Path]) -> None:
    program = """
        import socket, sys
        for name in ("lightning", "pytorch_lightning", "lightning_fabric", "wandb"):
            sys.modules[name] = None
        def refuse(*arguments, **options):
            raise AssertionError("a socket was opened")
        socket.socket.connect = socket.getaddrinfo = refuse
        from clip_lightning import CLIP, info_nce, retrieval_metrics, siglip_loss
        clip = CLIP.from_pretrained(sys.argv[1])
        for embeddings in (clip.embed_images(sys.argv[2:]), clip.embed_texts(["a star"])):
            print(embeddings.double().sum().item())
    """
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    line = [sys.executable, "-c", textwrap.dedent(program), str(bundle), *map(str, pictures)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    clip = make_clip()
    both = clip.embed_images(pictures), clip.embed_texts(["a star"])
    sums = [embeddings.double().sum().item() for embeddings in both]
    assert [float(number) for number in done.stdout.split()] == pytest.approx(sums, rel=1e-6)


def test_a_bundle_is_plain_files(make_clip: MakeClip, tmp_path: Path) -> None:
    metadata = {"metrics": {"text_to_image_R@1": 21.375, "rsum": 240.0}, "loss": "InfoNCE"}
    metadata |= {"license": "apache-2.0", "training_data": {"dataset": "scenes", "digest": "abc"}}
    folder = make_clip().save_pretrained(tmp_path / "model", metadata=metadata)
    assert (folder.stat().st_mode & 0o777) == 0o755
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1, "all can be read by the same people"
    assert files(folder).keys() >= {"model.safetensors", "config.json", "README.md", "tokenizer.json"}
    for name, content in files(folder).items():
        assert Path(name).suffix in (".json", ".md", ".txt", ".safetensors"), name
        with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError)):
            pickle.loads(content)
    config = json.loads((folder / "config.json").read_text(), parse_constant=pytest.fail)
    assert config | metadata == config
    assert config["image_tower"]["name"] == "random:test_vit"
    card = (folder / "README.md").read_text()
    words = "text_to_image_R@1 | 21.38", "InfoNCE", "license: apache-2.0", "scenes", "32×32", "test_vit"
    assert all(word in card for word in words)
    assert "_name_or_path" not in config["text_tower"]["config"], "a folder of this machine"
    assert "library_name: clip-lightning" in card.split("---")[1]


@pytest.mark.parametrize(
    "head", ["linear", "mlp", {"image": "affine", "text": "linear"}, {"image": "gelu", "text": "affine"}]
)
def test_short_embeddings_are_normalized_prefixes(
    make_clip: MakeClip, tmp_path: Path, pictures: list[Path], head: Any
) -> None:
    clip = make_clip(head=head)
    clip.metadata = {"metrics": {"rsum": 400.0, "dims4_rsum": 300.0}, "matryoshka": [2, 4, 8], "loss": "mine"}
    long, short = clip.eval(), clip.with_dims(4)
    for before, after in (
        (long.embed_images(pictures), short.embed_images(pictures)),
        (long.embed_texts(TEXTS), short.embed_texts(TEXTS)),
    ):
        assert before.shape[1] == 16
        torch.testing.assert_close(after, before[:, :4] / before[:, :4].norm(dim=1, keepdim=True))
    assert short.metadata == {"metrics": {"rsum": 300.0}, "matryoshka": [2], "loss": "mine"}
    assert long.with_dims(16) is long and short.config() == {**long.config(), "embed_dim": 4}
    assert short.with_dims(4) is short and clip.with_dims(6).metadata["metrics"] == {}
    for wrong in (0, 5):
        with pytest.raises(UserError, match=f"--dims {wrong}: expected a number from 1 to 4"):
            short.with_dims(wrong)
    if "mlp" in head or "gelu" in str(head):
        with pytest.raises(UserError, match="--dims 4: expected a model with linear heads"):
            short.save_pretrained(tmp_path / "short")
        return
    again = CLIP.from_pretrained(short.save_pretrained(tmp_path / "short", metadata=short.metadata))
    assert again.heads["image"][1].weight.shape[0] == 4 and model_identity(again) == model_identity(short)
    assert torch.equal(again.embed_texts(TEXTS), short.embed_texts(TEXTS))
    assert again.metadata == short.metadata
    assert "; also trained at 2 dimensions |" in (tmp_path / "short" / "README.md").read_text()


def test_given_weights_are_written(make_clip: MakeClip, tmp_path: Path, pictures: list[Path]) -> None:
    clip = make_clip()
    best = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    expected = clip.embed_images(pictures)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(1)
    again = CLIP.from_pretrained(clip.save_pretrained(tmp_path / "model", weights=best))
    assert torch.equal(again.embed_images(pictures), expected)
    assert not torch.equal(clip.embed_images(pictures), expected)
    del best["logit_scale"]
    with pytest.raises(ValueError, match="logit_scale"):
        clip.save_pretrained(tmp_path / "other", weights=best)
    assert not (tmp_path / "other").exists()


def edit(bundle: Path, part: str | None, **values: Any) -> None:
    config = json.loads((bundle / "config.json").read_text())
    (config if part is None else config[part]).update(values)
    (bundle / "config.json").write_text(json.dumps(config))


def cut(file: Path, fraction: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(fraction * len(content))])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def forget_the_tokenizer(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    edit(bundle, None, tokenizer_files=[])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: (b / "added_tokens.json").write_text('{"red": 3}'), "the tokenizer is not the one"),
        (lambda b: (b / "tokenizer.json").unlink(), r"No such file .*tokenizer\.json"),
        (forget_the_tokenizer, "the tokenizer is not the one"),
        (lambda b: edit(b, "transform", mean=[0, 0, 0]), "the transform is not the one"),
        (lambda b: edit(b, "transform", size=[48, 48]), "the transform is not the one"),
        (lambda b: edit(b, "text_tower", max_length=5), "the tokenizer is not the one"),
        (lambda b: edit(b, None, format=2), "upgrade clip-lightning"),
        # no memory is taken for what only the configuration describes
        (lambda b: edit(b, None, embed_dim=10**12), "size mismatch .*get the complete model"),
        (lambda b: edit(b, "text_tower", config=huge(b)), "size mismatch .*get the complete model"),
        (lambda b: (b / "config.json").unlink(), "is not a clip-lightning bundle"),
        (lambda b: (b / "model.safetensors").unlink(), r"cannot be loaded .*model\.safetensors"),
        (lambda b: cut(b / "config.json", 0), "cannot be loaded"),
        (lambda b: cut(b / "config.json", 0.5), "cannot be loaded"),
        (lambda b: cut(b / "model.safetensors", 0), "cannot be loaded"),
        (lambda b: flip_a_bit(b / "model.safetensors"), "its weights do not match their checksum"),
    ],
)
def test_a_changed_bundle_is_refused(bundle: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(bundle)
    with pytest.raises(UserError, match=message):
        CLIP.from_pretrained(bundle)


def huge(bundle: Path) -> dict[str, object]:
    """The text tower's configuration with layers of a trillion."""
    config = json.loads((bundle / "config.json").read_text())
    return config["text_tower"]["config"] | {"intermediate_size": 10**12}


def test_what_a_bundle_may_carry_besides(bundle: Path) -> None:
    (bundle / "onnx").mkdir()
    names = ("README.md", ".gitattributes", "onnx/image.onnx", "picture.png", "notes.txt", "LICENSE.txt")
    for name in (*names, "eval_results.json"):
        (bundle / name).write_text("{}")
    CLIP.from_pretrained(bundle)


@pytest.mark.parametrize("step", ["save_file", "_model_card", "os.replace"])
def test_failures_keep_the_old_one(bundle: Path, make_clip: MakeClip, monkeypatch: Patch, step: str) -> None:
    before = files(bundle)
    owner, name = os if step == "os.replace" else bundle_module, step.removeprefix("os.")
    error = OSError("no space left on device")
    # the second replacement fails, when the old one is already out of the way
    effect = [DEFAULT, error, DEFAULT] if owner is os else error
    monkeypatch.setattr(owner, name, Mock(wraps=getattr(owner, name), side_effect=effect))
    with pytest.raises(OSError, match="no space"):
        make_clip(head="mlp").save_pretrained(bundle)
    monkeypatch.undo()
    assert files(bundle) == before
    assert list(bundle.parent.iterdir()) == [bundle], "nothing is left lying about"
    make_clip(head="mlp").save_pretrained(bundle)
    assert CLIP.from_pretrained(bundle).config()["head"] == "mlp"
    assert list(bundle.parent.iterdir()) == [bundle]


def test_nothing_but_a_bundle_is_replaced(make_clip: MakeClip, tmp_path: Path) -> None:
    for name in ("thesis", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    (tmp_path / "notes").write_text("more")
    clip = make_clip()
    for name in ("thesis", "notes"):
        with pytest.raises(UserError, match="new or an empty folder"):
            clip.save_pretrained(tmp_path / name)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"
    folder = clip.save_pretrained(tmp_path / "empty")
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    (folder / "added_tokens.json").write_text("{}")  # belongs to a tokenizer, and would spoil the new one
    CLIP.from_pretrained(clip.save_pretrained(folder))
    assert (folder / "notes" / "mine.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))


class Pixels(nn.Module):
    """An image tower of somebody's own."""

    width = 12

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, self.width)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        assert pixel_values.dtype == torch.float32 and 0 <= pixel_values.min() <= pixel_values.max() <= 1
        return self.layer(pixel_values.mean((2, 3)))


class Words(nn.Module):
    """A text tower of somebody's own."""

    width = 8

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer, self.table = tokenizer, nn.Embedding(len(tokenizer), self.width)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return (self.table(input_ids) * attention_mask[..., None]).sum(1)


def test_named_and_own_towers(make_clip: MakeClip, bert: Path, pictures: list[Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    named = CLIP.from_towers("random:test_vit", f"random:{bert}", image_size=32, embed_dim=16)
    assert torch.equal(named.embed_texts(TEXTS), make_clip().embed_texts(TEXTS))
    assert repr(named).startswith("CLIP(image_tower='random:test_vit', text_tower='random:")
    assert len(repr(named)) < 300 and (named.device, named.dtype) == (torch.device("cpu"), torch.float32)

    own = CLIP.from_towers(Pixels(), Words(named.tokenize.tokenizer), image_size=48, embed_dim=16)
    assert own.embed_images(pictures).shape == (5, 16) and own.embed_texts(TEXTS).shape == (4, 16)
    assert own.transform.size == (48, 48)
    pixels = torch.stack([own.transform(path) for path in pictures])
    image, text = own.train()(pixels, **own.tokenize(TEXTS))
    torch.testing.assert_close(image, own.embed_images(pictures))
    torch.testing.assert_close(text, own.embed_texts(TEXTS))
    (image.sum() + text.sum()).backward()
    assert all(p.grad is not None for name, p in own.named_parameters() if "logit" not in name)
    folder = own.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"a tower of .* is a custom module"):
        CLIP.from_pretrained(folder)

    with pytest.raises(UserError, match="image_tower Linear: expected the name of a tower, or a module"):
        CLIP.from_towers(nn.Linear(3, 3), f"random:{bert}")
    with pytest.raises(UserError, match="text_tower Linear: expected a module with a `width`"):
        CLIP.from_towers(Pixels(), nn.Linear(3, 3))
    with pytest.raises(TypeError, match="'random:test_vit' is not a tower"):
        CLIP("random:test_vit", "random:bert")  # type: ignore[arg-type]
    for options in ({"embed_dim": 0}, {"dropout": 1.0}, {"dropout": -0.1}):
        with pytest.raises(UserError, match=r"embed_dim .* and dropout .*: expected"):
            make_clip(**options)


@pytest.mark.parametrize("options", [{}, {"init_bias": -10.0, "init_scale": 10.0}])
def test_classifying_by_hand(make_clip: MakeClip, pictures: list[Path], options: dict[str, float]) -> None:
    clip = make_clip(**options)
    images, texts = clip.embed_images(pictures), clip.embed_texts(["a photo of a star.", "a photo of a dog."])
    logits = clip.scale.item() * images @ texts.T + options.get("init_bias", 0.0)
    expected = logits.sigmoid() if options else logits.softmax(1)
    torch.testing.assert_close(clip.classify(pictures, ["star", "dog"]), expected)
    classes = clip.zero_shot_classifier(labels=["star", "dog"], templates="{}")
    torch.testing.assert_close(classes, clip.embed_texts(["star", "dog"]))
    assert clip.classify([*pictures, b""], classes, errors="skip").shape == (5, 2)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.99])
def test_dropout_is_that_of_torch_in_distribution(p: float) -> None:
    dropout, values = Dropout(p), torch.ones(1000, 1003)
    dropped = dropout(values)
    kept = dropped[dropped != 0]
    assert (dropped == 0).float().mean().item() == pytest.approx(p, abs=0.002)
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=2e-3, atol=0)
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    assert (dropout(values) != dropped).any()
    assert torch.equal(dropout.eval()(values), values)
