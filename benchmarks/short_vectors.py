"""What short and rounded vectors cost: recall with the first numbers of embeddings, in fp32 and in int8.

    python benchmarks/short_vectors.py --root FLICKR8K [--seeds 3]
    python benchmarks/short_vectors.py --root FLICKR8K --runs plain=RUN,RUN,RUN matryoshka=RUN,RUN,RUN

The first line trains heads with several prefixes on train without 1,000 images, and scores these images, to
choose the prefixes. The second line scores runs of `fit` on the dev split. Queries are in fp32, and what is
searched is in fp32 or int8, as in an index. Writes Markdown and JSON into benchmarks/results.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from pathlib import Path

import ablation
import report
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_lightning import CLIP, retrieval_metrics
from clip_lightning.cpu import keep_freed_memory
from clip_lightning.data.captions import Splits, split_by_image
from clip_lightning.data.formats import read_captions
from clip_lightning.files import cache_folder
from clip_lightning.model.encode import Encoded, encode_images, encode_texts
from clip_lightning.search.folder import as_int8, from_int8

DIMS = (1024, 512, 256, 128, 64, 32)
RECIPE = ablation.BASELINE | ablation.HEAD_CHANGES[ablation.START]
STUDY: dict[str, list[int] | None] = {"no prefixes": None, "128": [128], "64, 128, 256": [64, 128, 256]}
NAMES = ("text_to_image_R@1", "image_to_text_R@1", "rsum")


def scores(image: Tensor, text: Tensor, owner: Tensor) -> dict[str, dict[str, float]]:
    """The metrics for each width, `128`, and for what is searched in int8, `128 int8`."""
    found = {}
    for dims in DIMS:
        images, texts = (F.normalize(rows[:, :dims], dim=-1) for rows in (image, text))
        found[f"{dims}"] = retrieval_metrics(images, texts, owner)
        rounded = [torch.from_numpy(from_int8(as_int8(rows.numpy()))) for rows in (images, texts)]
        by_text = retrieval_metrics(rounded[0], texts, owner)
        by_image = retrieval_metrics(images, rounded[1], owner)
        both = (by_text, "text_to_image"), (by_image, "image_to_text")
        parts = [metrics[f"{way}_R@{k}"] for metrics, way in both for k in (1, 5, 10)]
        found[f"{dims} int8"] = dict(zip(NAMES, (parts[0], parts[3], sum(parts)), strict=True))
    return {width: {name: metrics[name] for name in NAMES} for width, metrics in found.items()}


def study(root: Path, seeds: int) -> dict[str, list[dict]]:
    """Train with each of the prefixes, and score the held-out images."""
    rows: dict[str, list[dict]] = {}
    root = ablation.held_out_root(root.resolve(), cache_folder("flickr8k-held-out"))
    for name, prefixes in STUDY.items():
        for seed in range(seeds):
            module, _ = ablation.fitted(root, RECIPE | {"matryoshka": prefixes}, seed)
            embeddings = module.validation_embeddings
            assert embeddings is not None
            rows.setdefault(name, []).append(
                scores(embeddings.image, embeddings.text, embeddings.text_image_id)
            )
        print(name, {width: mean_and_deviation(rows[name], width) for width in rows[name][0]}, flush=True)
    return rows


@torch.inference_mode()
def score_runs(root: Path, named: list[str]) -> dict[str, list[dict]]:
    """Score runs with frozen towers, which encode the dev split once."""
    images = split_by_image(read_captions(root), Splits())["val"]
    captions = [(at, text) for at, image in enumerate(images) for text in image.captions]
    owner = torch.tensor([at for at, _ in captions])
    features: dict[str, tuple[Tensor, Tensor]] = {}
    rows: dict[str, list[dict]] = {}
    for name, runs in (each.split("=", 1) for each in named):
        for run in runs.split(","):
            clip = CLIP.from_pretrained(run)
            towers = clip.image_tower.digest() + clip.text_tower.digest()
            if towers not in features:
                image = Encoded.join(
                    encode_images(clip.image_tower, [image.path for image in images])
                ).features
                features[towers] = image, encode_texts(clip.text_tower, [text for _, text in captions])
            image, text = features[towers]
            rows.setdefault(name, []).append(
                scores(clip.project_image(image), clip.project_text(text), owner)
            )
    return rows


def mean_and_deviation(runs: list[dict], width: str) -> list[str]:
    values = [[run[width][name] for run in runs] for name in NAMES]
    return [f"{statistics.mean(v):.1f} ± {statistics.stdev(v) if len(v) > 1 else 0:.1f}" for v in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", nargs="*", help="NAME=RUN,RUN,...")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    args = parser.parse_args()
    keep_freed_memory()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    write(score_runs(args.root, args.runs) if args.runs else study(args.root, args.seeds), args)


def write(rows: dict[str, list[dict]], args: argparse.Namespace) -> None:
    split = "official dev split" if args.runs else f"{ablation.HELD_OUT} images held out of train"
    header = report.header("torch", "lightning", split=split)
    lines = [
        "# Short vectors",
        "",
        report.provenance(header),
        "",
        f"`heads` on Flickr8k; {split}; mean ± standard deviation over the seeds.",
        "",
        "| prefixes in training | vectors | text→image R@1 | image→text R@1 | rsum | % of the rsum of 1024 |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in rows.items():
        for width in runs[0]:
            kept = [100 * run[width]["rsum"] / run["1024"]["rsum"] for run in runs]
            cells = [*mean_and_deviation(runs, width), f"{statistics.mean(kept):.1f}"]
            lines.append(f"| {name} | {width} | {' | '.join(cells)} |")
    report.save(args.out, f"short-vectors-{'dev' if args.runs else 'held-out'}", header, rows, lines)


if __name__ == "__main__":
    main()
