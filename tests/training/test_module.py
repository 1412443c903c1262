"""Training and evaluation through Lightning's Trainer, on tiny towers and drawn scenes."""

from __future__ import annotations

import csv
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from clip_lightning.data.datamodule import CaptionDataModule
from clip_lightning.errors import UserError
from clip_lightning.evaluation.retrieval import retrieval_metrics
from clip_lightning.model.clip import CLIP
from clip_lightning.training.build import HeadOptions
from clip_lightning.training.losses import SigLIP
from clip_lightning.training.module import CLIPModule
from clip_lightning.training.optim import OptimizerConfig, warmup_cosine

# Lightning's advice about towers that are frozen, and so meant to be in eval mode.
pytestmark = pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode:UserWarning")
MakeModule = Callable[..., CLIPModule]
FAST = OptimizerConfig(lr=1e-2, image_lr=1e-2, text_lr=1e-2, warmup=0.0)


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "max_epochs": 1}
    return Trainer(**{**quiet, **settings, "default_root_dir": folder, **options})


def data(module: CLIPModule, root: Path, **options: Any) -> CaptionDataModule:
    settings = {"batch_size": 8, "num_workers": 0, "cache": "off", "captions_per_image": 2}
    return CaptionDataModule(module.transform, module.tokenize, root, **{**settings, **options})


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def scenes_for_evaluation(source: Path, folder: Path, order: int | None = None) -> Path:
    """The scenes with pictures 8 to 39 for validation, 1 to 5 captions each, rows in order or shuffled."""
    shutil.copytree(source, folder)
    with (folder / "captions.csv").open() as file:
        header, *rows = csv.reader(file)
    kept = []
    for i, (name, caption, _) in enumerate(rows):
        number = int(name.split(".")[0])
        if i % 5 <= number % 5:
            kept.append((name, caption, "val" if number >= 8 else "train"))
    if order is not None:
        random.Random(order).shuffle(kept)
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *kept])
    return folder


