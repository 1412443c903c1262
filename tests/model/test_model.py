"""The model and its bundle: what is saved comes back bit for bit, and nothing else is taken for it."""

from __future__ import annotations

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

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import clip_lightning.files as files_module
import clip_lightning.model.bundle as bundle_module
from clip_lightning.data.images import BrokenImage, decode_image
from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP, ResidualMLPHead
from clip_lightning.training.losses import info_nce

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
def test_embeddings_have_unit_length(make_clip: MakeClip, pictures: list[Path], head: str) -> None:
    clip = make_clip(head=head)
    for embeddings, count in ((clip.embed_images(pictures), 5), (clip.embed_texts(TEXTS), 4)):
        assert embeddings.shape == (count, 16)
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(count), rtol=1e-5, atol=0)
    assert clip.embed_images([]).shape == clip.embed_texts([]).shape == (0, 16)


def test_embeddings_do_not_depend_on_the_batch(make_clip: MakeClip, pictures: list[Path]) -> None:
    clip = make_clip(image="random:test_resnet", dropout=0.5).train()
    torch.testing.assert_close(clip.embed_images(pictures, batch_size=2), clip.embed_images(pictures))
    torch.testing.assert_close(clip.embed_texts(TEXTS, batch_size=1), clip.embed_texts(TEXTS))


def test_embeddings_stay_fp32_in_autocast(make_clip: MakeClip) -> None:
    clip = make_clip()
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = clip.encode_text(**clip.tokenize(TEXTS))
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(4), rtol=1e-5, atol=0)


def test_a_single_text_is_one_item(make_clip: MakeClip) -> None:
    clip = make_clip()
    assert torch.equal(clip.embed_texts("a star"), clip.embed_texts(["a star"]))
    assert torch.equal(clip.embed_texts(text for text in TEXTS), clip.embed_texts(TEXTS))
    assert clip.tokenize("a star")["input_ids"].shape[0] == 1
    with pytest.raises(TypeError, match="text 1 is nan; expected a string"):
        clip.embed_texts(["a star", float("nan")])


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


def test_an_image_that_cannot_be_read_is_named_or_skipped(
    make_clip: MakeClip, pictures: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clip, missing = make_clip(), tmp_path / "missing.jpg"
    with pytest.raises(BrokenImage, match=r"image 3, .*missing\.jpg cannot be read: No such file"):
        clip.embed_images([*pictures[:3], missing], batch_size=2)
    several = [pictures[0], missing, b"", pictures[1], torch.rand(3, 8, 8), 7]
    torch.testing.assert_close(clip.embed_images(several, errors="skip"), clip.embed_images(pictures[:2]))
    assert [record.message.partition(": ")[0] for record in caplog.records] == [
        f"skipped image 1, {missing}",
        "skipped image 2",
        "skipped image 4",
        "skipped image 5",
    ]
    assert "it is torch.float32 values of shape (3, 8, 8); expected" in caplog.text
    with pytest.raises(ValueError, match="errors='raise' or 'skip'"):
        clip.embed_images(pictures, errors="ignore")


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
    expected = (total - total.mean(1, keepdim=True)) / (
        total.var(1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
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


def test_a_bundle_needs_no_trainer_and_no_network(
    bundle: Path, make_clip: MakeClip, pictures: list[Path]
) -> None:
    program = """
        import socket, sys
        for name in ("lightning", "pytorch_lightning", "lightning_fabric", "wandb"):
            sys.modules[name] = None
        def refuse(*arguments, **options):
            raise AssertionError("a socket was opened")
        socket.socket.connect = socket.getaddrinfo = refuse
        from clip_lightning.model.clip import CLIP
        clip = CLIP.from_pretrained(sys.argv[1])
        for embeddings in (clip.embed_images(sys.argv[2:]), clip.embed_texts(["a star"])):
            print(embeddings.double().sum().item())
    """
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(bundle), *map(str, pictures)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    clip = make_clip()
    sums = [
        clip.embed_images(pictures).double().sum().item(),
        clip.embed_texts(["a star"]).double().sum().item(),
    ]
    assert [float(number) for number in done.stdout.split()] == pytest.approx(sums, rel=1e-6)


def test_a_bundle_is_plain_files(make_clip: MakeClip, tmp_path: Path) -> None:
    metadata = {
        "metrics": {"text_to_image_R@1": 21.375, "rsum": 240.0},
        "loss": "InfoNCE",
        "license": "apache-2.0",
        "training_data": {"dataset": "scenes", "digest": "abc"},
    }
    folder = make_clip().save_pretrained(tmp_path / "model", metadata=metadata)
    assert (folder.stat().st_mode & 0o777) == 0o755
    names = set(files(folder))
    assert names >= {"model.safetensors", "config.json", "README.md", "tokenizer.json"}
    for name, content in files(folder).items():
        assert Path(name).suffix in (".json", ".md", ".txt", ".safetensors"), name
        with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError)):
            pickle.loads(content)
    config = json.loads((folder / "config.json").read_text(), parse_constant=pytest.fail)
    assert config | metadata == config
    assert config["image_tower"]["name"] == "random:test_vit"
    card = (folder / "README.md").read_text()
    for word in (
        "text_to_image_R@1 | 21.38",
        "InfoNCE",
        "license: apache-2.0",
        "scenes",
        "32×32",
        "test_vit",
    ):
        assert word in card
    assert "_name_or_path" not in config["text_tower"]["config"], "a folder of this machine"
    head = card.split("---")[1]
    assert "library_name: clip-lightning" in head


def test_given_weights_are_written_in_place_of_the_present_ones(
    make_clip: MakeClip, tmp_path: Path, pictures: list[Path]
) -> None:
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


def test_a_tokenizer_of_other_words_is_refused(bundle: Path) -> None:
    file = bundle / "tokenizer.json"
    file.write_text(file.read_text().replace('"red"', '"der"'))
    with pytest.raises(UserError, match="its tokenizer is not the one"):
        CLIP.from_pretrained(bundle)


def test_a_tokenizer_that_got_another_file_is_refused(bundle: Path) -> None:
    (bundle / "added_tokens.json").write_text('{"red": 3}')
    with pytest.raises(UserError, match="its tokenizer is not the one"):
        CLIP.from_pretrained(bundle)


def test_a_tokenizer_that_lost_a_file_is_refused(bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    assert "tokenizer.json" in config["tokenizer_files"]
    (bundle / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"lacks its tokenizer's file tokenizer\.json"):
        CLIP.from_pretrained(bundle)
    config["tokenizer_files"].remove("tokenizer.json")
    (bundle / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="its tokenizer is not the one"):
        CLIP.from_pretrained(bundle)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("transform", {"mean": [0, 0, 0]}),
        ("transform", {"size": [48, 48]}),
        ("transform", {"interpolation": "nearest"}),
        ("tokenizer", {"max_length": 5}),
    ],
)
def test_an_edited_configuration_is_refused(bundle: Path, part: str, change: dict[str, object]) -> None:
    config = json.loads((bundle / "config.json").read_text())
    config["transform" if part == "transform" else "text_tower"] |= change
    (bundle / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"its {part} is not the one"):
        CLIP.from_pretrained(bundle)


