"""Training on two processes, sharded or by DDP, is that of one: weights, moments, metrics, checkpoints.

Run as a program (`python tests/training/test_distributed.py SCENES BERT OUT`, or by torchrun with two
processes) this file trains each way and leaves the results in OUT, where the tests read them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from small_runs import data, other_split, trainer
from torch import nn

from clip_lightning.errors import UserError
from clip_lightning.model.lora import LoRAConfig
from clip_lightning.training import gradcache, sharding
from clip_lightning.training.build import HeadOptions, TowerOptions
from clip_lightning.training.checkpoints import SafeCheckpointIO
from clip_lightning.training.losses import InfoNCE, SigLIP
from clip_lightning.training.module import CLIPModule
from clip_lightning.training.optim import OptimizerConfig
from clip_lightning.training.sharding import ShardedStrategy

pytestmark = pytest.mark.slow

STEPS, HALF = 20, 10
# what each way trains, and how
WAYS: dict[str, dict[str, Any]] = {
    "transformer": {},
    "micro-batches": {"micro_batch_size": 3},
    "activation checkpointing": {"towers": {"activation_checkpointing": True}},
    "convolutions": {"image_tower": "random:test_resnet", "towers": {"fix_statistics": True}},
    "one tower": {"freeze": "image"},
    "lower layers frozen": {"layer_decay": 0.5, "freeze_below": 0.4},
    "clipped by value": {"clip": "value"},
    "one tower, adapters in the other": {"lora": {"rank": 2, "towers": "text"}},
    "bf16": {"precision": "bf16-mixed"},
    "ddp": {"freeze": "image"},
    "ddp, SigLIP": {"loss": "SigLIP"},
    "ddp, convolutions, micro-batches": {
        "image_tower": "random:test_resnet",
        "towers": {"fix_statistics": True},
        "micro_batch_size": 3,
    },
}
HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
without_bf16 = pytest.mark.skipif(
    not HAS_BF16, reason="a step in bf16 takes minutes on a CPU without AVX-512"
)
PARAMETERS = [pytest.param(way, marks=without_bf16) if way == "bf16" else way for way in WAYS]
SHARDED = [way for way in PARAMETERS if "ddp" not in str(way)]
# "one tower" again, resumed in the middle of an epoch from the checkpoint of another way
AGAIN = {"fsdp after fsdp": "one tower", "fsdp after ddp": "ddp", "ddp after fsdp": "one tower"}
# with two processes only: dropout in micro-batches against the same ones in one graph, and the automatic size
TWO: dict[str, dict[str, Any]] = {
    "ddp, dropout": {"micro_batch_size": 3, "dropout": 0.3},
    "ddp, dropout in one graph": {"micro_batch_size": 3, "dropout": 0.3},
    "ddp, auto": {"micro_batch_size": "auto"},
}


def run_everything(scenes: Path, bert: Path, out: Path) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))

    class Record(Callback):
        """Writes the norm that each step was clipped by, the metrics, and how much of the weights is here."""

        def __init__(self, way: str) -> None:
            self.way = way
            self.norms: list[float] = []

        def on_train_start(self, trainer: Trainer, *_: Any) -> None:
            for group in trainer.optimizers[0].param_groups:
                group["eps"] = 1e-4  # or Adam makes full steps of a gradient that is only rounding

        def on_train_batch_end(self, trainer: Trainer, pl_module: CLIPModule, *_: Any) -> None:
            self.norms.append(float(pl_module.gradient_norm))
            if self.way in ("one tower", "ddp") and trainer.global_step == HALF:
                trainer.save_checkpoint(out / f"{self.way}-half-{ranks}.ckpt")

        def on_train_end(self, trainer: Trainer, pl_module: CLIPModule) -> None:
            local = [getattr(p, "_local_tensor", p) for p in pl_module.parameters() if p.requires_grad]
            whole = [p for p in pl_module.parameters() if p.requires_grad]
            names = {parameter: name for name, parameter in pl_module.named_parameters()}
            embeddings = pl_module.validation_embeddings
            record = {
                "norms": self.norms,
                "micro_batch": pl_module.micro_batch_size,
                "validated": None if embeddings is None else [len(embeddings.image), len(embeddings.text)],
                "order": [names[p] for g in trainer.optimizers[0].param_groups for p in g["params"]],
                "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
                "share": sum(t.numel() for t in local) / sum(p.numel() for p in whole),
                "sharded modules": len(sharding.sharded_modules(pl_module.clip)),
            }
            (out / f"{self.way}-{ranks}-{trainer.global_rank}.json").write_text(json.dumps(record))

    again = AGAIN if ranks > 1 else {"fsdp after fsdp": "one tower"}  # by one process
    ways = WAYS | {way: WAYS["one tower"] for way in again} | (TWO if ranks > 1 else {})
    patch = pytest.MonkeyPatch()
    for way, changes in ways.items():
        if way == "bf16" and not HAS_BF16:
            continue
        # sharding starts from the weights of rank 0, whatever the others have drawn; DDP compares frozen ones
        rank, is_ddp = int(os.environ.get("RANK", "0")), way.startswith("ddp")
        torch.manual_seed(0 if is_ddp or way in again else rank)
        options = dict(changes)
        rates = {name: options.pop(name) for name in ("layer_decay", "freeze_below") if name in options}
        clip, precision = options.pop("clip", "norm"), options.pop("precision", "32-true")
        dropout = options.pop("dropout", 0.0)
        if ranks == 1:
            options.pop("micro_batch_size", None)
        options["towers"] = TowerOptions(image_size=32, **options.get("towers", {}))
        options["loss"] = SigLIP() if "loss" in options else InfoNCE()
        if "lora" in options:
            options["lora"] = LoRAConfig(**options["lora"])
        if way == "ddp, dropout in one graph":
            patch.setattr(gradcache, "checkpoint", lambda encode, *rows, **_: encode(*rows))
        patch.setattr(gradcache, "SMALLEST", (4, 2)[rank])
        patch.setattr(gradcache.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
        module = CLIPModule(
            **{"image_tower": "random:test_vit", "freeze": "none"} | options,
            text_tower=f"random:{bert}",
            heads=HeadOptions(embed_dim=16, dropout=dropout),
            optimizer=OptimizerConfig(image_lr=1e-4, text_lr=1e-4, **rates),
        )
        for part in module.modules():
            if isinstance(part, nn.Dropout) and not dropout:
                part.p = 0.0
        if way == "bf16" and ranks == 1:
            torch.save({n: p.detach().clone() for n, p in module.named_parameters()}, out / f"{way}-start.pt")
        source = data(module, scenes, batch_size=8 // ranks, captions_per_image=2)
        fit = trainer(
            out,
            Record(way),
            devices=ranks,
            strategy="auto" if ranks == 1 else "ddp" if is_ddp else ShardedStrategy(),
            plugins=[SafeCheckpointIO()],
            precision=precision,
            gradient_clip_val=0.01 if clip == "value" else 0.5,
            gradient_clip_algorithm=clip,
            max_epochs=None,
            max_steps=STEPS,
        )
        before = again.get(way)
        fit.fit(module, datamodule=source, ckpt_path=out / f"{before}-half-2.ckpt" if before else None)
        patch.undo()
        fit.save_checkpoint(out / f"{way}-{ranks}.ckpt")
        if way == "convolutions" and ranks == 2:
            (norm, *_) = (part for part in module.modules() if isinstance(part, nn.BatchNorm2d))
            module.clip.image_tower.fixed_statistics = False
            module.train()
            assert norm.training and norm.running_mean is not None
            norm.running_mean.fill_(rank + 1)
            sharding.broadcast_statistics(module.clip)
            (out / f"statistics-{rank}.json").write_text(json.dumps(norm.running_mean.tolist()))


@pytest.fixture(scope="module")
def results(scenes: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run for all tests: 7 images with 1 to 3 captions for validation, the others for training."""
    out = tmp_path_factory.mktemp("distributed")

    def split(image: int, caption: int) -> str:
        return "train" if image >= 7 else "val" if caption <= image % 3 else ""

    root = other_split(scenes, out / "scenes", split)
    words = [__file__, str(root), str(bert), str(out)]
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


