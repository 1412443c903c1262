"""Files that version 0.1.0 wrote still mean the same: a bundle, a checkpoint, cached features."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clip_lightning.__main__ import main
from clip_lightning.data.features import FeatureCache
from clip_lightning.model.clip import CLIP

ARCHIVE = Path(__file__).resolve().parents[1] / "fixtures" / "written-by-0.1.tar.xz"


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The unpacked archive, as the working directory: names in the files are relative to it."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "written-by-0.1"
    monkeypatch.chdir(folder)
    return folder


def test_a_bundle_gives_the_same_embeddings(written: Path) -> None:
    expected = json.loads((written / "expected.json").read_text())
    clip = CLIP.from_pretrained("bundle")
    texts = clip.embed_texts(["a red circle on a blue background", "two squares"])
    images = clip.embed_images(["scenes/00000.jpg", "scenes/00001.jpg"])
    torch.testing.assert_close(torch.as_tensor(texts), torch.tensor(expected["texts"]), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.as_tensor(images), torch.tensor(expected["images"]), atol=1e-4, rtol=0)


def test_a_stopped_run_resumes_to_the_same_weights(written: Path, command: Callable[..., list[str]]) -> None:
    expected = json.loads((written / "expected.json").read_text())
    cache = FeatureCache(written / "cache", 1e9)
    texts = {entry.path for entry in cache.entries() if entry.key["kind"] == "text"}
    assert len(texts) == 2
    options = {f"model__{name}": ... for name in ("image_tower", "text_tower", "heads__embed_dim")}
    options |= {"model__init_from": "bundle", "data__root": "scenes", "data__cache": "cache"}
    assert main(command("fit", Path("runs"), **options, trainer__max_epochs=4, ckpt_path="last")) == 0

    # image features are keyed by the absolute path of their file, which is another one here
    assert {entry.path for entry in cache.entries() if entry.key["kind"] == "text"} == texts
    checkpoint = torch.load("runs/interrupted/checkpoints/last.ckpt", weights_only=True)
    norms = {name: value.double().norm().item() for name, value in checkpoint["state_dict"].items()}
    assert norms == pytest.approx(expected["norms_after_resume"], abs=1e-5)
    metrics = json.loads(Path("runs/interrupted/metrics.json").read_text())
    then = expected["metrics_after_resume"]
    assert {name: metrics[name] for name in then} == pytest.approx(then)


def test_a_checkpoint_is_exported_by_the_configuration_of_its_run(written: Path) -> None:
    file = written / "runs" / "interrupted" / "checkpoints" / "last.ckpt"
    weights = torch.load(file, weights_only=True)["state_dict"]
    exported = CLIP.from_pretrained(file).state_dict()
    assert weights
    assert all(torch.equal(exported[name.removeprefix("clip.")], weights[name]) for name in weights)
