"""Sharded training on two processes is that of one process: weights, moments, metrics, checkpoints.

Run as a program (`python tests/training/test_sharding.py SCENES BERT OUT`, or by torchrun with two processes) this
file trains each way and leaves what came of it in OUT; the tests read that.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

pytestmark = pytest.mark.slow

STEPS, HALF = 20, 10
# what each way trains, and how
WAYS: dict[str, dict[str, Any]] = {
    "transformer": {},
    "micro-batches": {"micro_batch_size": 3},
    "activation checkpointing": {"activation_checkpointing": True},
    "convolutions": {"image_tower": "random:test_resnet", "fix_statistics": True},
    "one tower": {"freeze": "image"},
    "lower layers frozen": {"layer_decay": 0.5, "freeze_below": 0.4},
    "clipped by value": {"clip": "value"},
    "one tower, adapters in the other": {"lora": {"rank": 2, "towers": "text"}},
    "bf16": {"precision": "bf16-mixed"},
}
# the first way again, from a checkpoint of two ranks in the middle of an epoch
RESUMED = "resumed"


def run_everything(scenes: Path, bert: Path, out: Path) -> None:
    import torch
    from lightning.pytorch import LightningModule, seed_everything

    from clip_lightning.data.datamodule import CaptionDataModule
    from clip_lightning.model.lora import LoRAConfig
    from clip_lightning.training.checkpoints import SafeCheckpointIO
    from clip_lightning.training.module import CLIPModule
    from clip_lightning.training.optim import OptimizerConfig
    from clip_lightning.training.sharding import ShardedStrategy, broadcast_statistics, sharded_modules

    ranks = int(os.environ.get("WORLD_SIZE", "1"))

    class Record(Callback):
        """Writes the norm that each step was clipped by, the metrics, and how much of the weights is here."""

        def __init__(self, way: str) -> None:
            self.way = way
            self.norms: list[float] = []

        def on_train_batch_end(self, trainer: Trainer, pl_module: CLIPModule, *_: Any) -> None:
            self.norms.append(pl_module.gradient_norm)
            if self.way == next(iter(WAYS)) and trainer.global_step == HALF:
                trainer.save_checkpoint(out / f"half-{ranks}.ckpt")

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            local = [getattr(p, "_local_tensor", p) for p in pl_module.parameters() if p.requires_grad]
            whole = [p for p in pl_module.parameters() if p.requires_grad]
            record = {
                "norms": self.norms,
                "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
                "share": sum(t.numel() for t in local) / sum(p.numel() for p in whole),
                "sharded modules": len(sharded_modules(pl_module.clip)),
            }
            (out / f"{self.way}-{ranks}-{trainer.global_rank}.json").write_text(json.dumps(record))

    for way, changes in [*WAYS.items(), (RESUMED, {})]:
        # every rank begins with the first one's weights, whatever it has drawn itself
        seed_everything(int(os.environ.get("RANK", "0")), verbose=False)
        options = dict(changes)
        rates = {name: options.pop(name) for name in ("layer_decay", "freeze_below") if name in options}
        clip, precision = options.pop("clip", "norm"), options.pop("precision", "32-true")
        if ranks == 1:
            options.pop("micro_batch_size", None)
        if "lora" in options:
            options["lora"] = LoRAConfig(**options["lora"])
        module = CLIPModule(
            **{"image_tower": "random:test_vit", "freeze": "none"} | options,
            text_tower=f"random:{bert}",
            embed_dim=16,
            image_size=32,
            optimizer=OptimizerConfig(image_lr=1e-4, text_lr=1e-4, **rates),
        )
        for part in module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        if way == "bf16" and ranks == 1:
            torch.save({n: p.detach().clone() for n, p in module.named_parameters()}, out / f"{way}-start.pt")
        data = CaptionDataModule(
            module.transform,
            module.tokenize,
            scenes,
            batch_size=8 // ranks,
            captions_per_image=2,
            num_workers=0,
            cache="off",
        )
        trainer = Trainer(
            accelerator="cpu",
            devices=ranks,
            strategy=ShardedStrategy() if ranks > 1 else "auto",
            plugins=[SafeCheckpointIO()],
            precision=precision,
            gradient_clip_val=0.01 if clip == "value" else 0.5,
            gradient_clip_algorithm=clip,
            use_distributed_sampler=False,
            max_steps=STEPS,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=out,
            callbacks=[Record(way)],
        )
        trainer.fit(module, datamodule=data, ckpt_path=out / "half-2.ckpt" if way == RESUMED else None)
        trainer.save_checkpoint(out / f"{way}-{ranks}.ckpt")
        if way == "convolutions" and ranks == 2:
            (norm, *_) = (part for part in module.modules() if isinstance(part, torch.nn.BatchNorm2d))
            rank = torch.distributed.get_rank()
            module.clip.image_tower.fixed_statistics = False
            module.train()
            assert norm.training and norm.running_mean is not None
            norm.running_mean.fill_(rank + 1)
            broadcast_statistics(module.clip)
            (out / f"statistics-{rank}.json").write_text(json.dumps(norm.running_mean.tolist()))


def torchrun(*words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, **settings)


@pytest.fixture(scope="module")
def results(scenes: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sharding")
    words = [__file__, str(scenes), str(bert), str(out)]
    two = torchrun(*words)
    assert two.returncode == 0, two.stderr
    one = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
    assert one.returncode == 0, one.stderr
    return out


def record(results: Path, way: str, ranks: int, rank: int = 0) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((results / f"{way}-{ranks}-{rank}.json").read_text())
    return content


@pytest.mark.parametrize("way", WAYS)
def test_twenty_steps_are_those_of_one_process(results: Path, way: str) -> None:
    import torch

    from clip_lightning.model.sharded_checkpoints import read_checkpoint

    one, two = (read_checkpoint(results / f"{way}-{ranks}.ckpt") for ranks in (1, 2))
    for checkpoint in (one, two):
        checkpoint["state_dict"] |= checkpoint["adapters"]
    assert one["state_dict"].keys() == two["state_dict"].keys()
    if way == "bf16":  # rounding makes another end of the same way
        start = torch.load(results / f"{way}-start.pt", weights_only=True)
        moved = [
            torch.cat([(c["state_dict"][name] - start[name]).flatten() for name in start]) for c in (one, two)
        ]
        assert moved[0].norm() > 0.1
        assert torch.cosine_similarity(*moved, dim=0) > 0.9995
        return
    for stored in (one["state_dict"], two["state_dict"]):
        for name in stored:
            # attention does not depend on the keys' bias: its gradient is rounding, which Adam makes steps of
            if name.endswith("qkv.bias"):
                stored[name].chunk(3)[1].zero_()
            if name.endswith("key.bias"):
                stored[name].zero_()
    worst = {
        name: (one["state_dict"][name] - tensor).abs().max().item()
        for name, tensor in two["state_dict"].items()
    }
    assert max(worst.values()) < 2e-6, max(worst.items(), key=lambda item: item[1])
    moments = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (one, two)]
    assert moments[0].keys() == moments[1].keys() and moments[0]
    for number, moment in moments[0].items():
        for name, tensor in moment.items():
            assert (tensor - moments[1][number][name]).abs().max() < 1e-4, (number, name)
    norms = [record(results, way, ranks)["norms"] for ranks in (1, 2)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert min(norms[0]) > 0.5, "they were clipped"


@pytest.mark.parametrize("way", WAYS)
def test_every_rank_holds_half_of_the_trained_towers(results: Path, way: str) -> None:
    shares = [record(results, way, 2, rank)["share"] for rank in range(2)]
    # heads are whole on both, and of a few weights one rank has one more row than the other
    assert sum(shares) == pytest.approx(1.05, abs=0.05)
    assert max(shares) < 0.6


@pytest.mark.parametrize("way", WAYS)
def test_metrics_are_those_of_one_process(results: Path, way: str) -> None:
    if way == "bf16":
        pytest.skip("ranks of pictures that are close to each other change with rounding")
    one = {k: v for k, v in record(results, way, 1)["metrics"].items() if k.startswith("val/")}
    for rank in range(2):
        two = {k: v for k, v in record(results, way, 2, rank)["metrics"].items() if k.startswith("val/")}
        assert two == pytest.approx(one, abs=1e-4)
    assert "val/rsum" in one


def test_a_run_goes_on_exactly(results: Path) -> None:
    import torch

    from clip_lightning.model.sharded_checkpoints import read_checkpoint

    whole, resumed = (read_checkpoint(results / f"{way}-2.ckpt") for way in ("transformer", RESUMED))
    assert record(results, RESUMED, 2)["norms"] == record(results, "transformer", 2)["norms"][HALF:]
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name


def test_one_process_goes_on_from_a_checkpoint_of_two(results: Path) -> None:
    from clip_lightning.model.sharded_checkpoints import read_checkpoint

    whole, resumed = (read_checkpoint(results / f"{way}-1.ckpt") for way in ("transformer", RESUMED))
    assert len(record(results, RESUMED, 1)["norms"]) == STEPS - HALF
    for name, tensor in whole["state_dict"].items():
        assert (tensor - resumed["state_dict"][name]).abs().max() < 2e-6, name


class Stops(Callback):
    """Asks one rank to stop, as a scheduler does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.faults
