"""Which settings help: every choice against one baseline, several seeds each.

    python benchmarks/ablation.py --root FLICKR8K [--study heads|text] [--seeds 3] [--only NAME ...]

`heads`: both towers frozen, features from the cache, a run takes seconds. `text`: from heads that are trained
already the text tower is trained too, on cached pictures; a run takes minutes. Settings are chosen on 1,000
pictures held out of Flickr8k's train split; the official dev split is not looked at. Writes Markdown and JSON
into benchmarks/results.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import report
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from trainer import plain_trainer

from clip_lightning import CaptionDataModule, CLIPModule
from clip_lightning.cpu import keep_freed_memory
from clip_lightning.data.features import CacheOptions
from clip_lightning.files import cache_folder
from clip_lightning.model.lora import LoRAConfig
from clip_lightning.training.build import HeadOptions
from clip_lightning.training.losses import InfoNCE, SigLIP
from clip_lightning.training.optim import OptimizerConfig

HELD_OUT = 1000
BASELINE = {
    "loss": "InfoNCE", "smoothing": 0.0, "head": "linear", "embed_dim": 512, "dropout": 0.3, "views": 2,
    "captions": 1, "batch": 256, "epochs": 20, "lr": 1e-3, "decay": 0.1, "ema": 0.0,
    "freeze": "both", "text_lr": 0.0, "layer_decay": 1.0, "lora_rank": 0, "start": None, "matryoshka": None,
}  # fmt: skip
START = (
    "3 captions, smoothing 0.1, width 1024, 12 epochs, lr 2e-3"  # what the text tower's training starts from
)
TEXT_BASELINE = BASELINE | {
    "freeze": "image", "lr": 3e-4, "text_lr": 1e-4, "smoothing": 0.1, "embed_dim": 1024, "epochs": 3,
}  # fmt: skip
HEAD_CHANGES: dict[str, dict[str, object]] = {
    "baseline": {},
    "SigLIP": {"loss": "SigLIP"},
    "SigLIP, lr 3e-3": {"loss": "SigLIP", "lr": 3e-3},
    "label smoothing 0.1": {"smoothing": 0.1},
    "mlp": {"head": "mlp"},
    "width 256": {"embed_dim": 256},
    "width 1024": {"embed_dim": 1024},
    "width 2048": {"embed_dim": 2048},
    "dropout 0": {"dropout": 0.0},
    "dropout 0.1": {"dropout": 0.1},
    "dropout 0.5": {"dropout": 0.5},
    "1 view": {"views": 1},
    "4 views": {"views": 4},
    "2 captions": {"captions": 2},
    "5 captions": {"captions": 5},
    "batch 128": {"batch": 128},
    "batch 512": {"batch": 512},
    "batch 1024, same steps": {"batch": 1024, "epochs": 75},
    "lr 3e-4": {"lr": 3e-4},
    "lr 2e-3": {"lr": 2e-3},
    "lr 3e-3": {"lr": 3e-3},
    "decay 0.3": {"decay": 0.3},
    "decay 1.0": {"decay": 1.0},
    "40 epochs": {"epochs": 40},
    "EMA 0.99": {"ema": 0.99},
    "5 captions, width 1024, dropout 0.5": {"captions": 5, "embed_dim": 1024, "dropout": 0.5},
    # second round: on top of what helped most
    "5 captions, smoothing 0.1": {"captions": 5, "smoothing": 0.1},
    "5 captions, width 2048": {"captions": 5, "embed_dim": 2048},
    "5 captions, smoothing 0.1, width 1024": {"captions": 5, "smoothing": 0.1, "embed_dim": 1024},
    "5 captions, lr 2e-3": {"captions": 5, "lr": 2e-3},
    "5 captions, batch 128": {"captions": 5, "batch": 128},
    # third round: less work for as much recall; and SigLIP under what helped InfoNCE
    "3 captions, smoothing 0.1, width 1024": {"captions": 3, "smoothing": 0.1, "embed_dim": 1024},
    "3 captions, smoothing 0.1, width 1024, 12 epochs, lr 2e-3": {
        "captions": 3,
        "smoothing": 0.1,
        "embed_dim": 1024,
        "epochs": 12,
        "lr": 2e-3,
    },
    "5 captions, smoothing 0.1, width 1024, 12 epochs, lr 2e-3": {
        "captions": 5,
        "smoothing": 0.1,
        "embed_dim": 1024,
        "epochs": 12,
        "lr": 2e-3,
    },
    "5 captions, smoothing 0.1, 12 epochs, lr 2e-3": {
        "captions": 5,
        "smoothing": 0.1,
        "epochs": 12,
        "lr": 2e-3,
    },
    "SigLIP, lr 3e-3, 5 captions, width 1024": {
        "loss": "SigLIP",
        "lr": 3e-3,
        "captions": 5,
        "embed_dim": 1024,
    },
}
TEXT_CHANGES: dict[str, dict[str, object]] = {
    "whole tower, 1e-4": {},
    "heads alone": {"freeze": "both"},
    "layer-wise decay 0.8": {"layer_decay": 0.8},
    "LoRA of rank 8, 1e-3": {"lora_rank": 8, "text_lr": 1e-3},
}


@dataclass(frozen=True)
class Study:
    """What is asked: changes to a baseline, one in each row."""

    title: str
    towers: str
    baseline: dict[str, object]
    changes: dict[str, dict[str, object]]


STUDIES = {
    "heads": Study("Settings of the projection heads", "both frozen", BASELINE, HEAD_CHANGES),
    "text": Study(
        "Training the text tower", "pictures frozen, captions trained", TEXT_BASELINE, TEXT_CHANGES
    ),
}


def held_out_root(root: Path, folder: Path) -> Path:
    """The same pictures under split lists in which 1,000 pictures of train are dev, and dev is nothing."""
    train = (root / "Flickr_8k.trainImages.txt").read_text().split()
    random.Random(0).shuffle(train)
    if folder.is_dir():  # kept, so that its features stay in the cache
        return folder
    folder.mkdir(parents=True)
    (folder / "Images").symlink_to(root / "Images")
    (folder / "captions.txt").symlink_to(root / "captions.txt")
    (folder / "Flickr_8k.devImages.txt").write_text("\n".join(sorted(train[:HELD_OUT])))
    (folder / "Flickr_8k.trainImages.txt").write_text("\n".join(sorted(train[HELD_OUT:])))
    return folder


def train(root: Path, s: dict, seed: int, save: Path | None = None) -> dict[str, float]:
    """Train once, score the held-out pictures at the end, and keep the bundle if asked to."""
    module, trainer = fitted(root, s, seed)
    if save:
        module.clip.save_pretrained(save)
    return {
        name.removeprefix("val/"): float(v) for name, v in trainer.callback_metrics.items() if "val/" in name
    }


def fitted(root: Path, s: dict, seed: int) -> tuple[CLIPModule, Trainer]:
    """Train once, and validate at the end."""
    seed_everything(seed, verbose=False)
    loss = InfoNCE(s["smoothing"]) if s["loss"] == "InfoNCE" else SigLIP()
    towers = {} if s["start"] else {"image_tower": "pypi:efficientnet-lite0", "text_tower": "pypi:minilm-l6"}
    module = CLIPModule(
        **towers,
        init_from=s["start"],
        heads=HeadOptions(s["embed_dim"], s["head"], s["dropout"]),
        loss=loss,
        freeze=s["freeze"],
        lora=LoRAConfig("text", rank=s["lora_rank"]) if s["lora_rank"] else None,
        optimizer=OptimizerConfig(
            lr=s["lr"], text_lr=s["text_lr"], weight_decay=s["decay"], layer_decay=s["layer_decay"]
        ),
        matryoshka=s["matryoshka"],
    )
    data = CaptionDataModule(
        module.transform,
        module.tokenize,
        root=root,
        batch_size=s["batch"],
        captions_per_image=s["captions"],
        cache_options=CacheOptions(views=s["views"]),
    )
    callbacks: list[Callback] = [EMAWeightAveraging(decay=s["ema"])] if s["ema"] else []
    trainer = plain_trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_epochs=s["epochs"],
        check_val_every_n_epoch=s["epochs"],
        num_sanity_val_steps=0,
        callbacks=callbacks,
    )
    trainer.fit(module, datamodule=data)
    return module, trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--study", choices=STUDIES, default="heads")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    args = parser.parse_args()
    keep_freed_memory()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    rows = {}
    root = held_out_root(args.root.resolve(), cache_folder("flickr8k-held-out"))
    study = STUDIES[args.study]
    work = tempfile.TemporaryDirectory(prefix="ablation-")
    start = None
    if args.study == "text":
        start = str(Path(work.name, "start"))
        print("start:", train(root, BASELINE | HEAD_CHANGES[START], 0, Path(start))["rsum"], flush=True)
    for name, change in study.changes.items():
        if args.only and name not in args.only:
            continue
        began, settings = time.perf_counter(), study.baseline | change
        runs = [train(root, settings | {"start": start}, seed) for seed in range(args.seeds)]
        settings["start"] = start and START
        rows[name] = {"settings": settings, "runs": runs, "seconds": time.perf_counter() - began}
        print(name, summary(runs), flush=True)
        write(rows, args)


def summary(runs: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    keys = ("text_to_image_R@1", "image_to_text_R@1", "rsum")
    values = {key: [run[key] for run in runs] for key in keys}
    return {k: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for k, v in values.items()}


def write(rows: dict[str, dict], args: argparse.Namespace) -> None:
    study = STUDIES[args.study]
    header = report.header("torch", "lightning", seeds=args.seeds, held_out=HELD_OUT)
    lines = [
        f"# {study.title}",
        "",
        f"{header['date']}, {header['machine']}, torch {torch.__version__}",
        "",
        f"EfficientNet-Lite0 × MiniLM-L6, {study.towers}; {HELD_OUT} pictures held out of train;",
        f"mean ± standard deviation of {args.seeds} seeds. One change to the baseline in each row.",
        "",
        "| setting | text→image R@1 | image→text R@1 | rsum |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in summary(row["runs"]).values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    report.save(args.out, f"ablation-{args.study}", header, rows, lines)


if __name__ == "__main__":
    main()
