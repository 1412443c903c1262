"""Training on two processes is that of one: weights, moments, metrics, checkpoints.

Run as a program (`python tests/training/test_distributed.py SCENES BERT BUNDLE OUT`, or by torchrun with two
processes) this file trains each way and leaves the results in OUT, where the tests read them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from small_runs import data, other_split, trainer
from torch import nn

from clip_lightning.model.lora import LoRAConfig
from clip_lightning.training import gradcache
from clip_lightning.training.build import HeadOptions, TowerOptions
from clip_lightning.training.checkpoints import SafeCheckpointIO
from clip_lightning.training.losses import InfoNCE, SigLIP
from clip_lightning.training.module import CLIPModule
from clip_lightning.training.optim import OptimizerConfig

pytestmark = pytest.mark.slow

STEPS, HALF = 20, 10
# what each way trains, and how
WAYS: dict[str, dict[str, Any]] = {
    "transformer": {},
    "micro-batches": {"micro_batch_size": 3, "matryoshka": [4, 8]},
    "activation checkpointing": {"towers": {"activation_checkpointing": True}},
    "one tower": {"freeze": "image"},
    "one tower, adapters in the other": {"lora": {"rank": 2, "towers": "text"}},
    "SigLIP": {"loss": "SigLIP", "matryoshka": [4]},
    "teacher": {"freeze": "image", "teacher": True},
    "convolutions, micro-batches": {
        "image_tower": "random:test_resnet",
        "towers": {"fix_statistics": True},
        "micro_batch_size": 3,
    },
}
AGAIN = "one tower, resumed in the middle of an epoch from the checkpoint of two processes"
# with two processes only: dropout in micro-batches against the same ones in one graph, and the automatic size
TWO: dict[str, dict[str, Any]] = {
    "dropout": {"micro_batch_size": 3, "dropout": 0.3},
    "dropout in one graph": {"micro_batch_size": 3, "dropout": 0.3},
    "auto": {"micro_batch_size": "auto"},
}


def run_everything(scenes: Path, bert: Path, bundle: Path, out: Path) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))

    class Record(Callback):
        """Writes the norm that each step was clipped by, and the metrics."""

        def __init__(self, way: str) -> None:
            self.way = way
            self.norms: list[float] = []

        def on_train_start(self, trainer: Trainer, *_: Any) -> None:
            for group in trainer.optimizers[0].param_groups:
                group["eps"] = 1e-4  # or Adam makes full steps of a gradient that is only rounding

        def on_train_batch_end(self, trainer: Trainer, pl_module: CLIPModule, *_: Any) -> None:
            self.norms.append(float(pl_module.gradient_norm))
            if self.way == "one tower" and trainer.global_step == HALF:
                trainer.save_checkpoint(out / f"half-{ranks}.ckpt")

        def on_train_end(self, trainer: Trainer, pl_module: CLIPModule) -> None:
            names = {parameter: name for name, parameter in pl_module.named_parameters()}
            embeddings = pl_module.validation_embeddings
            record = {
                "norms": self.norms,
                "micro_batch": pl_module.micro_batch_size,
                "validated": None if embeddings is None else [len(embeddings.image), len(embeddings.text)],
                "order": [names[p] for g in trainer.optimizers[0].param_groups for p in g["params"]],
                "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            }
            (out / f"{self.way}-{ranks}-{trainer.global_rank}.json").write_text(json.dumps(record))

    rank = int(os.environ.get("RANK", "0"))
    ways = WAYS | {AGAIN: WAYS["one tower"]} | (TWO if ranks > 1 else {})
    patch = pytest.MonkeyPatch()
    for way, changes in ways.items():
        torch.manual_seed(0)
        options = dict(changes)
        dropout = options.pop("dropout", 0.0)
        if ranks == 1:
            options.pop("micro_batch_size", None)
        options["towers"] = TowerOptions(image_size=32, **options.get("towers", {}))
        options["loss"] = SigLIP() if "loss" in options else InfoNCE()
        if "lora" in options:
            options["lora"] = LoRAConfig(**options["lora"])
        cache = str(out / "cache") if "teacher" in options else "off"
        if "teacher" in options:
            options["teacher"] = str(bundle)
        if way == "dropout in one graph":
            patch.setattr(gradcache, "checkpoint", lambda encode, *rows, **_: encode(*rows))
        patch.setattr(gradcache, "SMALLEST", (4, 2)[rank])
        patch.setattr(gradcache.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
        module = CLIPModule(
            **{"image_tower": "random:test_vit", "freeze": "none"} | options,
            text_tower=f"random:{bert}",
            heads=HeadOptions(embed_dim=16, dropout=dropout),
            optimizer=OptimizerConfig(image_lr=1e-4, text_lr=1e-4),
        )
        for part in module.modules():
            if isinstance(part, nn.Dropout) and not dropout:
                part.p = 0.0
        source = data(module, scenes, batch_size=8 // ranks, captions_per_image=2, cache=cache)
        fit = trainer(
            out,
            Record(way),
            devices=ranks,
            strategy="auto" if ranks == 1 else "ddp",
            plugins=[SafeCheckpointIO()],
            gradient_clip_val=0.5,
            max_epochs=None,
            max_steps=STEPS,
        )
        fit.fit(module, datamodule=source, ckpt_path=out / "half-2.ckpt" if way == AGAIN else None)
        patch.undo()
        fit.save_checkpoint(out / f"{way}-{ranks}.ckpt")


@pytest.fixture(scope="module")
def results(scenes: Path, bert: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run for all tests: 7 images with 1 to 3 captions for validation, the others for training."""
    out = tmp_path_factory.mktemp("distributed")

    def split(image: int, caption: int) -> str:
        return "train" if image >= 7 else "val" if caption <= image % 3 else ""

    root = other_split(scenes, out / "scenes", split)
    words = [__file__, str(root), str(bert), str(bundle), str(out)]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words]
    two = subprocess.run(line, capture_output=True, text=True, timeout=900)
    assert two.returncode == 0, two.stderr
    one = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=900)
    assert one.returncode == 0, one.stderr  # it resumes from a checkpoint of the two
    (out / "stderr").write_text(two.stderr)
    return out


