"""`clip-lightning compare` and `compare-backbones` show runs side by side in a table, plots and a page."""

from __future__ import annotations

import inspect
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from jsonargparse.typing import PositiveInt

from clip_lightning.arguments import Parser, check_folder, own_arguments
from clip_lightning.errors import UserError
from clip_lightning.terminal import note

USAGE = {
    "compare": "%(prog)s RUN [RUN ...] [options]",
    "compare-backbones": "%(prog)s --image_towers NAMES --text_towers NAMES [options] [options of fit]",
}
EXAMPLES = {"image_towers": "pypi:efficientnet-lite0,resnet18", "text_towers": "pypi:minilm-l6"}


def run(args: list[str]) -> None:
    """Run `compare` or `compare-backbones` with the arguments of the command line, the command first."""
    command: Callable[..., None] = compare if args[0] == "compare" else compare_backbones
    rest_name, *names = inspect.signature(command).parameters
    parser = Parser.of_function(args[0], command, skip={rest_name}, usage=USAGE[args[0]])
    own, rest = own_arguments(args[1:], names)
    if command is compare:  # which passes nothing to `fit`
        parser.add_argument("runs", nargs="*", metavar="RUN", help="the runs to compare")
        compare(**vars(parser.parse_args([*rest, *own])))
    else:
        compare_backbones(rest, **vars(parser.parse_args(own)))


def compare(runs: list[str], out: Path | None = None, group: str | None = None, json: bool = False) -> None:
    """Rank finished runs.

    A RUN is a run folder, a folder of run folders, wandb:ENTITY/PROJECT for all runs of a W&B project, or
    wandb:ENTITY/PROJECT/RUN_ID for one of them. Runs that differ only in their seed share a row, which shows
    the mean and the standard deviation; two runs with the same seed count as one repeated run. Runs on
    different data are ranked separately. Interrupted runs are ranked by their best score so far, and marked.

    Args:
        out: folder for the table, the plots and the page; by default `runs/compare-DATE-TIME`.
        group: use only the W&B runs of this group.
        json: print the table as one JSON object instead.
    """
    if not runs:
        raise UserError("there is nothing to compare; give run folders or wandb:ENTITY/PROJECT")
    if group is not None and not any(place.startswith("wandb:") for place in runs):
        raise UserError("--group selects runs of a W&B project; also give wandb:ENTITY/PROJECT")
    from clip_lightning.experiments.compare import compared, report_comparison
    from clip_lightning.experiments.run_records import add_latencies, read_runs

    records, left_out = read_runs(runs, group)
    for place, reason in left_out.items():
        note(f"left out {place}: {reason}")
    if not records:
        place, reason = next(iter(left_out.items()))
        raise UserError(f"there is nothing to compare; left out {place}: {reason}")
    out = out or Path("runs") / time.strftime("compare-%Y%m%d-%H%M%S")
    check_folder(out, "")
    add_latencies(records)
    report_comparison(compared(records, "Runs compared", left_out=left_out), out, json)


def compare_backbones(
    options: list[str],
    image_towers: str = "",
    text_towers: str = "",
    seeds: PositiveInt = 1,
    score: bool = False,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Train every pair of an image tower and a text tower, and rank the pairs.

    Each frozen tower runs over the data once, and the pairs are trained on the cached features. All other
    options are passed to `fit` for every pair, for example --data.root FOLDER or --config NAME (`heads` by
    default); `clip-lightning fit --help` lists them. If you run the same command again, finished pairs are
    not trained again.

    Args:
        image_towers: names as in --model.image_tower, separated by commas.
        text_towers: names as in --model.text_tower, separated by commas.
        seeds: number of runs per pair, each with its own seed.
        score: `true` to train nothing, and to rank the pairs by how alike their towers see the training
            images and their captions: neighbors that they have in common, and linear CKA.
        out: folder for the runs, the table, the plots and the page; by default a folder in `runs` that
            depends only on the command. With --score, folder for the table of scores; by default none.
        json: print the table as one JSON object instead.
    """
    images, texts = ([*dict.fromkeys(map(str.strip, t.split(",")))] for t in (image_towers, text_towers))
    for option, names in (("image_towers", images), ("text_towers", texts)):
        if not all(names):
            raise UserError(f"--{option}: expected names separated by commas, for example {EXAMPLES[option]}")
    if not any(re.match(r"(--config|-c)(=|$)", option) for option in options):
        options = ["--config=heads", *options]
    check_folder(out, "")
    from clip_lightning.experiments.backbones import Backbones, report_scores, score_pairs
    from clip_lightning.experiments.compare import compared, report_comparison

    if score:
        report_scores(score_pairs(images, texts, options), out, json)
        return
    backbones = Backbones(images, texts, options, seeds, out)
    try:
        backbones.train()
    finally:  # also after Ctrl-C
        if backbones.records or backbones.failed:
            title = f"{len(images)} image towers × {len(texts)} text towers"
            comparison = compared(backbones.records, title, failed=backbones.failed)
            report_comparison(comparison, backbones.folder, json)
    if backbones.failed:
        pairs = f"{len(backbones.failed)} of {len(backbones.pairs)} pairs"
        note(f"{pairs} failed; run the same command again to retry them")
        sys.exit(1)
