"""How fast pictures are indexed: `clip-lightning index` beside a bare loader and the image tower.

    python benchmarks/indexing.py --model BUNDLE --pictures FOLDER [--count 1000 --rounds 5 --threads 2]

The bare loop is what one would write without us: a DataLoader with as many workers, the bundle's own
transform, the model under inference mode, nothing kept. It sees the same pictures in batches of the same
size. What is compared is the time from the first picture to the last embedding, in alternating rounds in one
process. Writes Markdown and JSON into benchmarks/results.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import report
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image

from clip_lightning.cpu import keep_freed_memory
from clip_lightning.model.clip import CLIP
from clip_lightning.search.build import Options, build_index


class Pictures(Dataset):
    def __init__(self, paths: list[Path], transform) -> None:  # type: ignore[no-untyped-def]
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.transform(decode_image(str(self.paths[number]), ImageReadMode.RGB))


@torch.inference_mode()
def bare(clip: CLIP, paths: list[Path], batch_size: int, workers: int) -> float:
    """Seconds of a plain loop."""
    began = time.perf_counter()
    loader = DataLoader(Pictures(paths, clip.transform), batch_size, num_workers=workers)
    embeddings = torch.cat([clip.encode_image(pixels) for pixels in loader])
    assert embeddings.shape[0] == len(paths)
    return time.perf_counter() - began


def indexed(clip: CLIP, source: Path, options: Options) -> tuple[float, float]:
    """Seconds of the embedding and of the whole of an index from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        done = build_index(clip, source, Path(folder) / "index", options)
    return done.embedding_seconds, done.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pictures", type=Path, required=True, help="folder of JPEG files")
    parser.add_argument("--count", type=int, default=1000, help="of the pictures, the first by name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="of torch, and workers of each loader")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    clip = CLIP.from_pretrained(args.model)
    options = Options("flat", args.batch_size, args.threads, onnx=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, path.name) for path in sorted(args.pictures.glob("*.jpg"))[: args.count]]
        for path in paths:
            path.symlink_to((args.pictures / path.name).resolve())
        bare(clip, paths[:128], args.batch_size, args.threads)  # reads the code, starts the threads
        for _ in range(args.rounds):
            loop = bare(clip, paths, args.batch_size, args.threads)
            embedding, whole = indexed(clip, Path(folder), options)
            rows.append({"bare": loop, "embedding": embedding, "index": whole})
            print(rows[-1], flush=True)
    write(rows, len(paths), args)


def write(rows: list[dict[str, float]], count: int, args: argparse.Namespace) -> None:
    header = report.header(
        "torch", "torchvision", "faiss-cpu", pictures=count, threads=args.threads, batch_size=args.batch_size
    )
    names = {
        "bare": "bare loader and image tower",
        "embedding": "`index`, reading and embedding",
        "index": "`index`, all of it",
    }
    lines = ["# Indexing pictures", "", report.provenance(header), ""]
    lines += [
        f"{count:,} JPEG files, batches of {args.batch_size}, {args.threads} threads; {args.rounds}",
        "alternating rounds; medians, and of the ratio the median of the rounds' own. `index` also hashes",
        "every file, keeps shards as it goes, and writes the index to the disk (without the ONNX text tower,",
        "whose time does not depend on the pictures).",
        "",
        "| | pictures a second | time beside the bare loop |",
        "|---|---|---|",
    ]
    for name, title in names.items():
        speed = count / statistics.median(row[name] for row in rows)
        ratio = statistics.median(row[name] / row["bare"] for row in rows)
        lines.append(f"| {title} | {speed:.0f} | {ratio:.2f} |")
    report.save(args.out, "indexing", header, rows, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
