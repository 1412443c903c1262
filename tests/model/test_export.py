"""What is exported gives the same embeddings in the programs that it is for, or is refused and not there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig

from clip_lightning.__main__ import main
from clip_lightning.commands.export import run
from clip_lightning.data.scenes import draw
from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP
from clip_lightning.model.export import onnx as onnx_towers
from clip_lightning.model.export import open_clip as open_clip_folder

Printed = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
MakeClip = Callable[..., CLIP]
SENTENCES = ["a red circle", "two blue squares, a star", "a", "a green cross " * 40]
EXACT = 1e-4


def bundle(clip: CLIP, tmp_path: Path) -> Path:
    """The bundle of a model whose scale is not the one that every model starts with."""
    with torch.no_grad():
        clip.logit_scale.fill_(3.25)
        if clip.logit_bias is not None:
            clip.logit_bias.fill_(-7.5)
    return clip.save_pretrained(tmp_path / "model", metadata={"metrics": {"rsum": 12.5}, "license": "mit"})


def assert_nothing_left(folder: Path, *expected: str) -> None:
    assert {path.name for path in folder.iterdir()} == set(expected)


# a run of ours


@pytest.fixture(scope="module")
def trained(command: Callable[..., list[str]], bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose text tower was frozen and whose image tower was trained."""
    root = tmp_path_factory.mktemp("runs")
    options = {"model__text_tower": bert, "model__freeze": "text", "model__matryoshka": "[8,4]"}
    options |= {"data__cache": "off"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["clip-lightning"])
        assert main(command("fit", root, **options)) == 0
    (run_folder,) = root.iterdir()
    return run_folder


def test_a_checkpoint_becomes_the_bundle_of_its_run(trained: Path, tmp_path: Path, printed: Any) -> None:
    answer = printed(
        "export", trained / "checkpoints" / "best.ckpt", "--to", "bundle", "--out", tmp_path / "b"
    )
    assert answer == {"to": "bundle", "out": str(tmp_path / "b"), "max_difference": None}
    for name in ("config.json", "README.md"):
        assert (tmp_path / "b" / name).read_text() == (trained / "model" / name).read_text()
    own, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "b", trained / "model"))
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    of_run = CLIP.from_pretrained(trained)
    assert not of_run.training
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in of_run.state_dict().items())
    last = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    of_last = CLIP.from_pretrained(trained / "checkpoints" / "last.ckpt")
    assert torch.equal(of_last.heads["image"][1].weight, last["clip.heads.image.1.weight"])


def test_a_short_bundle_tells_what_it_costs(
    trained: Path, tmp_path: Path, capsys: Printed, printed: Any
) -> None:
    all_of = CLIP.from_pretrained(trained)
    metrics = all_of.metadata["metrics"]
    assert all_of.metadata["matryoshka"] == [4, 8]
    run(["export", str(trained), "--to", "bundle", "--out", str(tmp_path / "short"), "--dims", "4"])
    said = f"4 of 16 dimensions: rsum {metrics['dims4_rsum']:.1f} instead of {metrics['rsum']:.1f}"
    assert said in capsys.readouterr().err
    short = CLIP.from_pretrained(tmp_path / "short")
    assert short.metadata["metrics"]["rsum"] == metrics["dims4_rsum"]
    long = all_of.embed_texts(SENTENCES)[:, :4]
    torch.testing.assert_close(short.embed_texts(SENTENCES), long / long.norm(dim=1, keepdim=True))
    run(["export", str(trained), "--to", "bundle", "--out", str(tmp_path / "other"), "--dims", "5"])
    assert "dimensions" not in capsys.readouterr().err  # nobody measured it
    for to in ("onnx", "open_clip"):
        printed("export", trained, "--to", to, "--out", tmp_path / to, "--dims", 4)  # checks the embeddings
    assert json.loads((tmp_path / "onnx" / "config.json").read_text())["embed_dim"] == 4


