"""`clip-lightning data check|audit|convert|upload` checks data, writes tars, or uploads to W&B."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from jsonargparse.typing import PositiveInt

from clip_lightning.arguments import check_folder, print_result, run_functions
from clip_lightning.data.captions import CaptionSet, count_lost, split_by_image
from clip_lightning.data.readers import RECOGNIZED, ReadOptions
from clip_lightning.errors import UserError
from clip_lightning.terminal import note


def check(
    root: str,
    *,
    read: ReadOptions = RECOGNIZED,
    against: str | None = None,
    text_tower: str | None = None,
    max_length: int | None = None,
    num_workers: PositiveInt | None = None,
    out: Path | None = None,
    fix: Path | None = None,
    json: bool = False,
) -> None:
    """Open every image as training would, and print what is wrong with the data; errors exit with status 1.

    Errors are images that cannot be read, rows that cannot be used, and byte-identical images in more than
    one split or in the data of --against. Warnings are about images that look the same, and about captions
    that are repeated, shared by several images, or too long.

    Args:
        root: the data, as for `fit --data.root`: a folder, an annotation file, hf:OWNER/NAME, ...
        read: layout, columns and splits, as for `fit`.
        against: other data, such as a benchmark; reports images that it contains, too, also if they are
            re-encoded, cropped by a tenth or mirrored.
        text_tower: name of a text tower; counts the captions that its tokenizer truncates or does not know.
        max_length: number of tokens at which captions are truncated; by default 77 or the tower's own limit.
        num_workers: number of threads that open images; by default one per core.
        out: folder for check.html and check.json.
        fix: name of a new CSV file to write, without unreadable images, repeated captions, and copies of
            images in other splits or in the data of --against; train on it with `fit --data.root FILE`.
        json: print one JSON object instead.
    """
    from clip_lightning.data.check import as_text, check_new_table, find, find_copies, open_all, write_cleaned
    from clip_lightning.reports.pages import write_check

    check_folder(out, root)
    check_new_table(fix)
    captions = _read(root, read)
    other_data = None if against is None else _read(against, RECOGNIZED)
    try:
        parts = split_by_image(captions, read.splits)
    except UserError as error:  # there are too few images to split, but they can still be checked
        note(f"warning: {error}")
        parts = {}
    lost = None
    if text_tower is not None:
        from clip_lightning.model.towers import TextTower

        tokenize = TextTower.from_name(text_tower, max_length).tokenize
        texts = [caption for image in captions.images for caption in image.captions]
        lost = {"text_tower": text_tower, **count_lost(tokenize, texts)}
    entries = open_all(captions, parts, num_workers, views=against is not None)
    others = open_all(other_data, {}, num_workers, views=True) if other_data else []
    report = find(captions, entries, lost, find_copies(entries, others) | {"against": against})
    if out is not None:
        write_check(report, entries, out, others)
        note(f"page: {out / 'check.html'}")
    text = as_text(report)
    if fix is not None:
        report["fixed"] = write_cleaned(report, entries, fix)
        text += _next(report["fixed"])
    print_result(report, text, json)
    if report["errors"]:
        raise SystemExit(1)


def audit(
    root: str,
    *,
    read: ReadOptions = RECOGNIZED,
    model: str | None = None,
    cache: Path | None = None,
    out: Path | None = None,
    fix: Path | None = None,
    json: bool = False,
) -> None:
    """Find captions that do not describe their image, and captions that fit other images, too.

    Frozen towers encode all images and captions once. Each caption is judged by heads that were fitted on
    other images: by its similarity to the image, and to the image's other captions. A comparison with
    captions of random other images estimates how many are wrong, and which can be accused with a precision of
    90 %. Captions that fit other images as well are false negatives of contrastive training.

    Args:
        root: the data, as for `fit --data.root`, with 100 images or more; all splits take part.
        read: layout, columns and splits, as for `fit`.
        model: a bundle, a run folder, a checkpoint, a Hugging Face hub id, or
            wandb:ENTITY/PROJECT/NAME:ALIAS, whose towers are used; by default those of `fit --config heads`.
        cache: folder of the feature cache; by default the one of `fit`.
        out: folder for audit.html, which shows the surest suspects with their images, and audit.json.
        fix: name of a new CSV file to write, without the accused captions; train on it with
            `fit --data.root FILE`.
        json: print one JSON object instead, with all accused captions as `suspects`, and captions that fit
            images other than theirs as `false_negatives`, both with the surest first.
    """
    from clip_lightning.data.check import check_new_table, write_table
    from clip_lightning.data.features import FeatureCache
    from clip_lightning.experiments import audit as auditing
    from clip_lightning.files import cache_folder
    from clip_lightning.reports.pages import write_audit

    check_folder(out, root)
    check_new_table(fix)
    data = _read(root, read)
    parts = split_by_image(data, read.splits)
    used = {image.path for part in parts.values() for image in part}
    unused = [image for image in data.images if image.path not in used]
    cached = FeatureCache(cache or cache_folder("features"))
    report = auditing.audit(data, parts | {"unused": unused}, model, cached)
    text = auditing.as_text(report)
    if out is not None:
        write_audit(report, data, out)
        note(f"page: {out / 'audit.html'}")
    if fix is not None:
        names, accused = data.names(), {(one["image"], one["caption"]) for one in report["suspects"]}
        rows = [
            (image.path, caption, split)
            for split, part in parts.items()
            for image in part
            for caption in image.captions
            if (names[image.path], caption) not in accused
        ]
        report["fixed"] = write_table(fix, rows)
        text += _next(report["fixed"])
    print_result(report, text, json)


def _read(root: str, read: ReadOptions) -> CaptionSet:
    from clip_lightning.data.sources import find_source, read_source

    source = find_source(root, read)
    source.fetch()
    return read_source(source, read)


def _next(fixed: dict[str, Any]) -> str:
    """Describe the table that `--fix` has written."""
    written = f"wrote {fixed['path']} with {fixed['images']:,} images and {fixed['captions']:,} captions"
    return f"\n{written}; next: clip-lightning fit --data.root {quote(fixed['path'])}"


def convert(
    root: str,
    *,
    out: Path,
    read: ReadOptions = RECOGNIZED,
    split: Literal["train", "val", "test"] = "train",
    filters: list[str] | None = None,
    samples_per_shard: PositiveInt = 2000,
    short_side: PositiveInt | None = None,
    quality: int = 92,
    num_workers: PositiveInt | None = None,
    json: bool = False,
) -> None:
    """Write captioned images, or the samples of tars, as WebDataset tars for training.

    If a conversion was interrupted, run the same command again to continue it.

    Args:
        root: the folder or annotation file of a data set; or WebDataset tars as img2dataset writes them: a
            folder, a URL or a pattern such as DIR/{00000..00099}.tar.
        out: a new folder for the tars and the index of their samples.
        read: layout, columns and splits, as for `fit`; the seed also shuffles the training images.
        split: the split that samples of tars belong to: train, val or test.
        filters: conditions on a sample's fields, such as 'similarity > 0.28'; each sample has the fields
            width and height.
        samples_per_shard: number of captioned images per tar; an input tar always becomes one tar.
        short_side: largest short side in pixels; larger images are resized and encoded as JPEG. By default
            images are copied unchanged.
        quality: quality of these JPEGs, from 1 to 100.
        num_workers: number of processes; by default one per core, at most 8.
        json: print one JSON object instead.
    """
    from clip_lightning.cpu import cores
    from clip_lightning.data.shards import convert as conversion
    from clip_lightning.data.shards.storage import holds_tars
    from clip_lightning.data.shards.tars import Filter

    check_folder(out, root)
    conditions = [*map(Filter.parse, filters or ())]
    settings = conversion.Settings(samples_per_shard, short_side, quality, conditions)
    if holds_tars(root):
        source = conversion.tars(root, split)
    else:
        source = conversion.captioned(Path(root), samples_per_shard, read)
    splits, left_out = conversion.convert(source, settings, out, num_workers or min(8, cores()))
    if left_out:
        name, reason = next(iter(left_out.items()))
        note(f"left out {len(left_out)} samples, first {name}: {reason}")
    counts = {part: sum(shard["samples"] for shard in shards) for part, shards in splits.items()}
    written = ", ".join(f"{count:,} samples for {part}" for part, count in counts.items())
    record = {"out": str(out), "samples": counts, "left_out": left_out}
    print_result(record, f"wrote {written}; next: clip-lightning fit --data.root {quote(str(out))}", json)


def upload(
    root: Path,
    *,
    artifact: str,
    read: ReadOptions = RECOGNIZED,
    project: str | None = None,
    entity: str | None = None,
    reference: bool = False,
    json: bool = False,
) -> None:
    """Log captioned images as a W&B artifact, which `fit --data.root wandb:NAME` downloads on any machine.

    Args:
        root: the data set's folder; all its files are uploaded in their layout.
        artifact: name of the artifact.
        read: layout and columns, as for `fit`.
        project: W&B project; by default WANDB_PROJECT, or clip-lightning.
        entity: W&B user or team; by default your own default entity.
        reference: upload only the paths and checksums of the files, for machines that share a file system.
        json: print one JSON object instead.
    """
    from clip_lightning.data.formats import read_captions
    from clip_lightning.tracking.artifacts import check_upload, upload_data
    from clip_lightning.wandb_fetch import default_project

    if not root.is_dir():  # an annotation file would be uploaded without its images
        raise UserError(f"{root} is not a folder; give the folder of the data set")
    check_upload(artifact)
    captions = read_captions(root, read)
    metadata = {
        "captions_digest": captions.digest(),
        "images": len(captions.images),
        "captions": sum(len(image.captions) for image in captions.images),
        "splits": dict(Counter(image.split or "none" for image in captions.images)),
        "left_out": len(captions.left_out),
    }
    note(f"uploading {metadata['images']:,} images, {metadata['captions']:,} captions")
    project = project or default_project()
    name = upload_data(
        artifact, root, project=project, entity=entity, by_reference=reference, metadata=metadata
    )
    text = f"uploaded {name}; next: clip-lightning fit --data.root wandb:{name}"
    print_result({"artifact": name, **metadata}, text, json)


run = partial(run_functions, {"check": check, "audit": audit, "convert": convert, "upload": upload})
