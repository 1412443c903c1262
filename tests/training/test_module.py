"""Training and evaluation through Lightning's Trainer, on tiny towers and synthetic scenes."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import small_runs
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from small_runs import Notes, changed, trainer, weights
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.utils import logging as transformers_logging

import clip_lightning
from clip_lightning import timing
from clip_lightning.data import datasets
from clip_lightning.data.datamodule import CaptionDataModule
from clip_lightning.data.readers import ReadOptions
from clip_lightning.errors import UserError
from clip_lightning.evaluation.retrieval import retrieval_metrics
from clip_lightning.model.clip import CLIP
from clip_lightning.training.build import HeadOptions, TowerOptions, check_batch_norms
from clip_lightning.training.cli import fit
from clip_lightning.training.losses import InfoNCE, SigLIP
from clip_lightning.training.module import CLIPModule
from clip_lightning.training.optim import OptimizerConfig, rate_factor

# Lightning's warning about frozen towers, which should be in eval mode.
pytestmark = pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode:UserWarning")
MakeModule = Callable[..., CLIPModule]
Patch = pytest.MonkeyPatch
FAST = OptimizerConfig(lr=1e-2, image_lr=1e-2, text_lr=1e-2, warmup=0.0)


def data(module: CLIPModule, root: Path, **options: Any) -> CaptionDataModule:
    return small_runs.data(module, root, **{"captions_per_image": 2, **options})


def scenes_for_evaluation(source: Path, folder: Path, order: int | None = None) -> Path:
    """The scenes with images 8 to 39 for validation, 1 to 5 captions each, rows in order or shuffled."""

    def split(image: int, caption: int) -> str:
        return "" if caption > image % 5 else "val" if image >= 8 else "train"

    return small_runs.other_split(source, folder, split, order)


@pytest.mark.parametrize("freeze", ["none", "image", "both"])
def test_fit_trains_what_is_free(make_module: MakeModule, scenes: Path, tmp_path: Path, freeze: str) -> None:
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
    names = {"val/text_to_image_R@1", "val/image_to_text_R@10", "val/image_to_text_median_rank"}
    assert names <= metrics.keys()
    assert fit.global_step == 8


def test_what_libraries_advertise_and_load_is_not_shown(
    bert: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)  # as it is outside of tests
    module = CLIPModule("random:test_vit", str(bert), towers=TowerOptions(image_size=32))
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        Trainer(accelerator="cpu", logger=False)
    assert module.clip is not None and "TPU available" in caplog.text and "Tip:" not in caplog.text
    assert "weights" not in capfd.readouterr().err
    assert transformers_logging.set_tqdm_hook(None) is None  # later bars of the user are shown


def test_training_learns_by_the_schedule(make_module: MakeModule, scenes: Path, tmp_path: Path) -> None:
    notes, peaks = Notes(), (2e-3, 3e-3, 4e-3)
    config = OptimizerConfig(lr=4e-3, image_lr=3e-3, text_lr=2e-3, warmup=0.25)
    module = make_module(freeze="none", optimizer=config)
    trainer(tmp_path, notes, max_epochs=12, limit_val_batches=0).fit(module, datamodule=data(module, scenes))
    assert sum(notes.losses[-4:]) < 0.7 * sum(notes.losses[:4])
    assert len(notes.rates) == 48
    for step, rates in enumerate(notes.rates):
        factor = rate_factor(step, warmup_steps=12, total_steps=48)
        assert sorted(set(rates)) == pytest.approx([peak * factor for peak in peaks])


def test_the_scale_never_exceeds_its_limit(make_module: MakeModule, scenes: Path, tmp_path: Path) -> None:
    notes = Notes()
    module = make_module(optimizer=OptimizerConfig(lr=0.5, warmup=0.0))
    module.clip.logit_scale.data.fill_(4.5)
    trainer(tmp_path, notes).fit(module, datamodule=data(module, scenes))
    assert max(notes.scales) <= 100.001
    assert module.clip.scale <= 100.001


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("limit", [-1.0, 0.0, None])
def test_a_limit_of_0_or_less_clips_nothing(
    make_module: MakeModule, monkeypatch: Patch, algorithm: str, limit: float | None
) -> None:
    module = make_module()
    monkeypatch.setattr(module, "_logs_step", lambda: False)
    weight = module.clip.heads.text[1].weight
    weight.grad = torch.full_like(weight, 5.0)
    module.configure_gradient_clipping(torch.optim.SGD([weight]), limit, algorithm)
    assert weight.grad.eq(5.0).all()


def test_prefixes_are_trained_and_scored(make_module: MakeModule, scenes: Path, tmp_path: Path) -> None:
    module = make_module(freeze="none", optimizer=FAST, matryoshka=[8, 4])
    fit = trainer(tmp_path, max_epochs=2)
    fit.fit(module, datamodule=data(module, scenes))
    embeddings = module.validation_embeddings
    assert embeddings is not None
    for dims in (4, 8):
        image, text = (
            x[:, :dims] / x[:, :dims].norm(dim=1)[:, None] for x in (embeddings.image, embeddings.text)
        )
        expected = retrieval_metrics(image, text, embeddings.text_image_id, image_id=embeddings.image_id)
        for name in ("text_to_image_R@1", "image_to_text_R@1", "rsum"):
            found = fit.callback_metrics[f"val/dims{dims}_{name}"].item()
            assert found == pytest.approx(expected[name], abs=1e-3)
    fit.save_checkpoint(tmp_path / "one.ckpt")
    assert CLIPModule.load_from_checkpoint(tmp_path / "one.ckpt").matryoshka == [4, 8]
    assert CLIP.from_pretrained(tmp_path / "one.ckpt").metadata["matryoshka"] == [4, 8]


@pytest.mark.parametrize("prefixes", [[16], [0, 4], [4, 4], [-1]])
def test_prefixes_are_below_the_width(make_module: MakeModule, prefixes: list[int]) -> None:
    with pytest.raises(UserError, match=r"--model\.matryoshka \[.*\]: expected different .* from 1 to 15"):
        make_module(matryoshka=prefixes)


def test_metrics_match_the_model_in_any_order(
    make_module: MakeModule, scenes: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    module = make_module()
    found = []
    for order in (None, 1, 2):
        if order == 2:
            monkeypatch.setattr(datasets, "MANY_TEXTS", 1)  # texts are encoded in groups of similar length
        root = scenes_for_evaluation(scenes, tmp_path / str(order), order)
        source = data(module, root, batch_size=5)
        (metrics,) = trainer(tmp_path).validate(module, datamodule=source, verbose=False)
        found.append(metrics)
        embeddings = module.validation_embeddings
        images = source.images("val")
        captions = [caption for image in images for caption in image.captions]
        owner = torch.tensor([i for i, image in enumerate(images) for _ in image.captions])
        assert len(images) == 32 and len(captions) == len(embeddings.text) == 99
        paths = [image.path for image in images]
        by_hand = module.clip.embed_images(paths), module.clip.embed_texts(captions)
        torch.testing.assert_close((embeddings.image, embeddings.text), by_hand, rtol=1e-4, atol=1e-5)
        assert torch.equal(embeddings.text_image_id, owner)
        expected = retrieval_metrics(*by_hand, owner)
        assert metrics == pytest.approx({f"val/{name}": value for name, value in expected.items()}, abs=1e-4)
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    assert found[2] == pytest.approx(found[0], abs=1e-4)


@pytest.mark.filterwarnings("ignore:left out:UserWarning")
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_broken_image_is_not_scored_but_counted(
    make_module: MakeModule, scenes: Path, tmp_path: Path, batch_size: int
) -> None:
    module = make_module()
    root = scenes_for_evaluation(scenes, tmp_path / "scenes")
    (root / "00012.jpg").write_bytes(b"\xff\xd8 no image")
    source = data(module, root, batch_size=batch_size, read=ReadOptions(max_broken=0.05))
    with pytest.warns(UserWarning, match=r"left out 1 images.*00012\.jpg"):
        trainer(tmp_path).validate(module, datamodule=source, verbose=False)
    assert list(source.broken) == [str(root / "00012.jpg")]
    embeddings = module.validation_embeddings
    assert sorted({*embeddings.text_image_id.tolist()}) == embeddings.image_id.tolist()
    assert len(embeddings.image) == 31 and 4 not in embeddings.image_id
    for name in ("00020.jpg", "00021.jpg"):
        (root / name).write_bytes(b"")
    source = data(module, root, batch_size=batch_size, read=ReadOptions(max_broken=0.05))
    with pytest.raises(UserError, match=r"--data\.read\.max_broken"):
        trainer(tmp_path).validate(module, datamodule=source, verbose=False)


def saved(module: CLIPModule, scenes: Path, folder: Path, **options: Any) -> Path:
    """Train two steps, and save a checkpoint."""
    fit = trainer(folder, max_steps=2, limit_val_batches=0, **options)
    fit.fit(module, datamodule=data(module, scenes))
    fit.save_checkpoint(folder / "one.ckpt")
    return folder / "one.ckpt"


@pytest.mark.parametrize(
    ("freeze", "absent"), [("none", ()), ("image", ("image_tower",)), ("both", ("image_tower", "text_tower"))]
)
def test_frozen_towers_are_named_and_not_stored(
    make_module: MakeModule, scenes: Path, tmp_path: Path, freeze: str, absent: tuple[str, ...]
) -> None:
    module = make_module(freeze=freeze, optimizer=FAST)
    path = saved(module, scenes, tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    names = tuple(f"clip.{tower}." for tower in absent)
    assert checkpoint["state_dict"].keys() == {n for n in module.state_dict() if not n.startswith(names)}
    digests = {f"clip.{tower}": getattr(module.clip, tower).digest() for tower in absent}
    assert checkpoint["frozen_towers"] == digests
    again = make_module(freeze=freeze)
    assert changed(again, weights(module))
    given = {"datamodule": data(again, scenes), "ckpt_path": path, "weights_only": True}
    trainer(tmp_path).validate(again, verbose=False, **given)
    assert not changed(again, weights(module))


def test_a_checkpoint_has_the_logged_options(make_module: MakeModule, scenes: Path, tmp_path: Path) -> None:
    heads = HeadOptions(16, "mlp", dropout=0.1)
    module = make_module(freeze="none", loss=InfoNCE(0.3), heads=heads, optimizer=FAST)
    logger = CSVLogger(tmp_path, "logs", version="")
    path = saved(module, scenes, tmp_path, logger=logger, log_every_n_steps=1)
    logged = yaml.safe_load((tmp_path / "logs" / "hparams.yaml").read_text())["model"]
    assert (logged["heads"]["dropout"], logged["loss"]["init_args"]) == (0.1, {"label_smoothing": 0.3})
    again = CLIPModule.load_from_checkpoint(path)
    assert not changed(again, weights(module)) and not again.clip.training
    assert (again.loss.label_smoothing, again.optimizer, again.hparams) == (0.3, FAST, module.hparams)
    assert CLIPModule.load_from_checkpoint(path, loss=InfoNCE()).loss.label_smoothing == 0
    with pytest.raises(UserError, match=r"is of a different model \(clip\.heads.* is \(16, 64\) there"):
        CLIPModule.load_from_checkpoint(path, heads=HeadOptions(8, "mlp"))
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    (tmp_path / "config.yaml").write_text("model: {}")
    with pytest.raises(UserError, match=r"other\.ckpt is not a checkpoint of"):
        CLIPModule.load_from_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"config\.yaml is not a checkpoint of"):
        CLIP.from_pretrained(tmp_path / "config.yaml")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["model"] |= {"removed_option": 1}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(UserError, match=r"the options in .*old\.ckpt cannot be read .*removed_option"):
        CLIPModule.load_from_checkpoint(tmp_path / "old.ckpt")


def test_a_batch_needs_no_text_id(make_module: MakeModule, tmp_path: Path) -> None:
    module = make_module()
    batch = {"pixel_values": torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)}
    batch |= module.tokenize(["a star", "a red circle", "two squares", "a star"])
    batch |= {"image_id": torch.arange(3), "text_image_id": torch.tensor([0, 1, 2, 0])}
    batches = [batch, {**batch, "image_id": torch.arange(3, 6), "text_image_id": batch["text_image_id"] + 3}]
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer(tmp_path).fit(module, loader, loader)
    embeddings = module.validation_embeddings
    assert (len(embeddings.image), embeddings.text_image_id.tolist()) == (6, [0, 1, 2, 0, 3, 4, 5, 3])


@pytest.mark.parametrize(
    ("options", "batch", "said"),
    [
        ({"micro_batch_size": 1}, 8, r"batch_size 8 and --model\.micro_batch_size 1 leave a single image"),
        ({"micro_batch_size": 7}, 8, r"batch_size 8 and --model\.micro_batch_size 7 leave a single image"),
        ({}, 1, r"batch_size 1 and --model\.micro_batch_size null leave a single image"),
        ({"micro_batch_size": 4}, 8, None),
        ({"micro_batch_size": 1, "image_tower": "random:test_vit"}, 8, None),
    ],
)
def test_batch_norms_need_more_than_one_value(
    make_module: MakeModule, options: dict[str, Any], batch: int, said: str | None
) -> None:
    module = make_module(**{"freeze": "none", "image_tower": "random:test_resnet", **options})
    with nullcontext() if said is None else pytest.raises(UserError, match=said):
        check_batch_norms(module.clip, batch, module.micro_batch_size)


def test_training_starts_from_a_bundle(bundle: Path) -> None:
    module = CLIPModule(init_from=str(bundle), freeze="image")
    assert module.clip.text_tower.training and not module.clip.image_tower.training
    texts, before = ["a small red circle", "two stars"], CLIP.from_pretrained(bundle)
    torch.testing.assert_close(module.clip.embed_texts(texts), before.embed_texts(texts), rtol=0, atol=0)


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
    trainer(tmp_path, Watch(), max_steps=2, **options).fit(module, datamodule=data(module, scenes))
    assert len(norms) == 2
    for before, logged, after in norms:
        assert logged == pytest.approx(before, rel=1e-4)
        if algorithm == "norm":
            assert after == pytest.approx(before if limit is None else limit, rel=1e-2)


def test_time_of_the_loss(make_module: MakeModule, scenes: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(timing, "time", clock)

    class Slow(SigLIP):
        def forward(self, *arguments: Any) -> Tensor:
            clock.now += 2
            return super().forward(*arguments)

    module = make_module(loss=Slow(), optimizer=FAST)
    trainer(tmp_path, max_steps=3).fit(module, datamodule=data(module, scenes))
    assert module.stopwatch.seconds == {**dict.fromkeys(timing.PARTS, 0), "loss": 6}


# --trainer.overfit_batches


@pytest.mark.parametrize("cached", [True, False])
def test_the_same_batch_each_time(command: Callable[..., list[str]], tmp_path: Path, cached: bool) -> None:
    notes = Notes()
    ways = {"model__freeze": "both" if cached else "none", "data__cache": tmp_path if cached else "off"}
    options = {"trainer__overfit_batches": 1, "trainer__deterministic": "true", "trainer__max_epochs": 4}
    options |= {"data__augmentation__min_scale": 0.5, "data__captions_per_image": 2}
    options |= {"predictions__queries": 0, "model__optimizer__lr": 1e-3}
    try:
        fit(command("fit", tmp_path / "runs", **options, **ways)[1:], [notes])
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(notes.batches) == 4
    for batch in notes.batches:
        torch.testing.assert_close(batch, notes.batches[0], rtol=0, atol=0)
    assert notes.losses[-1] < notes.losses[0]


# the files of a step


PACKAGE = Path(clip_lightning.__file__).parent


class TracesOneStep(Callback):
    """Notes each of our files of which a function is called, from reading a batch to the end of its step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.files: set[str] = set()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        # the first step allocates and compares; a later one is what all others are
        sys.setprofile(self._note if trainer.global_step == self.step else None)

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        place = Path(frame.f_code.co_filename)
        if event == "call" and place.is_relative_to(PACKAGE):
            self.files.add(place.relative_to(PACKAGE).as_posix())


def test_a_cached_step_passes_few_files(make_module: MakeModule, scenes: Path, tmp_path: Path) -> None:
    module, traces = make_module(freeze="both"), TracesOneStep(2)
    options = {"max_steps": 4, "limit_val_batches": 0, "gradient_clip_val": 1.0}
    batches = small_runs.data(module, scenes, cache=str(tmp_path / "cache"))
    trainer(tmp_path, traces, **options).fit(module, batches)
    print(*sorted(traces.files), sep="\n")
    assert {"data/datasets.py", "training/module.py", "training/losses.py", "model/clip.py"} <= traces.files
    assert len(traces.files) <= 10, sorted(traces.files)