class Notes(Callback):
    """What one would otherwise read from a logger."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.losses: list[float] = []
        self.scales: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *arguments: Any) -> None:
        self.losses.append(trainer.callback_metrics["train/loss"].item())
        self.scales.append(pl_module.clip.scale.item())


@pytest.mark.parametrize("freeze", ["none", "image", "both"])
def test_fit_trains_what_is_not_frozen(
    make_module: MakeModule, scenes: Path, tmp_path: Path, freeze: str
) -> None:
    module = make_module(freeze=freeze, image_tower="random:test_resnet", optimizer=FAST)
    before = weights(module)
    fit = trainer(tmp_path, max_epochs=2)
    fit.fit(module, datamodule=data(module, scenes))
    parts = {name.split(".")[1] for name in changed(module, before)}
    free = {"none": {"image_tower", "text_tower"}, "image": {"text_tower"}, "both": set()}[freeze]
    assert parts == {"heads", "logit_scale", *free}
    metrics = fit.callback_metrics
    for name in ("train/loss", "train/loss_over_ln_batch", "train/scale", "train/grad_norm", "val/rsum"):
        assert metrics[name].isfinite()
    assert {"val/text_to_image_R@1", "val/image_to_text_R@10", "val/image_to_text_median_rank"} <= set(
        metrics
    )
    assert fit.global_step == 8


def test_training_learns(make_module: MakeModule, scenes: Path, tmp_path: Path) -> None:
    notes = Notes()
    module = make_module(freeze="none", optimizer=OptimizerConfig(lr=3e-3, image_lr=3e-3, text_lr=3e-3))
    trainer(tmp_path, max_epochs=12, limit_val_batches=0, callbacks=[notes]).fit(
        module, datamodule=data(module, scenes)
    )
    assert sum(notes.losses[-4:]) < 0.7 * sum(notes.losses[:4])


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
def test_the_trainers_other_ways(
    make_module: MakeModule, scenes: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    module = make_module(freeze="none", loss=SigLIP(), micro_batch_size=3, heads=HeadOptions(16, "mlp", 0.1))
    before = weights(module)
    fit = trainer(tmp_path, gradient_clip_val=0.5, **options)
    fit.fit(module, datamodule=data(module, scenes))
    assert {"clip.logit_scale", "clip.logit_bias"} < changed(module, before)
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in module.parameters())


def test_micro_batches_take_the_same_step(make_module: MakeModule, scenes: Path, tmp_path: Path) -> None:
    steps = []
    for size in (None, 3):
        module = make_module(freeze="none", micro_batch_size=size)
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        optimizer = {"configure_optimizers": lambda m=module: torch.optim.SGD(m.parameters(), lr=0.1)}
        module.__dict__.update(optimizer)
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, datamodule=data(module, scenes))
        steps.append(weights(module))
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-5, atol=1e-6)


def test_the_rates_follow_the_schedule_in_steps(
    make_module: MakeModule, scenes: Path, tmp_path: Path
) -> None:
    notes = Notes()
    config = OptimizerConfig(lr=1e-3, image_lr=1e-4, text_lr=1e-5, warmup=0.25)
    module = make_module(freeze="none", optimizer=config)
    trainer(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[notes]).fit(
        module, datamodule=data(module, scenes)
    )
    assert len(notes.rates) == 8
    for step, rates in enumerate(notes.rates):
        factor = warmup_cosine(step, warmup_steps=2, total_steps=8)
        assert sorted(set(rates)) == pytest.approx([peak * factor for peak in (1e-5, 1e-4, 1e-3)])


def test_the_scale_never_passes_its_limit(make_module: MakeModule, scenes: Path, tmp_path: Path) -> None:
    notes = Notes()
    module = make_module(optimizer=OptimizerConfig(lr=0.5, warmup=0.0))
    module.clip.logit_scale.data.fill_(4.5)
    trainer(tmp_path, callbacks=[notes]).fit(module, datamodule=data(module, scenes))
    assert max(notes.scales) <= 100.001
    assert module.clip.scale <= 100.001


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("limit", [-1.0, 0.0, None])
def test_a_limit_of_0_or_less_clips_nothing(
    make_module: MakeModule, monkeypatch: pytest.MonkeyPatch, algorithm: str, limit: float | None
) -> None:
    module = make_module()
    monkeypatch.setattr(module, "log", lambda *_: None)
    weight = module.clip.heads.text[1].weight
    weight.grad = torch.full_like(weight, 5.0)
    module.configure_gradient_clipping(torch.optim.SGD([weight]), limit, algorithm)
    assert weight.grad.eq(5.0).all()


def test_a_training_without_an_end(make_module: MakeModule, scenes: Path, tmp_path: Path) -> None:
    module = make_module()
    with pytest.raises(UserError, match=r"--trainer\.max_epochs"):
        trainer(tmp_path, max_epochs=-1).fit(module, datamodule=data(module, scenes))


def test_an_impossible_micro_batch(make_module: MakeModule) -> None:
    with pytest.raises(UserError, match=r"--model\.micro_batch_size 0"):
        make_module(micro_batch_size=0)


def test_metrics_are_those_of_the_model_and_do_not_depend_on_the_order(
    make_module: MakeModule, scenes: Path, tmp_path: Path
) -> None:
    module = make_module()
    found = []
    for order in (None, 1, 2):
        root = scenes_for_evaluation(scenes, tmp_path / str(order), order)
        source = data(module, root, batch_size=5)
        (metrics,) = trainer(tmp_path).validate(module, datamodule=source, verbose=False)
        found.append(metrics)
        embeddings = module.validation_embeddings
        assert embeddings is not None
        images = source.images("val")
        captions = [caption for image in images for caption in image.captions]
        owner = torch.tensor([i for i, image in enumerate(images) for _ in image.captions])
        assert len(images) == 32 and len(captions) == len(embeddings.text) == 99
        by_hand = (
            module.clip.embed_images([image.path for image in images]),
            module.clip.embed_texts(captions),
        )
        torch.testing.assert_close((embeddings.image, embeddings.text), by_hand, rtol=1e-4, atol=1e-5)
        assert torch.equal(embeddings.text_image_id, owner)
        expected = retrieval_metrics(*by_hand, owner)
        assert metrics == pytest.approx({f"val/{name}": value for name, value in expected.items()}, abs=1e-4)
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    assert found[2] == pytest.approx(found[0], abs=1e-4)


@pytest.mark.filterwarnings("ignore:left out:UserWarning")
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_broken_picture_is_left_out_of_the_score_and_counted(
    make_module: MakeModule, scenes: Path, tmp_path: Path, batch_size: int
) -> None:
    module = make_module()
    root = scenes_for_evaluation(scenes, tmp_path / "scenes")
    (root / "00012.jpg").write_bytes(b"\xff\xd8 no picture")
    source = data(module, root, batch_size=batch_size, max_broken=0.05)
    with pytest.warns(UserWarning, match=r"left out 1 images.*00012\.jpg"):
        trainer(tmp_path).validate(module, datamodule=source, verbose=False)
    assert list(source.broken) == [str(root / "00012.jpg")]
    embeddings = module.validation_embeddings
    assert embeddings is not None
    assert sorted({*embeddings.text_image_id.tolist()}) == embeddings.image_id.tolist()
    assert len(embeddings.image) == 31 and 4 not in embeddings.image_id
    (root / "00020.jpg").write_bytes(b"")
    (root / "00021.jpg").write_bytes(b"")
    source = data(module, root, batch_size=batch_size, max_broken=0.05)
    with pytest.raises(UserError, match=r"--data\.max_broken"):
        trainer(tmp_path).validate(module, datamodule=source, verbose=False)


class TestCheckpoint:
    def saved(self, module: CLIPModule, scenes: Path, folder: Path) -> Path:
        fit = trainer(folder, max_steps=2, limit_val_batches=0)
        fit.fit(module, datamodule=data(module, scenes))
        fit.save_checkpoint(folder / "one.ckpt")
        return folder / "one.ckpt"

    @pytest.mark.parametrize(
        ("freeze", "absent"),
        [
            ("none", ()),
            ("image", ("clip.image_tower.",)),
            ("text", ("clip.text_tower.",)),
            ("both", ("clip.image_tower.", "clip.text_tower.")),
        ],
    )
    def test_frozen_towers_are_named_and_not_stored(
        self, make_module: MakeModule, scenes: Path, tmp_path: Path, freeze: str, absent: tuple[str, ...]
    ) -> None:
        module = make_module(freeze=freeze)
        path = self.saved(module, scenes, tmp_path)
        checkpoint = torch.load(path, weights_only=True)
        stored = checkpoint["state_dict"].keys()
        assert stored == {name for name in module.state_dict() if not name.startswith(absent or "nothing")}
        towers = {name.rstrip(".").removeprefix("clip."): name.rstrip(".") for name in absent}
        assert checkpoint["frozen_towers"] == {
            full: getattr(module.clip, short).digest() for short, full in towers.items()
        }
        again = make_module(freeze=freeze)
        trainer(tmp_path, max_steps=4, limit_val_batches=0).fit(
            again, datamodule=data(again, scenes), ckpt_path=path, weights_only=True
        )
        straight = make_module(freeze=freeze)
        assert changed(again, weights(straight))

    def test_validate_restores_every_weight(
        self, make_module: MakeModule, scenes: Path, tmp_path: Path
    ) -> None:
        module = make_module(optimizer=FAST)
        path = self.saved(module, scenes, tmp_path)
        again = make_module()
        assert changed(again, weights(module))
        trainer(tmp_path).validate(
            again, datamodule=data(again, scenes), ckpt_path=path, weights_only=True, verbose=False
        )
        assert not changed(again, weights(module))

    @pytest.mark.parametrize("which", ["image_tower", "text_tower"])
    def test_another_frozen_tower_is_refused(
        self, make_module: MakeModule, scenes: Path, tmp_path: Path, which: str
    ) -> None:
        path = self.saved(make_module(), scenes, tmp_path)
        other = make_module()
        with torch.no_grad():
            next(getattr(other.clip, which).parameters()).view(-1)[0] += 1
        with pytest.raises(UserError, match=rf"another frozen {which} than 'random:.*same --model options"):
            trainer(tmp_path).validate(
                other, datamodule=data(other, scenes), ckpt_path=path, weights_only=True, verbose=False
            )

    def test_a_bundle_from_a_trained_module(
        self, make_module: MakeModule, scenes: Path, tmp_path: Path
    ) -> None:
        module = make_module(optimizer=FAST)
        self.saved(module, scenes, tmp_path)
        again = CLIP.from_pretrained(module.clip.save_pretrained(tmp_path / "model"))
        assert torch.equal(again.embed_texts(["a star"]), module.clip.embed_texts(["a star"]))


def test_training_starts_from_a_bundle(make_clip: Callable[..., CLIP], tmp_path: Path) -> None:
    clip = make_clip()
    bundle = clip.save_pretrained(tmp_path / "model")
    module = CLIPModule(init_from=str(bundle), freeze="image")
    assert module.clip.text_tower.training and not module.clip.image_tower.training
    texts = ["a small red circle", "two stars"]
    torch.testing.assert_close(module.clip.embed_texts(texts), clip.embed_texts(texts), rtol=0, atol=0)


def test_what_contradicts_the_bundle_is_refused(make_clip: Callable[..., CLIP], tmp_path: Path) -> None:
    bundle = str(make_clip().save_pretrained(tmp_path / "model"))
    with pytest.raises(UserError, match=r"--model\.image_tower resnet18 is not that of --model"):
        CLIPModule(image_tower="resnet18", init_from=bundle)
    with pytest.raises(UserError, match="was trained without a bias"):
        CLIPModule(init_from=bundle, loss=SigLIP())
    with pytest.raises(UserError, match=r"give --model\.image_tower and --model\.text_tower"):
        CLIPModule()


@pytest.mark.parametrize(("algorithm", "limit"), [("norm", 1e-3), ("value", 1e-5), ("norm", None)])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_and_their_norm_is_logged(
    make_module: MakeModule, scenes: Path, tmp_path: Path, algorithm: str, limit: float | None, precision: str
) -> None:
    module = make_module(freeze="none", optimizer=FAST)
    norms: list[tuple[float, float, float]] = []

    class Watch(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
            self.before = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *arguments: Any) -> None:
            after = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
            logged = trainer.callback_metrics["train/grad_norm"].item()
            norms.append((self.before.norm().item(), logged, after.norm().item()))
            if algorithm == "value":
                assert after.abs().max() <= 1e-5

    options = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm, "precision": precision}
    trainer(tmp_path, max_steps=2, callbacks=[Watch()], **options).fit(
        module, datamodule=data(module, scenes)
    )
    assert len(norms) == 2
    for before, logged, after in norms:
        assert logged == pytest.approx(before, rel=1e-4)
        if algorithm == "norm":
            assert after == pytest.approx(before if limit is None else limit, rel=1e-2)


def test_the_time_of_a_step_is_divided(make_module: MakeModule, scenes: Path, tmp_path: Path) -> None:
    class Slow(SigLIP):
        def forward(self, *arguments: Any) -> Tensor:
            time.sleep(0.2)
            return super().forward(*arguments)

    module = make_module(loss=Slow(), optimizer=FAST)
    trainer(tmp_path, max_steps=3).fit(module, datamodule=data(module, scenes))
    seconds = module.stopwatch.seconds
    assert seconds["loss"] >= 0.6
    assert seconds["towers"] > 0


def test_layers_that_are_not_trained_stay_as_they_are(
    make_module: MakeModule, scenes: Path, tmp_path: Path
) -> None:
    config = OptimizerConfig(
        lr=1e-2, image_lr=1e-2, text_lr=1e-2, warmup=0.0, layer_decay=0.5, freeze_below=0.6
    )
    module = make_module(image_tower="random:resnet18", freeze="none", optimizer=config)
    before = weights(module.clip)
    trainer(tmp_path, max_steps=1).fit(module, datamodule=data(module, scenes))
    tops = ("image_tower.backbone.layer4.1", "text_tower.backbone.encoder.layer.1", "heads", "logit_scale")
    moved = changed(module.clip, before)
    assert not {name for name in moved if not name.startswith(tops)}
    assert {top for top in tops if any(name.startswith(top) for name in moved)} == set(tops)
