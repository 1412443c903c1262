"""Checks on one GPU what was only ever checked on a CPU. Each check prints ok, or what differs.

python benchmarks/gpu_check.py    # without a GPU, it only shows that the checks run
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from gpu_step import DEVICE, Repeated, bert, random_batch, without_dropout
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from trainer import plain_trainer

from clip_lightning import CaptionDataModule, CLIPModule
from clip_lightning.data import datasets
from clip_lightning.data.features import FeatureCache
from clip_lightning.data.scenes import write_scenes
from clip_lightning.evaluation.retrieval import retrieval_ranks
from clip_lightning.model.lora import LoRAConfig
from clip_lightning.training import losses
from clip_lightning.training.build import TowerOptions
from clip_lightning.training.extract import Extractor
from clip_lightning.training.losses import ContrastiveLoss, InfoNCE, SigLIP
from clip_lightning.training.optim import OptimizerConfig

BATCH, PIXELS, TOKENS = 16, 160, 12
Weights = dict[str, Tensor]


class Checks:
    """Runs checks and remembers the failed ones."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.failed: list[str] = []

    def run(self, name: str, check: Callable[..., str | None], *args: Any, **options: Any) -> None:
        try:
            print("ok    ", name, check(*args, **options) or "", flush=True)
        except Exception as error:
            self.failed.append(name)
            print("FAILED", name, f"{type(error).__name__}: {str(error)[:300]}", flush=True)

    def build(self, image: str = "test_vit", freeze: Any = "none", **options: Any) -> CLIPModule:
        torch.manual_seed(0)
        module = CLIPModule(f"random:{image}", self.text, freeze=freeze, **options)
        without_dropout(module)
        return module

    # Each check returns what it found, or raises.

    def loss_in_blocks(self, loss: ContrastiveLoss, bias: float | None, block: int) -> str:
        """Compare value and gradients in bf16 autocast with one block in fp64 on the CPU."""
        generator = torch.Generator().manual_seed(1)
        pairs = torch.randn(2, 96, 64, generator=generator, dtype=torch.float64)
        ids = torch.arange(96) // 2
        results = []
        for device, dtype, size in (("cpu", torch.float64, 2**30), (DEVICE, torch.float32, block)):
            image, text = (
                F.normalize(rows, dim=-1).to(device, dtype).requires_grad_() for rows in pairs.unbind()
            )
            own = losses.Pairs(image, text, ids.to(device), ids.to(device))
            scale = torch.tensor(20.0, device=device, dtype=dtype)
            offset = None if bias is None else torch.tensor(bias, device=device, dtype=dtype)
            autocast = contextlib.nullcontext() if device == "cpu" else torch.autocast(device, torch.bfloat16)
            with mock.patch.multiple(losses, BLOCK=size, GPU_BLOCK=size):
                with autocast:
                    value = loss.rows(own, own, scale, offset)
                value.backward()
            results.append((value.detach(), image.grad, text.grad))
        return " ".join(near(ours, exact, 2e-4) for exact, ours in zip(*results, strict=True))

    def fp32_against_cpu(self) -> str:
        if DEVICE == "cpu":
            return "(no GPU)"
        ours, _ = fit(self.build(), precision="32-true")
        exact, _ = fit(self.build(), precision="32-true", accelerator="cpu")
        return distance(ours, exact, weights(self.build()), most=0.03)

    def gradient_caching(self) -> str:
        ours, _ = fit(self.build(micro_batch_size=4))
        exact, _ = fit(self.build())
        return distance(ours, exact, weights(self.build()), most=0.3)

    def batch_norm_under_caching(self) -> None:
        module = self.build("test_resnet", micro_batch_size=4)
        fit(module, steps=2)
        counts = {int(value) for name, value in module.named_buffers() if name.endswith("batches_tracked")}
        assert counts == {2 * BATCH // 4}, counts

    def skipped_step(self) -> None:
        module = self.build("test_resnet")
        before = copy.deepcopy(module.state_dict())
        head = next(p for name, p in module.clip.named_parameters() if "heads" in name and p.ndim == 2)
        hook = head.register_hook(lambda gradient: gradient * math.nan)
        fit(module, steps=1)
        hook.remove()
        for name, value in module.state_dict().items():
            assert name.endswith("batches_tracked") or torch.equal(value.cpu(), before[name].cpu()), name

    def automatic_micro_batch(self) -> str:
        module = self.build(micro_batch_size="auto")
        fit(module, steps=2, rows=64)
        assert isinstance(module.micro_batch_size, int)
        return str(module.micro_batch_size)

    def loss_falls(self, precision: str = "bf16-mixed", **options: Any) -> str:
        rates = OptimizerConfig(lr=1e-3, image_lr=1e-3, text_lr=1e-3)
        module = self.build(optimizer=rates, **options)
        _, loss = fit(module, steps=25, precision=precision)
        assert loss < 0.9 * math.log(BATCH), loss
        return f"loss {loss:.3f}, ln {BATCH} = {math.log(BATCH):.3f}"

    def feature_cache(self) -> str:
        tower = self.build(freeze="both").clip.text_tower
        captions = ["a dog runs", "two people on a very long bench by the sea", ""] * 50
        found = []
        with tempfile.TemporaryDirectory() as folder:
            for device in ("cpu", DEVICE):
                precision = None if device == "cpu" else torch.bfloat16
                extractor = Extractor(FeatureCache(Path(folder, device)), torch.device(device), precision)
                features = extractor.text_features(tower, captions, "captions")
                found.append(torch.as_tensor(features.rows(range(len(captions)))))
        return near(found[1], found[0], 2e-2)

    def heads(self) -> str:
        """Train heads on cached features, which stay on the GPU, and compare with the CPU."""
        found = []
        with tempfile.TemporaryDirectory() as folder:
            write_scenes(Path(folder, "scenes"), count=200, size=32, seed=0)
            for accelerator in ("cpu", "gpu" if DEVICE == "cuda" else "cpu"):
                module = self.build(freeze="both")
                cache = str(Path(folder, f"cache-{len(found)}"))
                inputs = module.transform, module.tokenize
                data = CaptionDataModule(*inputs, root=f"{folder}/scenes", batch_size=32, cache=cache)
                trainer = plain_trainer(accelerator=accelerator, devices=1, precision="32-true", max_epochs=2)
                start = weights(module)
                trainer.fit(module, data)
                found.append(weights(module))
                on_gpu = next(iter(data.train_dataloader()))["image_features"].is_cuda
                assert on_gpu == (accelerator == "gpu")
        return distance(found[1], found[0], start, most=0.03)

    def ranks(self) -> None:
        generator = torch.Generator().manual_seed(0)
        image, text = (F.normalize(torch.randn(n, 64, generator=generator), dim=-1) for n in (300, 1500))
        owner = torch.arange(300).repeat_interleave(5)
        exact = retrieval_ranks(image, text, owner)
        ours = retrieval_ranks(image.to(DEVICE), text.to(DEVICE), owner.to(DEVICE))
        assert all(torch.equal(one.cpu(), other) for one, other in zip(ours, exact, strict=True))

    def text_groups(self) -> str:
        module = self.build().to(DEVICE).eval()
        batch = random_batch(64, PIXELS, 32, device="cpu")
        with mock.patch.object(datasets, "MANY_TEXTS", 1):
            groups = datasets.length_groups(batch["attention_mask"])
        batch = {name: value.to(DEVICE) for name, value in batch.items()}
        order = groups["text_order"].to(DEVICE)
        with torch.no_grad():
            texts = [module._encode(batch | more)[1] for more in ({}, {**groups, "text_order": order})]
        return near(texts[1], texts[0], 1e-3)

    def waits(self) -> str:
        """Count what makes the host wait for the device, per step, in steps 5 to 9."""
        if DEVICE == "cpu":
            return "(no GPU)"
        names = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::_local_scalar_dense")

        class Count(Callback):
            def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
                if index == 5:
                    self.profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
                    self.profile.__enter__()

            def on_train_batch_end(
                self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int
            ) -> None:
                if index == 8:
                    self.profile.__exit__(None, None, None)

        count = Count()
        fit(self.build(), steps=10, callbacks=[count], log_every_n_steps=10)
        found = {event.key: event.count / 4 for event in count.profile.key_averages() if event.key in names}
        assert not found, found
        return "none"


def near(ours: Tensor, exact: Tensor, tolerance: float) -> str:
    """Return the relative difference, which must not exceed the tolerance."""
    ours, exact = ours.double().cpu(), exact.double().cpu()
    difference = float((ours - exact).norm() / exact.norm().clamp(min=1e-30))
    assert difference <= tolerance, f"the relative difference {difference:.2e} exceeds {tolerance}"
    return f"{difference:.1e}"


def distance(ours: Weights, exact: Weights, start: Weights, most: float) -> str:
    """Return how far apart the weights ended, as a fraction of the way they went."""
    apart = math.sqrt(sum(float((ours[name] - exact[name]).square().sum()) for name in exact))
    way = math.sqrt(sum(float((exact[name] - start[name]).square().sum()) for name in exact))
    assert apart <= most * way, f"the weights are {apart / way:.3f} of the way apart, more than {most}"
    return f"{apart / way:.4f} of the way apart"


def weights(module: nn.Module) -> Weights:
    return {name: parameter.detach().cpu().clone() for name, parameter in module.named_parameters()}


def fit(module: CLIPModule, steps: int = 4, rows: int = BATCH, **options: Any) -> tuple[Weights, float]:
    """Train on one batch, and return the weights and the last loss."""
    accelerator = "gpu" if DEVICE == "cuda" else "cpu"
    trainer = plain_trainer(**{"accelerator": accelerator, "devices": 1, "precision": "bf16-mixed"} | options)
    batch = random_batch(rows, PIXELS, TOKENS, device="cpu")
    trainer.fit(module, DataLoader(Repeated(batch, steps), batch_size=None))
    return weights(module), float(trainer.callback_metrics["train/loss"])


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        checks = Checks(bert(Path(folder, "bert"), **tiny))
        for loss, bias in ((InfoNCE(0.1), None), (SigLIP(), -10.0)):
            for block in (2**22, 2**10):
                name = f"{type(loss).__name__} in blocks of {block}, against one block in fp64 on the CPU"
                checks.run(name, checks.loss_in_blocks, loss, bias, block)
        checks.run("4 steps in fp32 end at the weights of the CPU", checks.fp32_against_cpu)
        checks.run("micro-batches of 4 end at the weights of the complete batch", checks.gradient_caching)
        checks.run("batch-norm statistics change once per micro-batch", checks.batch_norm_under_caching)
        checks.run("a NaN gradient leaves weights and statistics as they were", checks.skipped_step)
        checks.run("micro_batch_size auto finds a size and trains", checks.automatic_micro_batch)
        settings: dict[str, dict[str, Any]] = {
            "bf16-mixed": {},
            "16-mixed": {"precision": "16-mixed"},
            "activation checkpointing": {"towers": TowerOptions(activation_checkpointing=True)},
            "compile": {"towers": TowerOptions(compile=True)},
            "a frozen image tower": {"freeze": "image"},
            "LoRA": {"freeze": "both", "lora": LoRAConfig(rank=4)},
        }
        for name, options in settings.items():
            checks.run(f"the loss of one batch falls in 25 steps: {name}", checks.loss_falls, **options)
        checks.run("features in bf16 are those of the CPU in fp32, within 2 %", checks.feature_cache)
        checks.run("heads on features that stay on the GPU end at the weights of the CPU", checks.heads)
        checks.run("retrieval ranks are those of the CPU", checks.ranks)
        checks.run("texts in groups of similar length have the same embeddings", checks.text_groups)
        checks.run("no wait for the device between logged steps", checks.waits)
    print("failed:", ", ".join(checks.failed) or "nothing")
    sys.exit(bool(checks.failed))


if __name__ == "__main__":
    main()