def record(results: Path, way: str, ranks: int, rank: int = 0) -> dict[str, Any]:
    return json.loads((results / f"{way}-{ranks}-{rank}.json").read_text())


def stored(results: Path, way: str, ranks: int) -> dict[str, Any]:
    """Read a checkpoint: weights by name, and moments by the name of their weight."""
    checkpoint = torch.load(results / f"{way}-{ranks}.ckpt", weights_only=True)
    order = record(results, way, ranks)["order"]
    (optimizer,) = checkpoint["optimizer_states"]
    assert sorted(optimizer["state"]) == list(range(len(order)))
    moments = {f"{order[n]} {k}": v for n, found in optimizer["state"].items() for k, v in found.items()}
    return {"weights": checkpoint["state_dict"] | checkpoint["adapters"], "moments": moments}


def assert_same(one: dict[str, Any], two: dict[str, Any], limit: float = 2e-6) -> None:
    for part in ("weights", "moments"):
        assert one[part].keys() == two[part].keys() and one[part]
        worst = {name: (one[part][name] - two[part][name]).abs().max().item() for name in one[part]}
        # moments are sums of gradients, whose sums over a batch are rounded before they are clipped
        most = limit if part == "weights" else 5 * limit
        assert max(worst.values()) <= most, max(worst.items(), key=lambda item: item[1])


@pytest.mark.parametrize("way", WAYS)
def test_twenty_steps_are_those_of_one_process(results: Path, way: str) -> None:
    one, two = (stored(results, way, ranks) for ranks in (1, 2))
    assert_same(one, two)
    assert ("clip.logit_bias" in one["weights"]) == (way == "SigLIP")
    norms = [record(results, way, ranks)["norms"] for ranks in (1, 2)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert min(norms[0]) > 0.5, "they are clipped"


@pytest.mark.parametrize("way", WAYS)
def test_metrics_are_those_of_one_process(results: Path, way: str) -> None:
    one = {k: v for k, v in record(results, way, 1)["metrics"].items() if k.startswith("val/")}
    for rank in range(2):
        two = {k: v for k, v in record(results, way, 2, rank)["metrics"].items() if k.startswith("val/")}
        assert two == pytest.approx(one, abs=1e-4)
        # 1, 2, 3, 1, 2, 3 and 1 captions
        assert record(results, way, 2, rank)["validated"] == record(results, way, 1)["validated"] == [7, 13]
    assert "val/rsum" in one


def test_micro_batches_are_those_of_one_graph_with_dropout(results: Path) -> None:
    ways = "dropout", "dropout in one graph"
    assert_same(*(stored(results, way, 2) for way in ways), limit=1e-5)
    norms = [record(results, way, 2)["norms"] for way in ways]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_ranks_agree_on_a_micro_batch(results: Path) -> None:
    assert [record(results, "auto", 2, rank)["micro_batch"] for rank in range(2)] == [2, 2]
    err = (results / "stderr").read_text()
    assert err.count("--model.micro_batch_size auto: 2 of 8 rows at a time") == 1
    assert "It is recommended to use" not in err, "Lightning does not warn about logged metrics"


def test_a_resumed_run_ends_the_same(results: Path) -> None:
    assert record(results, AGAIN, 2)["norms"] == record(results, "one tower", 2)["norms"][HALF:]
    assert_same(stored(results, "one tower", 2), stored(results, AGAIN, 2), limit=0)


def test_one_process_resumes_from_the_checkpoint_of_two(results: Path) -> None:
    assert len(record(results, AGAIN, 1)["norms"]) == STEPS - HALF
    assert_same(stored(results, "one tower", 1), stored(results, AGAIN, 1))


if __name__ == "__main__":
    run_everything(*map(Path, sys.argv[1:]))