def test_a_checkpoint_that_does_not_belong_is_refused(trained: Path, tmp_path: Path) -> None:
    run_folder = shutil.copytree(trained, tmp_path / "run")
    best, moved = run_folder / "checkpoints" / "best.ckpt", tmp_path / "moved.ckpt"

    def refused(message: str, place: Path = best) -> None:
        with pytest.raises(UserError, match=message) as raised:
            CLIP.from_pretrained(place)
        assert "\n" not in str(raised.value)

    content = torch.load(best, weights_only=True)
    torch.save(content, moved)
    assert CLIP.from_pretrained(moved).metadata["loss"] == "InfoNCE"
    options = content.pop("hyper_parameters")["model"]
    torch.save(content, moved)
    refused(r"cannot be loaded .*config\.yaml", moved)
    content["hyper_parameters"] = {"model": options | {"heads": options["heads"] | {"embed_dim": 8}}}
    torch.save(content, moved)
    refused("size mismatch", moved)
    content["hyper_parameters"] = {"model": options}
    content["frozen_towers"]["clip.text_tower"] = "0" * 64
    torch.save(content, best)
    refused("another frozen text_tower")
    best.write_text("no checkpoint")
    refused(r"best\.ckpt is not a checkpoint of .* or is damaged")
    shutil.rmtree(run_folder / "model")
    shutil.rmtree(run_folder / "checkpoints")
    refused("has neither model nor a checkpoint", run_folder)


# ONNX


