"""Types of search index on a million vectors: recall, time of a query on one thread, building, disk, memory.

    python benchmarks/search_index.py [--vectors 1000000 --width 512 --types flat ivfpq --queries 200]
    python benchmarks/search_index.py --sets photographs --root FLICKR8K --model MODEL --vectors 100000

Three sets. `random`: vectors and queries are uniform on the sphere, the hardest case there is: nothing is
close to anything (the best of a million has a cosine of 0.21), so that no index can leave a part of them out.
`clustered`: 20,000 subjects of uneven size, in a space whose variance falls as in trained embeddings; queries
lie as far from a picture as sentences do (their cosine is 0.44). `photographs`: all images of a data set and
random crops of them (30 to 100 % of the area), as a trained model embeds them, and captions of its val split.
Each build and each search runs in a process of its own, for its memory. Vectors and indexes go to --work, a
temporary folder by default (5 GB for a million).
Writes Markdown and JSON into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import report

from clip_lightning.search import vectors

SETS = ("random", "clustered", "photographs")
SUBJECTS, BLOCK, K = 20_000, 50_000, 10
WARM_UP = 10  # queries
SECONDS = 30  # of passes over the queries; two passes at least


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def random_set(count: int, width: int, queries: int, path: Path, seed: int) -> np.ndarray:
    """Write unit vectors (count, width) fp16, and return queries."""
    rng = np.random.default_rng(seed)
    stored = np.lib.format.open_memmap(path, "w+", np.float16, (count, width))
    for start in range(0, count, BLOCK):
        block = stored[start : start + BLOCK]
        block[:] = unit(rng.standard_normal(block.shape, dtype=np.float32))
    return unit(rng.standard_normal((queries, width), dtype=np.float32))


def clustered_set(count: int, width: int, queries: int, path: Path, seed: int) -> np.ndarray:
    """Write vectors near subjects, and return queries near some of them.

    The figures were set so that 7,000 of them look like 7,000 photographs of Flickr8k embedded by a trained
    model: nearest neighbour 0.64 (there 0.65), the tenth 0.49 (0.54), effective dimension 35 (50).
    """
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((width, width)))[0].astype(np.float32)
    spread = (np.arange(width, dtype=np.float32) + 5) ** -0.75

    def draw(number: int, spread: np.ndarray) -> np.ndarray:
        return unit(rng.standard_normal((number, width), dtype=np.float32) * spread)

    subjects = draw(SUBJECTS, spread)
    share = rng.pareto(1.5, SUBJECTS) + 0.2
    stored = np.lib.format.open_memmap(path, "w+", np.float16, (count, width))
    for start in range(0, count, BLOCK):
        block = stored[start : start + BLOCK]
        subject = rng.choice(SUBJECTS, len(block), p=share / share.sum())
        block[:] = unit(subjects[subject] + 0.7 * draw(len(block), spread)) @ turn
    wanted = stored[np.sort(rng.choice(count, queries, replace=False))].astype(np.float32)
    return unit(wanted + 2.0 * draw(queries, spread**0.7) @ turn)


def photograph_set(args: argparse.Namespace, path: Path) -> np.ndarray:
    """Write embeddings of images and of their crops, and return those of captions."""
    import torch

    from clip_lightning import CLIP
    from clip_lightning.cpu import keep_freed_memory
    from clip_lightning.data.captions import split_by_image
    from clip_lightning.data.formats import read_captions
    from clip_lightning.data.images import Augmentation, augment, decode_image
    from clip_lightning.data.readers import RECOGNIZED
    from clip_lightning.model.encode import Encoded, encode_images

    keep_freed_memory()
    clip, data = CLIP.from_pretrained(args.model).eval(), read_captions(args.root)
    paths = [image.path for image in data.images]

    def decode(number: int) -> torch.Tensor:
        view, row = divmod(number, len(paths))
        crop = Augmentation(min_scale=0.3 if view else 1.0, flip=view > 0)
        rng = np.random.default_rng((args.seed, view, row))
        return augment(decode_image(paths[row]), clip.image_tower.transform, crop, rng)

    fast = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
    options = {"project": clip.project_image, "precision": fast, "progress": "images"}
    batches = encode_images(clip.image_tower, range(args.vectors), decode, **options)
    np.save(path, Encoded.join(batches).features.numpy().astype(np.float16))
    val = split_by_image(data, RECOGNIZED.splits)["val"]
    captions = [caption for image in val for caption in image.captions]
    chosen = np.random.default_rng(args.seed).choice(len(captions), args.queries, replace=False)
    return clip.embed_texts([captions[row] for row in chosen]).numpy()


def make(args: argparse.Namespace) -> dict[str, object]:
    """Write a set, its queries and, by brute force, the K best rows of each."""
    folder = args.work
    if args.set == "photographs":
        queries = photograph_set(args, folder / "vectors.npy")
    else:
        draw = random_set if args.set == "random" else clustered_set
        queries = draw(args.vectors, args.width, args.queries, folder / "vectors.npy", args.seed)
    stored = np.load(folder / "vectors.npy", mmap_mode="r")
    scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start in range(0, len(stored), BLOCK):
        block = queries @ stored[start : start + BLOCK].astype(np.float32).T
        numbers = np.broadcast_to(np.arange(start, start + block.shape[1]), block.shape)
        scores, rows = np.concatenate([scores, block], 1), np.concatenate([rows, numbers], 1)
        best = np.argsort(-scores, axis=1)[:, :K]
        scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
    np.savez(folder / "queries.npz", queries=queries, best=rows)
    cosines = {"best": float(scores[:, 0].mean()), "tenth": float(scores[:, -1].mean())}
    return {**cosines, "width": stored.shape[1]}


def build(args: argparse.Namespace) -> dict[str, object]:
    """Build and write one index, with `--threads` threads; `flat` is the embeddings themselves."""
    faiss = vectors.faiss_module()
    faiss.omp_set_num_threads(args.threads)
    stored = np.load(args.work / "vectors.npy").astype(np.float32)
    began = time.perf_counter()
    index = faiss.IndexFlatIP(stored.shape[1]) if args.type == "flat" else vectors.build(stored)
    if args.type == "flat":
        index.add(stored)
    seconds = time.perf_counter() - began
    faiss.write_index(index, str(args.work / f"{args.type}.index"))
    size = (args.work / f"{args.type}.index").stat().st_size
    return {"build_seconds": seconds, "bytes": size, "build_mb": memory("VmHWM")}


def search(args: argparse.Namespace) -> dict[str, object]:
    """Time queries one by one on one thread, in some passes; FAISS by hand on the same index after each."""
    vectors.faiss_module().omp_set_num_threads(1)
    file = args.work / f"{args.type}.index"
    index = vectors.read_index(file, file.stat().st_size)
    searched = index
    if args.type == "flat":
        searched = np.load(args.work / "vectors.npy").astype(np.float32)
    saved = np.load(args.work / "queries.npz")
    queries, best = saved["queries"], saved["best"].tolist()
    for query in queries[:WARM_UP]:
        vectors.search(searched, query[None], K)
    ours, by_hand, hits, same = [], [], 0, True
    end = time.perf_counter() + SECONDS
    while len(ours) < 2 or time.perf_counter() < end:
        times: tuple[list[float], list[float]] = ([], [])
        hits = 0
        for query, wanted in zip(queries, best, strict=True):
            began = time.perf_counter()
            found = vectors.search(searched, query[None], K)[0]
            between = time.perf_counter()
            _, rows = index.search(query[None], K)
            times[0].append(1e3 * (between - began))
            times[1].append(1e3 * (time.perf_counter() - between))
            hits += len({row for row, _ in found} & set(wanted))
            same &= [row for row, _ in found] == rows[0].tolist()
        ours.append(times[0])
        by_hand.append(times[1])
    return {
        "recall": hits / (K * len(queries)),
        "milliseconds": min(ours, key=statistics.median),
        "by_hand_milliseconds": min(by_hand, key=statistics.median),
        "medians": [statistics.median(times) for times in ours],
        "as_by_hand": same,
        "search_mb": memory("RssAnon"),
    }


def memory(field: str) -> float:
    """`VmHWM` (peak) or `RssAnon` (now, without mapped files) of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


