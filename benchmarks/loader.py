"""Pictures a second on one core, from file to the tower's pixels: ours against open_clip's transform.

    python benchmarks/loader.py --images FOLDER [FOLDER ...] [--limit 500] [--size 224] [--rounds 7]

One thread; CPU time, so that other jobs on the machine disturb little; all ways take turns in every round.
Our pixels are uint8 and normalised on the device later; a row does it here too, as open_clip does. The last
rows put other decoders before our transform: Pillow at a reduced scale, and simplejpeg where it is installed.
Writes Markdown and JSON into benchmarks/results.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import report
import torch
from PIL import Image
from torch import Tensor

from clip_lightning.data.images import ImageTransform, decode_image

OPEN_CLIP, OURS = "open_clip", "ours"


def ways(size: int) -> dict[str, Callable[[Path], Tensor]]:
    """Name → from a file to pixels (3, H, W)."""
    theirs = open_clip.image_transform(size, is_train=False)
    normalize = next(step for step in theirs.transforms if hasattr(step, "mean"))
    transform = ImageTransform((size, size), "bicubic", tuple(normalize.mean), tuple(normalize.std))

    def by_open_clip(path: Path) -> Tensor:
        with Image.open(path) as image:
            return theirs(image)

    def by_pillow_reduced(path: Path) -> Tensor:
        with Image.open(path) as image:
            image.draft("RGB", (size, size))
            return transform(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))

    chosen = {
        OPEN_CLIP: by_open_clip,
        OURS: lambda path: transform(decode_image(path)),
        "ours, normalised": lambda path: normalize(transform(decode_image(path)).float().div_(255)),
        "Pillow, 1/2 1/4 1/8": by_pillow_reduced,
    }
    if importlib.util.find_spec("simplejpeg"):
        import simplejpeg

        def by_simplejpeg(**options: object) -> Callable[[Path], Tensor]:
            def way(path: Path) -> Tensor:
                pixels = simplejpeg.decode_jpeg(path.read_bytes(), **options)
                return transform(torch.from_numpy(pixels).permute(2, 0, 1))

            return way

        fast = {"fastdct": True, "fastupsample": True}
        chosen["simplejpeg"] = by_simplejpeg()
        chosen["simplejpeg, fast DCT"] = by_simplejpeg(**fast)
        chosen["simplejpeg, N/8"] = by_simplejpeg(min_height=size, min_width=size)
        chosen["simplejpeg, N/8, fast DCT"] = by_simplejpeg(min_height=size, min_width=size, **fast)
    return chosen


def measure(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Pictures a second of each way in each round, and how far its pixels are from ours."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    paths = paths[: args.limit]
    if not paths:
        raise SystemExit(f"no JPEG pictures in {folder}")
    chosen = ways(args.size)
    for way in chosen.values():  # reads every file once, so that all rounds find them in memory
        for path in paths:
            way(path)
    rates: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(args.rounds):
        for name, way in chosen.items():
            began = time.process_time()
            for path in paths:
                way(path)
            rates[name].append(len(paths) / (time.process_time() - began))
    differences = {
        name: statistics.mean(
            (way(path).float() - chosen[OURS](path).float()).abs().mean().item() for path in paths
        )
        for name, way in chosen.items()
        if name not in (OPEN_CLIP, "ours, normalised")
    }
    sizes = [Image.open(path).size for path in paths]
    return {
        "folder": folder.name,
        "pictures": len(paths),
        "median_pixels": statistics.median(width * height for width, height in sizes),
        "mean_kb": statistics.mean(path.stat().st_size for path in paths) / 1000,
        "images_per_second": rates,
        "mean_difference_to_ours": differences,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=500, help="pictures of each folder, the first by name")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for folder in args.images:
        rows.append(measure(folder, args))
        write(rows, args)


def write(rows: list[dict], args: argparse.Namespace) -> None:
    packages = ["torch", "torchvision", "pillow", "open_clip_torch"]
    packages += ["simplejpeg"] if importlib.util.find_spec("simplejpeg") else []
    header = report.header(*packages, size=args.size, rounds=args.rounds)
    lines = [
        "# Decoding and transforming, one core",
        "",
        report.provenance(header, ", one thread"),
        "",
        f"To {args.size} px. Pictures a second of CPU time, medians of {args.rounds} interleaved rounds",
        "(lowest to highest); the ratio is the median of the rounds' ratios. Difference: mean absolute",
        "difference from our pixels, of 255.",
    ]
    for row in rows:
        lines += [
            "",
            f"`{row['folder']}`: {row['pictures']} pictures, {row['median_pixels'] / 1e6:.2f} megapixels, "
            f"{row['mean_kb']:.0f} kB",
            "",
            "| | pictures a second | × open_clip | difference |",
            "|---|---|---|---|",
        ]
        for name, rates in row["images_per_second"].items():
            theirs = row["images_per_second"][OPEN_CLIP]
            ratio = statistics.median(rate / other for rate, other in zip(rates, theirs, strict=True))
            difference = row["mean_difference_to_ours"].get(name)
            spread = f"{min(rates):.0f}-{max(rates):.0f}"
            lines.append(
                f"| {name} | {statistics.median(rates):.0f} ({spread}) | {ratio:.2f} "
                f"| {'' if difference is None else f'{difference:.2f}'} |"
            )
    report.save(args.out, "loader", header, rows, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
