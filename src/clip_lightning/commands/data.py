"""`clip-lightning data check|convert|upload`: captioned images checked, put into tars, uploaded to W&B."""

from __future__ import annotations

import json as json_module
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from clip_lightning.arguments import run_functions
from clip_lightning.data.captions import CaptionSet, Splits, split_by_image
from clip_lightning.data.columns import RECOGNISED, ReadOptions
from clip_lightning.terminal import one_line


def run(args: list[str]) -> None:
    """Run `data` with the words of the command line."""
    run_functions({"check": check, "convert": convert, "upload": upload}, args, positional=True)


def check(
    root: str,
    *,
    dataset: str = "auto",
    read: ReadOptions = RECOGNISED,
    splits: Splits = Splits(),  # noqa: B008 (frozen)
    text_tower: str | None = None,
    max_length: int | None = None,
    num_workers: int | None = None,
    out: Path | None = None,
    fix: Path | None = None,
    json: bool = False,
) -> None:
    """Open every image as the loader would, and print what is wrong with the data; status 1 on errors.

    Errors are images that cannot be read, rows that cannot be used, and byte-identical images in more
    than one split. Warnings are of images that look the same, and of repeated, shared or cut captions.

    Args:
        root: the data as for fit: a folder, an annotation file, hf:OWNER/NAME, ...
        dataset: how to read it: auto, flickr8k, flickr30k, captions or folder.
        read: columns and image folder, if they are not recognised.
        splits: how images are divided if the data names no splits, as for fit.
        text_tower: name of a text tower; counts the captions that its tokenizer would cut.
        max_length: tokens at which it cuts; 77 or the tower's own limit if not given.
        num_workers: threads that open images; one per core if not given.
        out: folder for check.html and check.json.
        fix: name of a new CSV to write without what cannot be read, repeated captions, and the copies of
            images that are in more than one split; give it to fit as --data.root.
        json: print one JSON object instead.
    """
    from clip_lightning.data.check import find, open_all
    from clip_lightning.data.clean import changes_reading, write_cleaned
    from clip_lightning.data.sources import find_source, read_source
    from clip_lightning.errors import UserError
    from clip_lightning.reports.data_check import as_text, write_report

    if num_workers is not None and num_workers < 1:
        raise UserError(f"--num_workers {num_workers}: expected 1 or more")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if fix is not None and (fix.suffix.lower() != ".csv" or fix.exists()):
        raise UserError(f"--fix {fix}: expected the name of a new .csv file; nothing is overwritten")
    source = find_source(root, read=read)
    source.fetch()
    captions = read_source(source, dataset, read)
    try:
        parts = split_by_image(captions, splits)
    except UserError as error:  # too few images, which are worth a look all the same
        print(one_line(f"warning: {error}"), file=sys.stderr)
        parts = {}
    cut = _cut(captions, text_tower, max_length)
    entries = open_all(captions, parts, num_workers)
    found = find(captions, entries, cut)
    if out is not None:
        write_report(found, entries, out)
        print(f"page: {out / 'check.html'}", file=sys.stderr)
    fixed = None if fix is None else write_cleaned(found, entries, fix)
    if json:
        print(json_module.dumps(found if fixed is None else {**found, "fixed": fixed}))
    else:
        print(as_text(found))
    if fixed and not json:
        print(
            f"{fix} has {fixed['images']:,} images with {fixed['captions']:,} captions, without "
            f"{fixed['without_broken']:,} broken images, {fixed['without_leaks']:,} copies in another split "
            f"and {fixed['without_repeats']:,} repeated captions: clip-lightning fit --data.root {fix}"
        )
    if fix is not None and changes_reading(fix, source.folder(), dataset):
        print(
            f"warning: {fix} is in {root}, whose own annotations do not go before it: give the one that is "
            "meant to --data.root, or move it",
            file=sys.stderr,
        )
    if found["errors"]:
        raise SystemExit(1)