def test_a_run_that_is_stopped_goes_on_exactly_and_by_ddp(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from clip_lightning.model.clip import CLIP
    from clip_lightning.model.sharded_checkpoints import read_checkpoint, shards_of
    from clip_lightning.training.runs import find_checkpoint
    from clip_lightning.training.trained_model import load_checkpoint

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]]))
    options: dict[str, Any] = {
        "model.image_tower": "random:test_vit",
        "model.freeze": "none",
        "model.dropout": 0.2,
        "data.augmentation.min_scale": 0.5,
        "data.cache": "off",
        "predictions.queries": 0,
    }

    def fit(runs: str, *more: str, strategy: str = "fsdp") -> int:
        how = {"data.batch_size": 4, "trainer.devices": 2, "trainer.strategy": strategy}
        line = [sys.executable, "-m", "clip_lightning", *command("fit", tmp_path / runs, **options | how)]
        done = subprocess.run([*line, *more], capture_output=True, text=True, timeout=200)
        assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
        return done.returncode

    def last(runs: str) -> Path:
        (file,) = (tmp_path / runs).glob("*/checkpoints/last.ckpt")
        return file

    def difference(one: dict[str, Any], two: dict[str, Any]) -> float:
        assert one["global_step"] == two["global_step"] == 8
        assert one["state_dict"].keys() == two["state_dict"].keys()
        pairs = [(one["state_dict"][name], two["state_dict"][name]) for name in one["state_dict"]]
        states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (one, two)]
        pairs += [(m[name], states[1][n][name]) for n, m in states[0].items() for name in m]
        return max((a - b).abs().max().item() for a, b in pairs)

    assert fit("whole") == 0
    assert fit("parts", "--trainer.callbacks+=test_sharding.Stops", "--trainer.callbacks.step=5") == 143
    stored = torch.load(last("parts"), weights_only=True)
    assert stored["global_step"] in (5, 6)
    assert any(value.is_meta for value in stored["state_dict"].values()), "it is sharded"
    shutil.copytree(tmp_path / "parts", tmp_path / "ddp")
    assert fit("parts", "--ckpt_path=last") == 0
    assert fit("ddp", "--ckpt_path=last", strategy="ddp") == 0
    whole = read_checkpoint(last("whole"))
    assert difference(whole, read_checkpoint(last("parts"))) == 0
    assert difference(whole, read_checkpoint(last("ddp"))) < 1e-5
    assert fit("ddp", "--ckpt_path=last", "--trainer.max_epochs=3") == 0, "sharded again"
    assert not list(last("parts").parent.glob(".*")), "no drafts are left"
    # last, previous and best
    assert len(list(last("parts").parent.glob("*.shards"))) == 3
    _, second = shards_of(last("whole"))
    second.write_bytes(second.read_bytes()[:-1])
    assert find_checkpoint("last", tmp_path / "whole") == last("whole").with_name("previous.ckpt")
    bundle = CLIP.from_pretrained(last("parts").parents[1] / "model")
    exported = load_checkpoint(last("parts").with_name("best.ckpt"))
    for name, tensor in bundle.state_dict().items():
        assert torch.equal(tensor, exported.state_dict()[name]), name


