"""What half precision costs the feature cache: recall with features kept in fp32, fp16 and bf16.

    python benchmarks/storage.py --root FLICKR8K [--seeds 3]

The same features, computed once and kept in memory, rounded as a cache would; heads trained on each, scored
on 1,000 pictures held out of Flickr8k's train split. Writes Markdown and JSON into benchmarks/results.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import ablation
import report
import torch
from torch import Tensor

from clip_lightning.cpu import keep_freed_memory
from clip_lightning.data import features
from clip_lightning.data.features import Features
from clip_lightning.files import cache_folder

KINDS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SETTINGS = ablation.BASELINE | {"captions": 5, "smoothing": 0.1, "embed_dim": 1024, "views": 1}


class Rounded(Features):
    """Features in memory, in another precision."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def rows(self, rows) -> Tensor:  # type: ignore[no-untyped-def]
        return self._values[torch.as_tensor(rows)].float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    args = parser.parse_args()
    keep_freed_memory()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    root = ablation.held_out_root(args.root.resolve(), cache_folder("flickr8k-held-out"))
    exact: dict[str, Tensor] = {}
    kind = "fp32"

    def get(self, key, count, compute, title):  # type: ignore[no-untyped-def]
        if title not in exact:
            exact[title] = torch.from_numpy(compute(range(count)))
        return Rounded(exact[title].to(KINDS[kind]))

    features.FeatureCache.get = get  # type: ignore[method-assign]
    rows = {}
    for kind in KINDS:
        runs = [ablation.train(root, SETTINGS, seed) for seed in range(args.seeds)]
        off = max(((x.to(KINDS[kind]).float() - x).norm() / x.norm()).item() for x in exact.values())
        rows[kind] = {"runs": runs, "relative_error": off}
        print(kind, f"{off:.1e}", ablation.summary(runs), flush=True)
    header = report.header("torch", "lightning", seeds=args.seeds, held_out=ablation.HELD_OUT)
    lines = [
        "# Precision of cached features",
        "",
        f"{header['date']}, {header['machine']}, torch {torch.__version__}",
        "",
        "EfficientNet-Lite0 × MiniLM-L6, both frozen, computed in bf16 autocast; 1,000 pictures held out",
        f"of train; mean ± standard deviation of {args.seeds} seeds; relative error of the worst entry.",
        "",
        "| kept as | relative error | text→image R@1 | image→text R@1 | rsum |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [
            f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in ablation.summary(row["runs"]).values()
        ]
        lines.append(f"| {name} | {row['relative_error']:.1e} | {' | '.join(cells)} |")
    report.save(args.out, "storage", header, rows, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