def convert(
    root: str,
    *,
    out: Path,
    dataset: str = "auto",
    read: ReadOptions = RECOGNISED,
    val_share: float = 0.1,
    test_share: float = 0.1,
    split_seed: int = 0,
    split: str = "train",
    filters: list[str] | None = None,
    samples_per_shard: int = 2000,
    short_side: int | None = None,
    quality: int = 92,
    num_workers: int | None = None,
    json: bool = False,
) -> None:
    """Write captioned images, or the samples of tars, as WebDataset tars to train from.

    If a conversion was interrupted, the same command continues it.

    Args:
        root: the data set's folder, or its annotation file; or WebDataset tars, as img2dataset writes them: a
            folder, a URL or a pattern such as DIR/{00000..00099}.tar.
        out: a new folder for the tars, with a list of them and of their samples.
        dataset: how to read root: auto, flickr8k, flickr30k, captions or folder.
        read: columns and image folder, if they are not recognised.
        val_share: the fraction of the images to validate on if the data has no splits, as for fit.
        test_share: the fraction to test on, likewise.
        split_seed: the seed of that draw, and of the order in which training images are written.
        split: what samples of tars are for: train, val or test.
        filters: conditions on a sample's fields, 'similarity > 0.28'; every image has a width and a height.
        samples_per_shard: the number of captioned images in a tar; from each tar one tar is made.
        short_side: pixels to which longer images are re-encoded, as JPEG; without it all stay as they are.
        quality: that of these JPEGs, 1 to 100.
        num_workers: the number of processes; one per core by default.
        json: print one JSON object instead.
    """
    from clip_lightning.cores import cores
    from clip_lightning.data.captions import SPLITS
    from clip_lightning.data.shards import convert as conversion
    from clip_lightning.data.shards.storage import holds_tars
    from clip_lightning.errors import UserError

    if num_workers is not None and num_workers < 1:
        raise UserError(f"--num_workers {num_workers}: expected 1 or more")
    if split not in SPLITS:
        raise UserError(f"--split {split}: expected {', '.join(SPLITS)}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a new folder")
    settings = conversion.Settings(samples_per_shard, short_side, quality, tuple(filters or ()))
    if holds_tars(root):
        source = conversion.tars(root, split)
    else:
        shares = val_share, test_share
        source = conversion.captioned(Path(root), samples_per_shard, dataset, *shares, split_seed, read)
    splits, left_out = conversion.convert(source, settings, out, num_workers or min(8, cores()))
    if left_out:
        name, reason = next(iter(left_out.items()))
        print(one_line(f"left out {len(left_out)} samples, the first: {name}: {reason}"), file=sys.stderr)
    counts = {part: sum(shard.samples for shard in shards) for part, shards in splits.items()}
    if json:
        print(json_module.dumps({"out": str(out), "samples": counts, "left_out": left_out}))
    else:
        said = ", ".join(f"{count:,} to {part}" for part, count in counts.items())
        print(f"{said}: clip-lightning fit --data.dataset shards --data.root {out}")


def _cut(captions: CaptionSet, text_tower: str | None, max_length: int | None) -> dict[str, Any] | None:
    if text_tower is None:
        return None
    from clip_lightning.model.towers import TextTower

    tokenize = TextTower.from_name(text_tower, max_length).tokenize
    texts = [caption for image in captions.images for caption in image.captions]
    count = 0
    for start in range(0, len(texts), 10_000):  # the tokens of millions would not fit in memory
        tokens = tokenize.tokenizer(texts[start : start + 10_000], verbose=False)["input_ids"]
        count += sum(len(ids) > tokenize.max_length for ids in tokens)
    return {"text_tower": text_tower, "max_length": tokenize.max_length, "count": count}


def upload(
    root: Path,
    *,
    artifact: str,
    dataset: str = "auto",
    read: ReadOptions = RECOGNISED,
    project: str | None = None,
    entity: str | None = None,
    reference: bool = False,
    json: bool = False,
) -> None:
    """Log captioned pictures as a W&B artifact, for `fit --data.root wandb:NAME` on any machine.

    Args:
        root: the data set's folder; all of it is uploaded, in its layout.
        artifact: name of the artifact.
        dataset: how to read it: auto, flickr8k, flickr30k, captions or folder.
        read: columns and image folder, if they are not recognised.
        project: W&B project; WANDB_PROJECT or clip-lightning by default.
        entity: W&B user or team; your default one if not given.
        reference: upload where the files lie and their checksums instead of the files; for machines that
            share the file system.
        json: print one JSON object instead.
    """
    from clip_lightning.data.formats import read_captions
    from clip_lightning.errors import UserError
    from clip_lightning.tracking.artifacts import check_upload, upload_data
    from clip_lightning.wandb_fetch import default_project

    check_upload(artifact)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give the data set's folder")
    captions = read_captions(root, dataset, read)
    about = {
        "captions_digest": captions.digest(),
        "pictures": len(captions.images),
        "captions": sum(len(image.captions) for image in captions.images),
        "splits": dict(Counter(image.split or "none" for image in captions.images)),
        "left_out": len(captions.left_out),
    }
    print(f"uploading {about['pictures']:,} pictures with {about['captions']:,} captions", file=sys.stderr)
    project = project or default_project()
    name = upload_data(artifact, root, project=project, entity=entity, by_reference=reference, metadata=about)
    if json:
        print(json_module.dumps({"artifact": name, **about}))
    else:
        print(f"{name}: clip-lightning fit --data.root wandb:{name}")