@pytest.mark.parametrize(
    ("image", "pooling", "options"),
    [
        ("random:test_vit", "mean", {}),
        ("random:test_resnet", "last", {"head": "mlp", "init_bias": -10.0}),
    ],
    ids=["vit", "resnet"],
)
def test_onnx_gives_the_same_embeddings(
    make_clip: MakeClip, bert: Path, tmp_path: Path, printed: Any, image: str, pooling: str, options: Any
) -> None:
    clip = make_clip(image, f"random:{bert}@{pooling}", **options)
    answer = printed("export", bundle(clip, tmp_path), "--to", "onnx", "--out", tmp_path / "onnx")
    assert answer["max_difference"] <= EXACT
    assert_nothing_left(tmp_path / "onnx", "image.onnx", "text.onnx", "tokenizer.json", "config.json")
    clip = CLIP.from_pretrained(tmp_path / "model")

    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "image.onnx")
    for count in (1, 2, 7, 33):
        pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
        (found,) = session.run(None, {"pixel_values": pixels.numpy()})
        assert found.dtype == np.float32 and found.shape == (count, 16)
        assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
        with torch.inference_mode():
            np.testing.assert_allclose(found, clip.encode_image(pixels), atol=EXACT)
    logits = session.get_modelmeta().custom_metadata_map
    assert float(logits["scale"]) == pytest.approx(np.exp(3.25))
    assert ("bias" in logits) == ("init_bias" in options)

    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "text.onnx")
    tokenizer = Tokenizer.from_file(str(tmp_path / "onnx" / "tokenizer.json"))
    for texts in (SENTENCES, SENTENCES[:1], SENTENCES * 30):  # more than the tower takes in one group
        encoded = tokenizer.encode_batch(texts)
        ids = np.array([each.ids for each in encoded])
        mask = np.array([each.attention_mask for each in encoded])
        (found,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
        np.testing.assert_allclose(found, clip.embed_texts(texts), atol=EXACT)

    config = json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert config["transform"] == clip.transform.as_dict()
    assert config["scale"] == pytest.approx(np.exp(3.25))
    assert config["license"] == "mit"


def test_inexact_onnx_is_refused(make_clip: MakeClip, tmp_path: Path, monkeypatch: Patch) -> None:
    model = bundle(make_clip("random:test_resnet"), tmp_path)
    words = ["export", str(model), "--to", "onnx", "--out", str(tmp_path / "onnx")]
    monkeypatch.setattr(onnx_towers, "TOLERANCE", 0.0)
    with pytest.raises(UserError, match=r"image\.onnx differs from PyTorch by .*, more than 0\.0"):
        run(words)
    assert_nothing_left(tmp_path, "model")
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install onnx onnxscript onnxruntime"):
        run(words)
    assert_nothing_left(tmp_path, "model")


# open_clip


@pytest.mark.parametrize(
    ("pooling", "options"), [("mean", {}), ("cls", {"init_bias": -10.0}), ("pooler", {})]
)
def test_open_clip_gives_the_same_embeddings(
    make_clip: MakeClip, bert: Path, tmp_path: Path, capsys: Printed, pooling: str, options: dict[str, Any]
) -> None:
    clip = make_clip("random:test_resnet", f"random:{bert}@{pooling}", **options)
    out = tmp_path / "open clip"
    run(["export", str(bundle(clip, tmp_path)), "--to", "open_clip", "--out", str(out), "--json=true"])
    stdout, stderr = capsys.readouterr()
    assert "if you move it, set hf_model_name" in stderr
    answer = json.loads(stdout)
    assert answer["max_difference"] <= EXACT
    clip = CLIP.from_pretrained(tmp_path / "model")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    model.eval()
    tokenize = open_clip.get_tokenizer(f"local-dir:{out}")
    draw(0, 1, 48).resize((90, 48)).save(tmp_path / "wide.png")
    with torch.inference_mode(), Image.open(tmp_path / "wide.png") as picture:
        texts = model.encode_text(tokenize(SENTENCES), normalize=True)
        torch.testing.assert_close(texts, clip.embed_texts(SENTENCES), atol=EXACT, rtol=0)
        theirs = model.encode_image(preprocess(picture.convert("RGB"))[None], normalize=True)
        ours = clip.embed_images([tmp_path / "wide.png"])
        assert (theirs @ ours.T).item() > 0.999  # Pillow resizes a little differently
    assert model.logit_scale.exp().item() == pytest.approx(clip.scale.item())
    assert (model.logit_bias is None) == (clip.logit_bias is None)
    if clip.logit_bias is not None:
        assert model.logit_bias.item() == -7.5


def test_what_open_clip_cannot_express_is_refused(make_clip: MakeClip, bert: Path, tmp_path: Path) -> None:
    other_text = make_clip("random:test_resnet")
    other_text.text_tower.spec["config"]["model_type"] = "gpt2"
    with pytest.raises(UserError, match="gpt2 pooled by mean"):
        open_clip_folder.write_open_clip(other_text, tmp_path, tmp_path)
    reasons = {
        "mlp heads": make_clip("random:test_resnet", head="mlp"),
        "pooled by last": make_clip("random:test_resnet", f"random:{bert}@last"),
        "builds a tower of this model differently": make_clip("random:test_vit"),
    }
    for reason, clip in reasons.items():
        model = bundle(clip, tmp_path)
        with pytest.raises(UserError) as raised:
            run(["export", str(model), "--to", "open_clip", "--out", str(tmp_path / "out")])
        assert reason in str(raised.value) and "\n" not in str(raised.value)
        assert_nothing_left(tmp_path, "model")


def test_open_clip_finds_a_text_tower_of_the_hub_by_its_name_wherever_the_folder_is(
    make_clip: MakeClip, bert: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    find = AutoConfig.from_pretrained  # the hub, here

    def found(name: str, **options: Any) -> Any:
        return find(bert if name == "me/bert" else name, **options)

    monkeypatch.setattr(AutoConfig, "from_pretrained", found)
    clip = make_clip("random:test_resnet", f"random:{bert}@cls")
    clip.text_tower.spec["name"] = "me/bert@cls"
    run(["export", str(bundle(clip, tmp_path)), "--to", "open_clip", "--out", str(tmp_path / "out")])
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    assert str(tmp_path) not in (moved / "open_clip_config.json").read_text()
    model = open_clip.create_model(f"local-dir:{moved}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{moved}")(SENTENCES)
    with torch.inference_mode():
        texts = model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(texts, clip.embed_texts(SENTENCES), atol=EXACT, rtol=0)


def test_inexact_open_clip_is_refused(make_clip: MakeClip, tmp_path: Path, monkeypatch: Patch) -> None:
    def damaged(state: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        flipped = {"text.proj.weight": state["text.proj.weight"].flip(0).contiguous()}
        save_file(state | flipped, path, metadata)

    model = bundle(make_clip("random:test_resnet"), tmp_path)
    monkeypatch.setattr(open_clip_folder, "save_file", damaged)
    with pytest.raises(UserError, match="open_clip's embeddings differ"):
        run(["export", str(model), "--to", "open_clip", "--out", str(tmp_path / "out")])
    assert_nothing_left(tmp_path, "model")


# the hub


def test_the_hub_gets_the_bundle_and_its_card(
    make_clip: MakeClip, tmp_path: Path, monkeypatch: Patch, printed: Any
) -> None:
    created, kept = {}, tmp_path / "hub"

    def create_repo(_: HfApi, **options: Any) -> SimpleNamespace:
        created.update(options)
        return SimpleNamespace(repo_id=options["repo_id"])

    def upload_folder(_: HfApi, **options: Any) -> str:
        shutil.copytree(options["folder_path"], kept)
        return f"https://hub/{options['repo_id']}/commit/1"

    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    model = bundle(make_clip(), tmp_path)
    answer = printed("export", model, "--to", "hub", "--repo", "me/scenes", "--private", "true")
    assert answer == {"to": "hub", "repo": "me/scenes", "url": "https://hub/me/scenes/commit/1"}
    assert (created["repo_id"], created["private"]) == ("me/scenes", True)
    assert {path.name for path in kept.iterdir()} == {path.name for path in model.iterdir()}
    assert (kept / "config.json").read_text() == (model / "config.json").read_text()
    card = (kept / "README.md").read_text()
    assert 'CLIP.from_pretrained("me/scenes")' in card
    assert "license: mit" in card and "| rsum | 12.50 |" in card
    again, before = CLIP.from_pretrained(kept), CLIP.from_pretrained(model)
    assert torch.equal(again.embed_texts(SENTENCES), before.embed_texts(SENTENCES))

    shutil.rmtree(kept)
    assert make_clip().push_to_hub("me/other") == "https://hub/me/other/commit/1"  # in Python
    assert CLIP.from_pretrained(kept).metadata == {}


def test_a_hub_that_refuses_is_one_line(make_clip: MakeClip, tmp_path: Path, monkeypatch: Patch) -> None:
    model = bundle(make_clip(), tmp_path)
    words = ["export", str(model), "--to", "hub", "--repo", "me/scenes"]
    failed = "the upload to the Hugging Face hub failed"
    with pytest.raises(UserError, match=rf"--repo me/scenes: {failed} .*offline"):
        run(words)
    with pytest.raises(UserError, match=failed):
        run([*words[:-1], "no such/name/at all"])


# words


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["MODEL", "--to", "onnx"], "give --out FOLDER"),
        (["MODEL", "--to", "bundle", "--out", "new", "--repo", "a/b"], "omit --repo"),
        (["MODEL", "--to", "hub", "--repo", "a/b", "--out", "new"], "omit --out"),
        (["MODEL", "--to", "onnx", "--out", "full"], "already exists"),
        (["MODEL", "--to", "bundle", "--out", "full"], "something other than a bundle"),
        (["MODEL", "--to", "onnx", "--out", "full/mine/new"], "cannot be written"),
        (["MODEL", "--to", "bundle", "--out", "full/mine/new"], "cannot be written"),
        (["MODEL", "--to", "bundle", "--out", "new", "--dims", "17"], "expected a number from 1 to 16"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], expected: str, make_clip: MakeClip, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    model = bundle(make_clip(), tmp_path)
    with pytest.raises(UserError) as raised:
        run(["export", *(str(model) if word == "MODEL" else word for word in words)])
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)
    assert_nothing_left(tmp_path, "full", "model")
