"""Two processes give the gradients and the metrics of one.

Run as a program (`python tests/training/test_distributed.py SCENES BERT OUT`) this file trains one step and
validates, with two processes and with one, and leaves what came of it in OUT; the tests read that.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small_runs import data, trainer

WAYS = ("info_nce", "siglip", "micro_batches")
STEPS = 20
LONG_WAYS = ("long", "long, micro_batches")
# with two processes only, dropout on: micro-batches against the same ones held in one graph
DROPOUT_WAYS = ("dropout", "dropout_in_one_graph")


def run_everything(scenes: Path, bert: Path, out: Path) -> None:
    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer

    from clip_lightning.training import gradcache, micro_batch
    from clip_lightning.training.build import HeadOptions, TowerOptions
    from clip_lightning.training.losses import InfoNCE, SigLIP
    from clip_lightning.training.module import CLIPModule

    class Record(Callback):
        """Writes the gradients that the optimizer sees, and the metrics, of every rank."""

        def __init__(self, way: str) -> None:
            self.way = way

        def name(self, trainer: Trainer) -> str:
            return f"{self.way}-{trainer.world_size}-{trainer.global_rank}"

        def on_before_optimizer_step(
            self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
        ) -> None:
            found = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
            found["loss"] = trainer.callback_metrics["train/loss"]
            torch.save(found, out / f"gradients-{self.name(trainer)}.pt")
            (out / f"micro_batch-{self.name(trainer)}.json").write_text(
                json.dumps(pl_module.micro_batch_size)
            )

        def on_validation_end(self, trainer: Trainer, pl_module: CLIPModule) -> None:
            metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
            assert pl_module.validation_embeddings is not None
            counts = {"images": len(pl_module.validation_embeddings.image)}
            counts |= {"texts": len(pl_module.validation_embeddings.text)}
            (out / f"metrics-{self.name(trainer)}.json").write_text(json.dumps(metrics | counts))

    def run(way: str, devices: int) -> None:
        torch.manual_seed(0)
        micro = 3 if "micro" in way or "dropout" in way else None
        module = CLIPModule(
            "random:test_resnet" if way in LONG_WAYS else "random:test_vit",
            f"random:{bert}",
            freeze="none",
            towers=TowerOptions(image_size=32, fix_statistics=way in LONG_WAYS),
            heads=HeadOptions(embed_dim=16, dropout=0.3 if "dropout" in way else 0.0),
            loss=SigLIP() if way == "siglip" else InfoNCE(),
            micro_batch_size="auto" if way == "auto" else micro if devices == 2 else None,
        )
        for part in module.modules():
            if isinstance(part, torch.nn.Dropout) and "dropout" not in way:
                part.p = 0.0
        source = data(module, scenes, batch_size=8 // devices, captions_per_image=2)
        strategy = "ddp_fork" if devices > 1 else "auto"
        fit = partial(trainer, out, Record(way), devices=devices, strategy=strategy)
        if way == "info_nce":
            fit().validate(module, datamodule=source, verbose=False)
        if way in LONG_WAYS:
            before = module.clip.heads.image[1].weight.detach().clone()
            fit(max_epochs=None, max_steps=STEPS).fit(module, datamodule=source)
            assert (module.clip.heads.image[1].weight - before).abs().max() > 1e-3, "it has trained"
            if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                torch.save(module.state_dict(), out / f"weights-{way}-{devices}.pt")
            return
        fit(max_steps=1, limit_val_batches=0).fit(module, datamodule=source)

    # two processes first: torch's autograd cannot be forked once it has run
    with pytest.MonkeyPatch.context() as patch:
        run("dropout", 2)
        patch.setattr(gradcache, "checkpoint", lambda encode, *rows, **_: encode(*rows))
        run("dropout_in_one_graph", 2)
    with pytest.MonkeyPatch.context() as patch:
        room = (4, 2)  # on each rank
        patch.setattr(micro_batch, "within_budget", lambda *_: room[torch.distributed.get_rank()])
        run("auto", 2)
    for devices in (2, 1):
        for way in (*WAYS, *LONG_WAYS):
            run(way, devices)


@pytest.fixture(scope="module")
def results(scenes: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run for all tests: 7 images with 1 to 3 captions for validation, the others for training."""
    out = tmp_path_factory.mktemp("distributed")
    root = out / "scenes"
    shutil.copytree(scenes, root)
    with (root / "captions.csv").open() as file:
        header, *rows = csv.reader(file)
    kept = []
    for i, (name, caption, _) in enumerate(rows):
        number = int(name.split(".")[0])
        if number >= 7 or i % 5 <= number % 3:
            kept.append((name, caption, "val" if number < 7 else "train"))
    with (root / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *kept])
    done = subprocess.run(
        [sys.executable, __file__, str(root), str(bert), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (out / "stderr").write_text(done.stderr)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_one_process_with_the_joined_batch(results: Path, way: str) -> None:
    import torch

    one = torch.load(results / f"gradients-{way}-1-0.pt", weights_only=True)
    both = [torch.load(results / f"gradients-{way}-2-{rank}.pt", weights_only=True) for rank in range(2)]
    size = torch.cat([gradient.flatten() for gradient in one.values()]).norm()
    assert size > 0.01
    for two in both:
        assert two.keys() == one.keys()
        for name, gradient in one.items():
            assert (two[name] - gradient).norm() < 1e-5 * size, name
    assert {"clip.logit_scale", "clip.heads.image.1.weight"} <= one.keys()
    assert ("clip.logit_bias" in one) == (way == "siglip")


@pytest.mark.slow
@pytest.mark.parametrize("way", LONG_WAYS)
def test_twenty_steps_are_those_of_one_process(results: Path, way: str) -> None:
    import torch

    one, two = (torch.load(results / f"weights-{way}-{devices}.pt", weights_only=True) for devices in (1, 2))
    assert one.keys() == two.keys()
    worst = {name: (one[name] - two[name]).abs().max().item() for name in one}
    assert max(worst.values()) < 1e-5, max(worst.items(), key=lambda item: item[1])
    metrics = [json.loads((results / f"metrics-{way}-{n}-0.json").read_text()) for n in (1, 2)]
    assert metrics[0]["images"] == 7 and metrics[1] == pytest.approx(metrics[0], abs=1e-4)


@pytest.mark.slow
def test_micro_batches_are_those_of_one_graph_with_dropout(results: Path) -> None:
    import torch

    for rank in range(2):
        ours, theirs = (
            torch.load(results / f"gradients-{way}-2-{rank}.pt", weights_only=True) for way in DROPOUT_WAYS
        )
        plain = torch.load(results / f"gradients-micro_batches-2-{rank}.pt", weights_only=True)
        size = torch.cat([gradient.flatten() for gradient in theirs.values()]).norm()
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert (ours[name] - gradient).norm() < 1e-6 * size, name
        assert (ours["loss"] - plain["loss"]).abs() > 1e-3, "dropout was on"


@pytest.mark.slow
def test_ranks_agree_on_a_micro_batch(results: Path) -> None:
    assert [json.loads((results / f"micro_batch-auto-2-{rank}.json").read_text()) for rank in range(2)] == [
        2,
        2,
    ]
    err = (results / "stderr").read_text()
    assert err.count("--model.micro_batch_size auto: 2 of 8 rows at a time") == 1


@pytest.mark.slow
def test_metrics_of_an_uneven_number_of_images(results: Path) -> None:
    one = json.loads((results / "metrics-info_nce-1-0.json").read_text())
    assert (one["images"], one["texts"]) == (7, 13)  # 1, 2, 3, 1, 2, 3 and 1 captions
    assert "val/rsum" in one
    for rank in range(2):
        two = json.loads((results / f"metrics-info_nce-2-{rank}.json").read_text())
        assert two == pytest.approx(one, abs=1e-4)


@pytest.mark.slow
def test_lightning_does_not_warn_about_logged_metrics(results: Path) -> None:
    assert "It is recommended to use" not in (results / "stderr").read_text()


if __name__ == "__main__":
    run_everything(*map(Path, sys.argv[1:]))
