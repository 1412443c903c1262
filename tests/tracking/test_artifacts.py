"""Data and models as artifacts, through the real SDK: between machines, online, offline and synced later."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
from processes import clip_lightning
from test_lineage import sync
from wandb_server import API_KEY, WandbServer

from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP
from clip_lightning.run_folder import RunFolder
from clip_lightning.tracking.artifacts import log_model, why_not_best
from clip_lightning.wandb_fetch import ArtifactName, fetch, fetched

Fit = Callable[..., Path]
Patch = pytest.MonkeyPatch
DATA = "tester/clip-lightning/scenes"


def run_command(*words: object, cache: Path, **environment: str) -> str:
    """The command in a process of its own, on a machine with this cache folder."""
    done = clip_lightning(*words, XDG_CACHE_HOME=str(cache), **environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def fit(command: Callable[..., list[str]], tmp_path: Path) -> Fit:
    """Trains a small model with W&B; gives the run's folder."""

    def train(root: str, *more: str, **environment: str) -> Path:
        options = {"data__root": root, "data__batch_size": 8, "trainer__logger": ...}
        options |= {"trainer__max_epochs": 1, "trainer__log_every_n_steps": 1}
        words = command("fit", tmp_path / "runs", **options)
        run_command(*words, *more, cache=tmp_path / "trainer", **environment)
        (folder,) = (tmp_path / "runs").iterdir()
        return folder

    return train


@pytest.fixture
def uploaded(wandb_server: WandbServer, scenes: Path, tmp_path: Path) -> str:
    """The scenes as an artifact: the name of its version."""
    words = ("data", "upload", scenes, "--artifact=scenes", "--json")
    said = run_command(*words, cache=tmp_path / "uploader")
    answer = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert (answer["artifact"], answer["images"], answer["captions"]) == (f"{DATA}:v0", 40, 200)
    return str(answer["artifact"])


@pytest.mark.slow
def test_from_data_to_a_model_on_another_machine(
    wandb_server: WandbServer, uploaded: str, scenes: Path, fit: Fit, tmp_path: Path, monkeypatch: Patch
) -> None:
    labels = ["--trainer.logger.group=g", "--trainer.logger.tags=[a, b]", "--trainer.logger.notes=why so"]
    run = fit(f"wandb:{DATA}:latest", *labels)

    online = wandb_server.runs["tester", "clip-lightning", run.name]
    assert (online.group, online.tags, online.notes, online.job_type) == ("g", ["a", "b"], "why so", "train")
    assert online.config["data_artifact"] == uploaded
    assert online.alerts == []
    # lineage: data → run → model
    data = wandb_server.artifact(uploaded)
    assert data.used_by == [online.key]
    model = wandb_server.artifact(f"tester/clip-lightning/model-{run.name}:best")
    assert model.logged_by == online.key
    metrics = json.loads((run / "metrics.json").read_text())
    assert model.metadata["rsum"] == metrics["rsum"]
    assert model.metadata["data_artifact"] == uploaded
    assert model.metadata["data_digest"] == metrics["data_digest"]
    assert model.metadata["image_tower"] == "random:test_resnet"
    last = wandb_server.artifact(f"tester/clip-lightning/model-{run.name}-checkpoint:last")
    assert list(last.contents) == ["last.ckpt"]

    # a second machine, where nothing is cached
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    here = CLIP.from_pretrained(run / "model")
    there = CLIP.from_pretrained(f"wandb:tester/clip-lightning/model-{run.name}:best")
    texts = ["a large red circle", "a small blue square left of it"]
    assert torch.equal(here.embed_texts(texts), there.embed_texts(texts))
    pictures = sorted(scenes.glob("*.jpg"))[:5]
    assert torch.equal(here.embed_images(pictures), there.embed_images(pictures))
    # and without a network, the version that is there
    wandb_server.stop()
    again = CLIP.from_pretrained(f"wandb:tester/clip-lightning/model-{run.name}:v0")
    assert torch.equal(again.embed_texts(texts), here.embed_texts(texts))
    with pytest.raises(UserError, match=r"give a version in .* as :vN"):
        fetch(ArtifactName.parse(f"tester/clip-lightning/model-{run.name}:v7", "wandb:"))
    for file in run.rglob("*"):
        assert not file.is_file() or API_KEY.encode() not in file.read_bytes(), file