@pytest.mark.parametrize(
    "shards",
    [
        {"folder": "..", "files": {}},
        {"folder": "/", "files": {}},
        {"folder": 3, "files": {}},
        {"folder": "a-01234567.shards", "files": {"../b.safetensors": 1}},
        {"folder": "a-01234567.shards"},
        [1],
    ],
)
def test_a_strangers_checkpoint_names_no_other_place(results: Path, tmp_path: Path, shards: Any) -> None:
    import torch

    from clip_lightning.errors import UserError
    from clip_lightning.model.sharded_checkpoints import read_checkpoint, remove_old_shards
    from clip_lightning.training.checkpoints import damage

    checkpoint = torch.load(results / "transformer-2.ckpt", weights_only=True)
    checkpoint["shards"] = shards
    torch.save(checkpoint, tmp_path / "last.ckpt")
    assert "names shards as no checkpoint" in str(damage(tmp_path / "last.ckpt"))
    with pytest.raises(UserError, match="names shards as no checkpoint"):
        read_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "a-01234567.shards").mkdir()
    remove_old_shards(tmp_path)
    assert (tmp_path / "a-01234567.shards").exists(), (
        "nothing is removed where a checkpoint is not understood"
    )


def test_no_memory_is_taken_for_shapes_that_are_not_there(results: Path, tmp_path: Path) -> None:
    import torch

    from clip_lightning.errors import UserError
    from clip_lightning.model.sharded_checkpoints import read_checkpoint, shards_of

    folder = next(iter(shards_of(results / "transformer-2.ckpt"))).parent
    shutil.copytree(folder, tmp_path / folder.name)
    checkpoint = torch.load(results / "transformer-2.ckpt", weights_only=True)
    name = next(name for name, value in checkpoint["state_dict"].items() if value.is_meta)
    checkpoint["state_dict"][name] = torch.empty(10**12, device="meta")
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="its shards have no"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_only_what_nothing_names_is_removed(tmp_path: Path) -> None:
    import torch

    from clip_lightning.model.sharded_checkpoints import remove_old_shards

    names = ["last-00000001.shards", "last-00000002.shards", ".last-00000003.shards.tmp", "my.shards"]
    for name in names:
        (tmp_path / name).mkdir()
    torch.save({"shards": {"folder": names[0], "files": {}}}, tmp_path / "last.ckpt")
    remove_old_shards(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last-00000001.shards",
        "last.ckpt",
        "my.shards",
    ]