STEPS = {"make": make, "build": build, "search": search}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--types", nargs="+", default=["flat", "ivfpq"])
    parser.add_argument("--sets", nargs="+", default=list(SETS[:2]), choices=SETS)
    parser.add_argument("--root", type=Path, default=".", help="of the photographs")
    parser.add_argument("--model", type=Path, default=".", help="of the photographs")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2, help="of the build; a query has one")
    parser.add_argument("--seed", type=int, default=1, help="0 is what the settings were chosen on")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--set", help=argparse.SUPPRESS)
    parser.add_argument("--type", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(STEPS[args.step](args)))
        return
    for kind in args.sets:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            write(kind, measure_set(args, kind, Path(folder)), args)


def measure_set(args: argparse.Namespace, kind: str, work: Path) -> dict[str, object]:
    def step(name: str, *more: str) -> dict[str, object]:
        command = [sys.executable, __file__, "--step", name, "--set", kind, "--work", str(work), *more]
        for option in ("vectors", "width", "queries", "threads", "seed", "root", "model"):
            command += [f"--{option}", str(getattr(args, option))]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

    made = step("make")
    types = {}
    for name in args.types:
        types[name] = step("build", "--type", name) | step("search", "--type", name)
        (work / f"{name}.index").unlink()  # up to two gigabytes
        print(kind, name, cells(types[name]), flush=True)
    return {**made, "types": types}


def cells(row: dict) -> list[str]:
    times = sorted(row["milliseconds"])
    hand = f"{statistics.median(row['by_hand_milliseconds']):.2f}" if row["as_by_hand"] else "–"
    return [
        f"{row['recall']:.3f}",
        f"{statistics.median(times):.2f}",
        f"{times[int(0.95 * len(times))]:.2f}",
        hand,
        f"{row['build_seconds']:.0f}",
        f"{row['bytes'] / 1e6:,.0f}",
        f"{row['search_mb']:,.0f}",
        f"{row['build_mb']:,.0f}",
    ]


def write(kind: str, found: dict, args: argparse.Namespace) -> None:
    sizes = {name: getattr(args, name) for name in ("vectors", "queries", "threads", "seed")}
    header = report.header("faiss-cpu", "numpy", set=kind, width=found["width"], **sizes)
    lines = [
        f"# Types of search index: {kind} vectors",
        "",
        report.provenance(header),
        "",
        f"{args.vectors:,} unit vectors of width {found['width']}; {args.queries} queries one by one on one",
        f"thread, k = {K}, the fastest pass of those in {SECONDS} s; built with {args.threads} threads.",
        f"Cosine of the best vector {found['best']:.2f}, of the tenth {found['tenth']:.2f}. By hand:",
        "`index.search` of FAISS on the same index, where it gives the same rows. Memory: of the process",
        "that searches, without mapped files, and the peak of the one that builds, with the vectors in it.",
        "",
        "| type | recall@10 | ms a query | 95 % within | by hand | s to build | MB on disk "
        "| MB to search | MB to build |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {name} | {' | '.join(cells(row))} |" for name, row in found["types"].items()]
    report.save(args.out, f"search-{kind}-{args.vectors}", header, found, lines)
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