@pytest.mark.parametrize("way", PARAMETERS)
def test_twenty_steps_are_those_of_one_process(results: Path, way: str) -> None:
    one, two = (stored(results, way, ranks) for ranks in (1, 2))
    if way == "bf16":  # rounding makes another end of the same way
        start = torch.load(results / f"{way}-start.pt", weights_only=True)
        moved = [torch.cat([(c["weights"][n] - start[n]).flatten() for n in start]) for c in (one, two)]
        assert moved[0].norm() > 0.1
        assert torch.cosine_similarity(*moved, dim=0) > 0.9995
        return
    assert_same(one, two)
    assert ("clip.logit_bias" in one["weights"]) == (way == "ddp, SigLIP")
    norms = [record(results, way, ranks)["norms"] for ranks in (1, 2)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert min(norms[0]) > 0.5, "they are clipped"


@pytest.mark.parametrize("way", SHARDED)
def test_every_rank_has_half_of_the_trained_towers(results: Path, way: str) -> None:
    shares = [record(results, way, 2, rank)["share"] for rank in range(2)]
    # heads are whole on both, and of a few weights one rank has one more row than the other
    assert sum(shares) == pytest.approx(1.05, abs=0.05)
    assert max(shares) < 0.6


@pytest.mark.parametrize("way", PARAMETERS)
def test_metrics_are_those_of_one_process(results: Path, way: str) -> None:
    if way == "bf16":
        pytest.skip("ranks of similar images change with rounding")
    one = {k: v for k, v in record(results, way, 1)["metrics"].items() if k.startswith("val/")}
    for rank in range(2):
        two = {k: v for k, v in record(results, way, 2, rank)["metrics"].items() if k.startswith("val/")}
        assert two == pytest.approx(one, abs=1e-4)
        # 1, 2, 3, 1, 2, 3 and 1 captions
        assert record(results, way, 2, rank)["validated"] == record(results, way, 1)["validated"] == [7, 13]
    assert "val/rsum" in one


def test_micro_batches_are_those_of_one_graph_with_dropout(results: Path) -> None:
    ways = "ddp, dropout", "ddp, dropout in one graph"
    assert_same(*(stored(results, way, 2) for way in ways), limit=1e-5)
    norms = [record(results, way, 2)["norms"] for way in ways]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_ranks_agree_on_a_micro_batch(results: Path) -> None:
    assert [record(results, "ddp, auto", 2, rank)["micro_batch"] for rank in range(2)] == [2, 2]
    err = (results / "stderr").read_text()
    assert err.count("--model.micro_batch_size auto: 2 of 8 rows at a time") == 1
    assert "It is recommended to use" not in err, "Lightning does not warn about logged metrics"


def test_a_resumed_run_ends_the_same(results: Path) -> None:
    assert record(results, "fsdp after fsdp", 2)["norms"] == record(results, "one tower", 2)["norms"][HALF:]
    assert_same(stored(results, "one tower", 2), stored(results, "fsdp after fsdp", 2), limit=0)


@pytest.mark.parametrize(
    ("way", "ranks"), [("fsdp after ddp", 2), ("ddp after fsdp", 2), ("fsdp after fsdp", 1)]
)
def test_another_strategy_resumes_with_one_tower_frozen(results: Path, way: str, ranks: int) -> None:
    assert len(record(results, way, ranks)["norms"]) == STEPS - HALF
    assert_same(stored(results, "one tower", 1), stored(results, way, ranks))


def test_every_rank_has_the_statistics_of_rank_0(results: Path) -> None:
    for rank in range(2):
        assert set(json.loads((results / f"statistics-{rank}.json").read_text())) == {1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": "both"}, "both are frozen"),
        ({"micro_batch_size": "auto"}, "cannot be combined with --model.micro_batch_size auto"),
        ({"precision": "16-mixed"}, "not --trainer.precision 16-mixed"),
        ({"averaged": True}, "averaged weights"),
        ({"scalar": True}, "single numbers as parameters"),
        ({"strategy": ModelParallelStrategy()}, "needs Trainer"),
    ],
)
def test_impossible_sharding(make_module: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    module = make_module(freeze=changes.get("freeze", "none"))
    if "scalar" in changes:
        module.clip.image_tower.backbone.gain = nn.Parameter(torch.tensor(1.0))
    trainer: Any = SimpleNamespace(
        strategy=changes.get("strategy", ShardedStrategy()),
        precision=changes.get("precision", "bf16-mixed"),
        callbacks=[EMAWeightAveraging()] if "averaged" in changes else [],
    )
    with pytest.raises(UserError, match=message):
        sharding.check_shardable(module.clip, changes.get("micro_batch_size"), trainer)


def test_containers_are_not_sharded_themselves() -> None:
    block = nn.Linear(2, 2)
    nested = nn.Module()
    nested.blocks = nn.ModuleList([nn.ModuleList([block]), nn.Sequential(nn.ReLU(), nn.Linear(2, 2))])
    assert list(sharding._layers(nested)) == [block, nested.blocks[1]]


def test_plain_numbers_in_the_state_of_an_optimizer_are_restored() -> None:
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)])
    stored = {**optimizer.state_dict(), "state": {0: {"step": 3, "moment": torch.ones(2)}}}
    strategy: Any = SimpleNamespace(optimizers=[optimizer])
    ShardedStrategy.load_optimizer_state_dict(strategy, {"optimizer_states": [stored]})
    (state,) = optimizer.state.values()
    assert (state["step"], state["moment"].tolist()) == (3, [1, 1])


if __name__ == "__main__":
    run_everything(*map(Path, sys.argv[1:]))