def test_what_a_bundle_may_carry_besides(bundle: Path) -> None:
    (bundle / "README.md").write_text("my own words")
    (bundle / ".gitattributes").write_text("*.safetensors filter=lfs")
    (bundle / "onnx").mkdir()
    (bundle / "onnx" / "image.onnx").write_bytes(b"1")
    (bundle / "picture.png").write_bytes(b"1")
    for name in ("notes.txt", "eval_results.json", "LICENSE.txt"):
        (bundle / name).write_text("{}")
    CLIP.from_pretrained(bundle)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(UserError, match="no clip-lightning bundle"):
        CLIP.from_pretrained(bundle)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_a_truncated_file(bundle: Path, name: str, share: float) -> None:
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="damaged"):
        CLIP.from_pretrained(bundle)


def test_a_later_format(bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps(config | {"format": 2}))
    with pytest.raises(UserError, match="upgrade clip-lightning"):
        CLIP.from_pretrained(bundle)


@pytest.mark.parametrize("name", ["nobody/nothing", "no/such/folder", "nothing", "a b"])
def test_no_bundle_there(name: str) -> None:
    with pytest.raises(UserError, match="no such folder"):
        CLIP.from_pretrained(name)


@pytest.mark.parametrize("step", ["save_file", "model_card", "_replace_folder", "os.replace"])
def test_a_failure_leaves_the_old_bundle_whole(
    bundle: Path, make_clip: MakeClip, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = files(bundle)
    replace, calls = os.replace, []

    def fail(*arguments: object, **options: object) -> None:
        calls.append(arguments)
        if step == "os.replace" and len(calls) != 2:  # the old one is already out of the way
            return replace(*arguments)  # type: ignore[arg-type]
        raise OSError("no space left on device")

    owner = {"os.replace": os, "_replace_folder": files_module}.get(step, bundle_module)
    name = step.removeprefix("os.")
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match="no space"):
        make_clip(head="mlp").save_pretrained(bundle)
    monkeypatch.undo()
    assert files(bundle) == before
    assert list(bundle.parent.iterdir()) == [bundle], "nothing is left lying about"
    make_clip(head="mlp").save_pretrained(bundle)
    assert CLIP.from_pretrained(bundle).config()["head"] == "mlp"
    assert list(bundle.parent.iterdir()) == [bundle]


def test_nothing_but_a_bundle_is_replaced(make_clip: MakeClip, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    (tmp_path / "notes").write_text("more")
    (tmp_path / "empty").mkdir()
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


def test_a_relative_folder(make_clip: MakeClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_clip().save_pretrained("deep/model")
    CLIP.from_pretrained("deep/model")


@pytest.mark.parametrize("options", [{"embed_dim": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_impossible_heads(make_clip: MakeClip, options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"--model\.embed_dim"):
        make_clip(**options)


@pytest.mark.parametrize("which", ["none", "image", "text", "both"])
def test_freezing(make_clip: MakeClip, which: str) -> None:
    clip = make_clip()
    clip.freeze(which)  # type: ignore[arg-type]
    clip.train()
    for name, tower in (("image", clip.image_tower), ("text", clip.text_tower)):
        frozen = which in (name, "both")
        assert tower.training != frozen
        assert all(p.requires_grad != frozen for p in tower.parameters())
    assert all(p.requires_grad for p in (*clip.heads.parameters(), clip.logit_scale))


def test_a_flipped_bit_in_the_weights_is_found(make_clip: MakeClip, tmp_path: Path) -> None:
    file = make_clip().save_pretrained(tmp_path / "model") / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="its weights do not match their checksum"):
        CLIP.from_pretrained(tmp_path / "model")


def test_no_memory_is_taken_for_what_only_the_configuration_describes(
    make_clip: MakeClip, tmp_path: Path
) -> None:
    folder = make_clip().save_pretrained(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for change in ({"embed_dim": 10**12}, {"text_tower": config["text_tower"] | {"config": huge(config)}}):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=r"is \(\d+.* in config.json, \(.*get it whole again"):
            CLIP.from_pretrained(folder)


def huge(config: dict[str, dict[str, dict[str, object]]]) -> dict[str, object]:
    """The text tower's configuration with layers of a trillion."""
    return {**config["text_tower"]["config"], "intermediate_size": 10**12}
