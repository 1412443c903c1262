"""Peak memory and time of one training step with gradient caching, from a small to a very large batch.

    python benchmarks/gradient_cache.py [--batches 128 512 1024 2048 4096] [--micro 128] [--threads 1]

Both towers are trained, on synthetic pictures and captions. Every size runs in a process of its own, because
peak memory (VmHWM) never falls. Writes Markdown and JSON into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import report
import torch

IMAGE_TOWER = "random:tf_efficientnet_lite0"
IMAGE_SIZE, TOKENS, WORDS, EMBED_DIM = 64, 16, 1000, 512


def text_folder(folder: Path) -> Path:
    """A BERT 384 wide with 2 layers; few words, so that the embedding table hides nothing of the batch."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(WORDS - 5))]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    config = {
        "model_type": "bert", "architectures": ["BertModel"], "hidden_size": 384, "num_hidden_layers": 2,
        "num_attention_heads": 12, "intermediate_size": 1536, "vocab_size": WORDS,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def memory(field: str) -> float:
    """`VmRSS` (resident now) or `VmHWM` (its peak so far) of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def synthetic_batch(batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, generator=generator)
    return {
        "pixel_values": pixels.permute(0, 3, 1, 2),
        "input_ids": torch.randint(5, WORDS, (batch, TOKENS), generator=generator),
        "attention_mask": torch.ones(batch, TOKENS, dtype=torch.int64),
        "image_id": torch.arange(batch),
        "text_image_id": torch.arange(batch),
    }


def measure(batch: int, micro: int, threads: int, texts: Path) -> dict[str, float]:
    """Train in this process: a step of one micro-batch, for gradients and moments, then the one measured."""
    from lightning.pytorch import Callback, Trainer, seed_everything

    from clip_lightning import CLIPModule

    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    seed_everything(0, verbose=False)
    seen: dict[str, float] = {}

    class Clock(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.began = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            seen["seconds"] = time.perf_counter() - self.began

    module = CLIPModule(
        IMAGE_TOWER,
        f"random:{texts}",
        freeze="none",
        embed_dim=EMBED_DIM,
        image_size=IMAGE_SIZE,
        micro_batch_size=micro,
    )
    whole = synthetic_batch(batch)
    data = [{name: tensor[:micro] for name, tensor in whole.items()}, whole]
    before = memory("VmRSS")
    trainer = Trainer(
        accelerator="cpu",
        max_steps=len(data),
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Clock()],
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    megabytes = sum(t.nbytes for t in whole.values()) / 2**20
    return {
        "batch": batch,
        "peak_mb": memory("VmHWM"),
        "before_mb": before,
        "batch_mb": megabytes,
        "seconds": seen["seconds"],
        "parameters": sum(p.numel() for p in module.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 512, 1024, 2048, 4096])
    parser.add_argument("--micro", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.batches[0], args.micro, args.threads, args.child)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        texts = text_folder(Path(folder))
        for batch in args.batches:
            command = [sys.executable, __file__, "--child", str(texts), "--batches", str(batch)]
            command += ["--micro", str(args.micro), "--threads", str(args.threads)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"batch {batch}: ended with {done.returncode}, left out", file=sys.stderr)
                continue
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
            write(rows, args)


def write(rows: list[dict[str, float]], args: argparse.Namespace) -> None:
    header = report.header(
        "torch",
        micro_batch_size=args.micro,
        threads=args.threads,
        image=f"{IMAGE_TOWER}, {IMAGE_SIZE} px",
        text=f"BERT, 2 layers, 384 wide, {WORDS} words, {TOKENS} tokens",
    )
    lines = [
        "# One training step with gradient caching",
        "",
        f"{header['date']}, {header['machine']}, {args.threads} threads, torch {torch.__version__}, fp32",
        "",
        f"Synthetic input, micro-batches of {args.micro}, both towers trained: {header['image']} and",
        f"{header['text']}; {rows[0]['parameters'] / 1e6:.1f} M parameters, InfoNCE, AdamW, clipping.",
        "Peak: of the whole process (VmHWM), imports and weights included. Added: what training adds to the",
        "process with model and batch in it. Time: of the second step; the first is one micro-batch.",
        "",
        f"| batch | peak MB | × that of {rows[0]['batch']} | batch itself MB | added MB | s a step "
        "| samples a second |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['batch']:,} | {row['peak_mb']:,.0f} | {row['peak_mb'] / rows[0]['peak_mb']:.2f} "
            f"| {row['batch_mb']:.0f} | {row['peak_mb'] - row['before_mb']:,.0f} | {row['seconds']:.1f} "
            f"| {row['batch'] / row['seconds']:.0f} |"
        )
    report.save(args.out, "gradient_cache", header, rows, lines)


if __name__ == "__main__":
    main()