def test_lightnings_own_strategy_is_refused(make_module: Callable[..., Any]) -> None:
    from types import SimpleNamespace

    from lightning.pytorch.strategies import ModelParallelStrategy

    from clip_lightning.errors import UserError
    from clip_lightning.training.sharding import check_shardable

    trainer: Any = SimpleNamespace(strategy=ModelParallelStrategy(), precision="32-true", callbacks=[])
    with pytest.raises(UserError, match="is not how this model is sharded"):
        check_shardable(make_module(freeze="none").clip, None, trainer)


def test_every_rank_has_the_first_ones_statistics(results: Path) -> None:
    for rank in range(2):
        assert set(json.loads((results / f"statistics-{rank}.json").read_text())) == {1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": "both"}, "none is trained"),
        ({"micro_batch_size": "auto"}, "micro_batch_size auto does not go"),
        ({"precision": "16-mixed"}, "precision 16-mixed does not go"),
        ({"averaged": True}, "averaged weights"),
        ({"scalar": True}, "is a single number"),
    ],
)
def test_what_does_not_go_with_sharding(
    make_module: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    from types import SimpleNamespace

    from lightning.pytorch.callbacks import EMAWeightAveraging
    from torch import nn, tensor

    from clip_lightning.errors import UserError
    from clip_lightning.training.sharding import ShardedStrategy, check_shardable

    module = make_module(freeze=changes.get("freeze", "none"))
    if "scalar" in changes:
        module.clip.image_tower.backbone.gain = nn.Parameter(tensor(1.0))
    trainer: Any = SimpleNamespace(
        strategy=ShardedStrategy(),
        precision=changes.get("precision", "bf16-mixed"),
        callbacks=[EMAWeightAveraging()] if "averaged" in changes else [],
    )
    with pytest.raises(UserError, match=message):
        check_shardable(module.clip, changes.get("micro_batch_size"), trainer)


def test_containers_are_not_sharded_themselves() -> None:
    from torch import nn

    from clip_lightning.training.sharding import _layers

    block = nn.Linear(2, 2)
    nested = nn.Module()
    nested.blocks = nn.ModuleList([nn.ModuleList([block]), nn.Sequential(nn.ReLU(), nn.Linear(2, 2))])
    assert list(_layers(nested)) == [block, nested.blocks[1]]


def test_a_damaged_share_is_found(results: Path, tmp_path: Path) -> None:
    from clip_lightning.errors import UserError
    from clip_lightning.model.sharded_checkpoints import read_checkpoint, shards_of
    from clip_lightning.training.checkpoints import damage

    file = Path(shutil.copy(results / "transformer-2.ckpt", tmp_path))
    assert "cannot be read (No such file or directory)" in str(damage(file))
    with pytest.raises(UserError, match="is one part of a checkpoint"):
        read_checkpoint(file)
    first, second = shards_of(file)
    shutil.copytree(next(iter(shards_of(results / file.name))).parent, first.parent)
    assert damage(file) is None
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)
    assert damage(file) == f"{second} does not match its checksum"


if __name__ == "__main__":
    run_everything(*map(Path, sys.argv[1:]))