def test_only_a_better_validated_model_is_the_best(wandb_server: WandbServer, tmp_path: Path) -> None:
    """The alias `best` of a name that several runs use, and of a run's own name."""
    (tmp_path / "model").mkdir()

    def log(shared: str | None = "shared", **metadata: Any) -> str | None:
        (tmp_path / "model" / "weights").write_text(str(metadata))
        with wandb.init(project="p", dir=tmp_path) as run:
            reason = why_not_best(run, metadata, shared)
            how = {"name": shared or "own", "metadata": metadata, "is_best": reason is None}
            log_model(run, RunFolder(tmp_path), **how)
        return reason

    def best() -> float:
        return wandb_server.artifact("tester/p/shared:best").metadata["rsum"]

    assert log(data_digest="a") == "no epoch was validated"
    assert log(rsum=50.0, data_digest="a") is None
    assert "its rsum is 40.0, and that of the present best is 50.0" in str(log(rsum=40.0, data_digest="a"))
    assert "other data" in str(log(rsum=99.0, data_digest="b"))
    assert "no epoch was validated" in str(log(data_digest="a"))
    assert best() == 50.0
    assert log(rsum=51.0, data_digest="a") is None
    assert best() == 51.0
    assert log(None, rsum=1.0) is None
    assert log(None) == "no epoch was validated"
    offline = SimpleNamespace(offline=True)
    assert "offline" in str(why_not_best(offline, {"rsum": 1.0}, "shared"))
    assert why_not_best(offline, {"rsum": 1.0}, None) is None


@pytest.mark.slow
def test_offline_and_synced_later(wandb_server: WandbServer, uploaded: str, fit: Fit, tmp_path: Path) -> None:
    fetch(ArtifactName.parse(uploaded, "wandb:"))
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "clip-lightning" / "artifacts"
    shutil.copytree(cache, tmp_path / "trainer" / "clip-lightning" / "artifacts")
    asked = len(wandb_server.operations)
    run = fit(f"wandb:{uploaded}", WANDB_MODE="offline")
    assert len(wandb_server.operations) == asked  # the server was not contacted
    sync(run)
    online = wandb_server.runs["tester", "clip-lightning", run.name]
    data = wandb_server.artifact(uploaded)
    assert (online.state, data.used_by) == ("finished", [online.key])
    assert len(data.home.versions) == 1  # recognized, not uploaded again
    model = wandb_server.artifact(f"tester/clip-lightning/model-{run.name}:best")
    assert (model.logged_by, model.metadata["data_artifact"]) == (online.key, uploaded)
    there = CLIP.from_pretrained(f"wandb:tester/clip-lightning/model-{run.name}:best")
    texts = ["a large red circle"]
    assert torch.equal(there.embed_texts(texts), CLIP.from_pretrained(run / "model").embed_texts(texts))


def test_a_download_resumes_and_damage_is_detected(
    wandb_server: WandbServer, uploaded: str, scenes: Path, monkeypatch: Patch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    name = ArtifactName.parse(f"{DATA}:latest", "wandb:")
    folder = name.home / "v0"
    shutil.copytree(scenes, folder)  # most of it came before the process was killed
    missing, spoiled = sorted(folder.glob("*.jpg"))[:2]
    wanted = {path.relative_to(scenes): path.read_bytes() for path in scenes.rglob("*") if path.is_file()}
    missing.unlink()
    spoiled.write_bytes(b"half")
    with pytest.raises(UserError, match="not on this machine"):
        fetched(name)
    found = fetch(name)
    assert found.folder == folder
    assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == wanted
    assert str(fetched(name)) == str(found) == uploaded
    assert found.about()["metadata"]["splits"] == {"train": 32, "val": 4, "test": 4}


def test_a_reference_is_followed(wandb_server: WandbServer, scenes: Path, tmp_path: Path) -> None:
    run_command("data", "upload", scenes, "--artifact=there", "--reference=true", cache=tmp_path)
    contents = wandb_server.artifact("tester/clip-lightning/there:v0").contents
    assert all(entry["ref"].startswith("file://") for entry in contents.values())
    folder = fetch(ArtifactName.parse("tester/clip-lightning/there:v0", "wandb:")).folder
    assert (folder / "captions.csv").read_bytes() == (scenes / "captions.csv").read_bytes()


@pytest.mark.parametrize(
    "text", ["flickr8k", "a/b", "a/b/c:d:e", "../b/c", "a/../c:v0", "a/b/..:v0", "a/b/c:.."]
)
def test_invalid_names_are_rejected(text: str) -> None:
    with pytest.raises(UserError, match="expected ENTITY/PROJECT/NAME:ALIAS"):
        ArtifactName.parse(text, "wandb:")


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("WANDB_API_KEY", "", "no W&B API key is configured"),
        ("WANDB_MODE", "offline", "WANDB_MODE is offline"),
        ("WANDB_MODE", "online", "cannot be downloaded from W&B"),  # there is no such artifact
    ],
)
def test_what_cannot_be_downloaded_is_one_line(
    wandb_server: WandbServer, monkeypatch: Patch, tmp_path: Path, name: str, value: str, line: str
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=line):
        fetch(ArtifactName.parse(f"{DATA}:latest", "wandb:"))
