"""Peak memory and time of one training step with gradient caching, from a small to a very large batch.

    python benchmarks/gradient_cache.py [--batches 128 512 2048 4096 8192 16384] [--micro 128] [--threads 1]

Both towers are trained, on synthetic pictures and captions that two loader workers make. Every size runs in a
process of its own. Writes Markdown and JSON into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import report
import torch

from clip_lightning.cpu import keep_freed_memory

IMAGE_TOWER = "random:mobilenetv3_small_100"
IMAGE_SIZE, TOKENS, WORDS, TEXT_WIDTH, EMBED_DIM, WORKERS = 64, 16, 1000, 256, 512, 2


def text_folder(folder: Path) -> Path:
    """A BERT with 2 layers; few words, so that the embedding table hides nothing of the batch."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(WORDS - 5))]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    config = {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": WORDS, "hidden_size": TEXT_WIDTH,
        "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 4 * TEXT_WIDTH,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Pairs(torch.utils.data.Dataset):
    """Noise as pictures and random words as captions, each a function of its index."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        chance = torch.Generator().manual_seed(index)
        shape = (3, IMAGE_SIZE, IMAGE_SIZE)
        return {
            "pixel_values": torch.randint(0, 256, shape, dtype=torch.uint8, generator=chance),
            "input_ids": torch.randint(5, WORDS, (TOKENS,), generator=chance),
            "attention_mask": torch.ones(TOKENS, dtype=torch.int64),
            "image_id": index,
            "text_image_id": index,
        }


class Watch(threading.Thread):
    """The most that this process and its workers had in memory, in bytes; shared pages count once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = self.worker_peak = 0
        self.start()

    def run(self) -> None:
        me = psutil.Process()
        while True:
            workers = 0
            for worker in me.children(recursive=True):
                try:
                    workers += worker.memory_full_info().pss
                except psutil.Error:  # it has ended
                    continue
            self.peak = max(self.peak, me.memory_full_info().pss + workers)
            self.worker_peak = max(self.worker_peak, workers)
            time.sleep(0.1)


def measure(batch: int, micro: int, threads: int, texts: Path) -> dict[str, Any]:
    """Train in this process: a step of one micro-batch, for gradients and moments, then the one measured."""
    from lightning.pytorch import Callback, seed_everything
    from trainer import plain_trainer

    from clip_lightning import CLIPModule
    from clip_lightning.training.build import HeadOptions

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    seed_everything(0, verbose=False)
    seen: dict[str, Any] = {}

    class Clock(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
            seen["batch_bytes"] = sum(tensor.nbytes for tensor in batch.values())
            self.began = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seen["seconds"] = time.perf_counter() - self.began

    module = CLIPModule(
        IMAGE_TOWER,
        f"random:{texts}",
        freeze="none",
        heads=HeadOptions(EMBED_DIM),
        image_size=IMAGE_SIZE,
        micro_batch_size=micro,
    )
    trainer = plain_trainer(
        accelerator="auto",
        devices=1,
        max_steps=2,
        callbacks=[Clock()],
    )
    loader = torch.utils.data.DataLoader(
        Pairs(batch), batch_sampler=[range(micro), range(batch)], num_workers=WORKERS
    )
    watch = Watch()
    trainer.fit(module, loader)
    row = {
        "batch": batch,
        "peak_bytes": watch.peak,
        "worker_peak_bytes": watch.worker_peak,
        "parameters": sum(p.numel() for p in module.parameters()),
        **seen,
    }
    if torch.cuda.is_available():
        row["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 512, 2048, 4096, 8192, 16384])
    parser.add_argument("--micro", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        keep_freed_memory()
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


def write(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    header = report.header(
        "torch",
        micro_batch_size=args.micro,
        threads=args.threads,
        workers=WORKERS,
        image=f"{IMAGE_TOWER}, {IMAGE_SIZE} px",
        text=f"BERT, 2 layers, {TEXT_WIDTH} wide, {WORDS} words, {TOKENS} tokens",
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else header["machine"]
    memory = "peak_gpu_bytes" if torch.cuda.is_available() else "peak_bytes"
    lines = [
        "# One training step with gradient caching",
        "",
        f"{header['date']}, {device}, {args.threads} threads, torch {torch.__version__}, fp32",
        "",
        f"Synthetic input from {WORKERS} loader workers, micro-batches of {args.micro}, both towers trained:",
        f"{header['image']} and {header['text']}; {rows[0]['parameters'] / 1e6:.1f} M parameters,",
        "InfoNCE, AdamW, clipping. Peak: of the process with its workers (PSS, 10 times a second), imports",
        "and weights included; on a GPU what was allocated there. Input: the batch, which is in that peak.",
        "Time: of the second step; the first is one micro-batch.",
        "",
        f"| batch | peak MB | × that of {rows[0]['batch']} | input MB | without it × | workers MB | s a step "
        "| samples a second |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first = rows[0]
    for row in rows:
        rest = (row[memory] - row["batch_bytes"]) / (first[memory] - first["batch_bytes"])
        lines.append(
            f"| {row['batch']:,} | {row[memory] / 1e6:,.0f} | {row[memory] / first[memory]:.2f} "
            f"| {row['batch_bytes'] / 1e6:,.0f} | {rest:.2f} | {row['worker_peak_bytes'] / 1e6:,.0f} "
            f"| {row['seconds']:.1f} | {row['batch'] / row['seconds']:.0f} |"
        )
    report.save(args.out, "gradient_cache", header, rows, lines)


if __name__ == "__main__":
    main()
