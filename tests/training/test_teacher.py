"""Learning from a teacher: its cached embeddings, and what a run keeps of it."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_runs
import torch
import yaml
from small_runs import Notes, changed, trainer, weights
from torch import Tensor

from clip_lightning import CLIP
from clip_lightning.__main__ import main
from clip_lightning.data.captions import CaptionedImage
from clip_lightning.data.features import FeatureCache
from clip_lightning.errors import UserError
from clip_lightning.training import extract
from clip_lightning.training.build import TeacherOptions
from clip_lightning.training.extract import Extractor
from clip_lightning.training.module import CLIPModule
from clip_lightning.training.optim import OptimizerConfig

pytestmark = pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode:UserWarning")
MakeModule = Callable[..., CLIPModule]
Command = Callable[..., list[str]]


def test_embeddings_are_those_of_the_model_and_cached(
    make_clip: Callable[..., CLIP], scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, cache = make_clip("random:test_resnet"), FeatureCache(tmp_path)
    images = [CaptionedImage(path, ("a star",)) for path in sorted(scenes.rglob("*.*g"))[:6]]
    files, texts = [image.path for image in images], ["a star", "a large red circle"]

    def cached(model: CLIP) -> list[Tensor]:
        parts: list[Any] = []
        data = SimpleNamespace(images=lambda _: images, captions=lambda _: texts)
        data.use_teacher = lambda *embeddings: parts.extend(embeddings)
        Extractor(cache, torch.device("cpu"), None).cache_teacher(model, data)
        return [part.rows(range(count)) for part, count in zip(parts, (6, 2), strict=True)]

    embedded = cached(teacher)
    for ours, theirs in zip(embedded, (teacher.embed_images(files), teacher.embed_texts(texts)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    head = make_clip("random:test_resnet")
    for weight in head.heads.parameters():
        torch.nn.init.ones_(weight)
    assert not torch.equal(cached(head)[0], embedded[0])
    assert len(cache.entries()) == 6, "another head has other embeddings of the same features"
    monkeypatch.setattr(extract, "encode_images", lambda *_, **__: pytest.fail("computed again"))
    assert torch.equal(cached(teacher)[0], embedded[0])


FREE = {"freeze": "none", "image_tower": "random:test_resnet"}


@pytest.mark.parametrize("options", [{}, FREE, FREE | {"micro_batch_size": 3}])
def test_a_student_approaches_its_teacher(
    make_module: MakeModule, scenes: Path, bundle: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    rates = OptimizerConfig(lr=1e-2, image_lr=1e-3, text_lr=1e-3)
    teacher_options = TeacherOptions(weight=20.0, temperature=0.1)
    module = make_module(teacher=str(bundle), teacher_options=teacher_options, optimizer=rates, **options)
    data = small_runs.data(module, scenes, captions_per_image=2, cache=str(tmp_path / "cache"))
    notes, names = Notes(), {name for name, _ in module.named_parameters()}
    fit = trainer(tmp_path, notes, max_epochs=8)
    fit.fit(module, datamodule=data)
    losses = [logged["train/teacher_loss"] for logged in notes.logged]
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    assert {name for name, _ in module.named_parameters()} == names, "the teacher is not part of the module"
    teacher, batch, captions = CLIP.from_pretrained(bundle), notes.batches[-1], data.captions("train")
    files = [data.images("train")[row].path for row in batch["image_id"].tolist()]
    texts = teacher.embed_texts([captions[row] for row in batch["text_id"].tolist()])
    torch.testing.assert_close(batch["teacher_image"], teacher.embed_images(files), atol=1e-3, rtol=0)
    torch.testing.assert_close(batch["teacher_text"], texts, atol=1e-3, rtol=0)
    assert "teacher_image" not in next(iter(data.val_dataloader()))


def test_the_temperature_is_that_of_the_teacher(
    make_module: MakeModule, scenes: Path, bundle: Path, tmp_path: Path
) -> None:
    modules = [
        make_module(teacher=str(bundle), teacher_options=options)
        for options in (TeacherOptions(), TeacherOptions(temperature=0.07), TeacherOptions(temperature=0.5))
    ]
    for module in modules:
        data = small_runs.data(module, scenes, cache=str(tmp_path / "cache"))
        trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(module, datamodule=data)
    own, given, other = map(weights, modules)
    assert all(torch.allclose(own[name], given[name], atol=1e-6) for name in own)
    assert changed(modules[2], own) and other.keys() == own.keys()


def test_the_command_records_the_teacher_and_keeps_nothing_of_it(
    command: Command, bundle: Path, tmp_path: Path
) -> None:
    assert main(command("fit", tmp_path, model__teacher=bundle, trainer__max_steps=2)) == 0
    (run,) = (path.parent for path in tmp_path.glob("*/config.yaml"))
    model = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert (model["teacher"], model["teacher_options"]) == (str(bundle), {"weight": 1.0, "temperature": None})
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["model"]["teacher"] == str(bundle)
    assert not [name for name in checkpoint["state_dict"] if "teacher" in name]
    assert "teacher" not in (run / "model" / "config.json").read_text()
    assert main([*command("validate", tmp_path), "--ckpt_path", "last"]) == 0


def test_what_a_teacher_needs(
    command: Command, scenes: Path, bundle: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    tars = tmp_path / "tars"
    assert main(["data", "convert", str(scenes), "--out", str(tars)]) == 0
    cases: dict[str, dict[str, Any]] = {
        "--model.teacher needs image files, since tars": {"model__teacher": bundle, "data__root": tars},
        "needs the feature cache; set --data.cache": {"model__teacher": bundle, "data__cache": "off"},
        "no model 'absent'": {"model__teacher": "absent"},
        "weight 0.0: expected a number greater than 0": {"model__teacher_options__weight": 0},
        "temperature -1.0: expected a number": {"model__teacher_options__temperature": -1},
    }
    for message, options in cases.items():
        assert message in refused(*command("fit", tmp_path / "runs", **options))
    with pytest.raises(UserError, match="expected a number greater than 0"):
        TeacherOptions(temperature=math.inf)
