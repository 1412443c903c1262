"""`clip-lightning data check|convert|upload`: captioned pictures looked at, put into shards, given to W&B."""

from __future__ import annotations

import json as json_module
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from clip_lightning.arguments import run_functions
from clip_lightning.terminal import one_line

if TYPE_CHECKING:
    from clip_lightning.data.captions import CaptionSet
    from clip_lightning.data.checking.findings import CutCaptions


def run(args: list[str]) -> None:
    """Run `data` with the words of the command line."""
    run_functions({"check": check, "convert": convert, "upload": upload}, args, positional=True)


def check(
    root: Path,
    *,
    dataset: str = "auto",
    val_share: float = 0.1,
    test_share: float = 0.1,
    split_seed: int = 0,
    text_tower: str | None = None,
    max_length: int | None = None,
    num_workers: int | None = None,
    out: Path | None = None,
    fix: Path | None = None,
    json: bool = False,
) -> None:
    """Open every picture as the loader would, and say what is wrong with the data; status 1 on errors.

    Errors are pictures that cannot be read, rows that cannot be used, and byte-identical pictures in more
    than one split. Warnings are of pictures that look the same, and of repeated, shared or cut captions.

    Args:
        root: the data set's folder, or its annotation file.
        dataset: how to read it: auto, flickr8k, flickr30k, captions or folder.
        val_share: part of the pictures to validate on where the data has no splits, as for fit.
        test_share: likewise, to test on.
        split_seed: of that draw.
        text_tower: name of a text tower; counts the captions that its tokenizer would cut.
        max_length: tokens at which it cuts; 77 or the tower's own limit if not given.
        num_workers: threads that open pictures; one for each core if not given.
        out: folder for check.html, check.json and contact-sheet.png.
        fix: name of a new CSV to write without what cannot be read, repeated captions, and the copies of
            pictures that are in more than one split; give it to fit as --data.root.
        json: print one JSON object instead.
    """
    from clip_lightning.data.captions import split_by_image
    from clip_lightning.data.checking.clean import changes_reading, check_target, write_cleaned
    from clip_lightning.data.checking.findings import find
    from clip_lightning.data.checking.images import open_all
    from clip_lightning.data.formats import read_captions
    from clip_lightning.errors import UserError
    from clip_lightning.reports.data_check import as_text, write_report

    if num_workers is not None and num_workers < 1:
        raise UserError(f"--num_workers {num_workers}: expected 1 or more")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if fix is not None:
        check_target(fix)
    captions = read_captions(root, dataset)
    try:
        parts = split_by_image(captions, seed=split_seed, val_share=val_share, test_share=test_share)
    except UserError as error:  # too few pictures, which are worth a look all the same
        print(one_line(f"warning: {error}"), file=sys.stderr)
        parts = {}
    cut = _cut(captions, text_tower, max_length)
    findings = find(captions, parts, open_all([image.path for image in captions.images], num_workers), cut)
    if out is not None:
        write_report(findings, out)
    cleaned = None if fix is None else write_cleaned(findings, fix)
    if json:
        fixed = {} if cleaned is None else {"fixed": {**asdict(cleaned), "path": str(cleaned.path)}}
        print(json_module.dumps(findings.as_dict() | fixed))
    else:
        print(as_text(findings))
        if cleaned is not None:
            print(f"{cleaned.summary()}: clip-lightning fit --data.root {cleaned.path}")
    if fix is not None and changes_reading(fix, root, dataset):
        print(
            f"warning: {fix} lies in {root}, whose own annotations do not go before it: give the one that is "
            "meant to --data.root, or move it",
            file=sys.stderr,
        )
    if out is not None:
        print(f"to look at: {out / 'check.html'}", file=sys.stderr)
    if findings.errors():
        raise SystemExit(1)


def convert(
    root: str,
    *,
    to: Literal["litdata", "webdataset"],
    out: Path,
    dataset: str = "auto",
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
    """Write captioned pictures, or the samples of tars, as shards to stream from in training.

    An interrupted conversion goes on when the same command is given again.

    Args:
        root: the data set's folder, or its annotation file; or WebDataset tars, as img2dataset writes them: a
            folder, a URL or a pattern such as DIR/{00000..00099}.tar.
        to: litdata, whose shards can be read at any place, so that a run resumes exactly; or webdataset, tars
            that other programs read too.
        out: new folder for the shards.
        dataset: how to read root: auto, flickr8k, flickr30k, captions or folder.
        val_share: part of the pictures to validate on where the data has no splits, as for fit.
        test_share: likewise, to test on.
        split_seed: of that draw, and of the order that training pictures are written in.
        split: what samples of tars are for: train, val or test.
        filters: conditions on what is written beside a picture, 'similarity > 0.28'; width and height are
            there of every picture.
        samples_per_shard: of captioned pictures; each tar becomes one shard.
        short_side: pixels that longer pictures are re-encoded to, as JPEG; all stay as they are if not given.
        quality: of these JPEGs, 1 to 100.
        num_workers: processes; one for each core if not given.
        json: print one JSON object instead.
    """
    from clip_lightning.cores import cores
    from clip_lightning.data.captions import SPLITS
    from clip_lightning.errors import UserError

    try:
        from clip_lightning.data.shards import convert as conversion
        from clip_lightning.data.shards.storage import holds_tars
    except ModuleNotFoundError as error:
        raise UserError(f"shards need {error.name}: pip install 'clip-lightning[shards]'") from error
    if num_workers is not None and num_workers < 1:
        raise UserError(f"--num_workers {num_workers}: expected 1 or more")
    if split not in SPLITS:
        raise UserError(f"--split {split}: expected {', '.join(SPLITS)}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a new folder")
    settings = conversion.Settings(to, samples_per_shard, short_side, quality, tuple(filters or ()))
    if holds_tars(root):
        source = conversion.tars(root, split)
    else:
        source = conversion.captioned(
            Path(root),
            settings,
            dataset=dataset,
            val_share=val_share,
            test_share=test_share,
            split_seed=split_seed,
        )
    manifest, left_out = conversion.convert(source, settings, out, num_workers or min(8, cores()))
    if left_out:
        name, reason = next(iter(left_out.items()))
        print(one_line(f"left out {len(left_out)} samples, the first: {name}: {reason}"), file=sys.stderr)
    counts = {part: manifest.samples(part) for part in manifest.splits}
    if json:
        print(json_module.dumps({"out": str(out), "format": to, "samples": counts, "left_out": left_out}))
    else:
        said = ", ".join(f"{count:,} to {part}" for part, count in counts.items())
        print(f"{said}: clip-lightning fit --data.dataset shards --data.root {out}")


def _cut(captions: CaptionSet, text_tower: str | None, max_length: int | None) -> CutCaptions | None:
    if text_tower is None:
        return None
    from clip_lightning.data.checking.findings import CutCaptions
    from clip_lightning.model.towers import TextTower

    tokenize = TextTower.from_name(text_tower, max_length).tokenize
    texts = [caption for image in captions.images for caption in image.captions]
    count = 0
    for start in range(0, len(texts), 10_000):  # the tokens of millions would not fit in memory
        tokens = tokenize.tokenizer(texts[start : start + 10_000], verbose=False)["input_ids"]
        count += sum(len(ids) > tokenize.max_length for ids in tokens)
    return CutCaptions(text_tower, tokenize.max_length, count)


def upload(
    root: Path,
    *,
    artifact: str,
    dataset: str = "auto",
    project: str = "clip-lightning",
    entity: str | None = None,
    reference: bool = False,
    json: bool = False,
) -> None:
    """Log captioned pictures as a W&B artifact, for `fit --data.artifact` on any machine.

    Args:
        root: the data set's folder; all of it is uploaded, in its layout.
        artifact: name of the artifact.
        dataset: how to read it: auto, flickr8k, flickr30k, captions or folder.
        project: W&B project.
        entity: W&B user or team; your default one if not given.
        reference: upload where the files lie and their checksums instead of the files; for machines that
            share the file system.
        json: print one JSON object instead.
    """
    from clip_lightning.data.formats import read_captions
    from clip_lightning.errors import UserError
    from clip_lightning.tracking.artifacts import check_upload, upload_data

    check_upload(artifact)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give the data set's folder")
    captions = read_captions(root, dataset)
    about = {
        "captions_digest": captions.digest(),
        "pictures": len(captions.images),
        "captions": sum(len(image.captions) for image in captions.images),
        "splits": dict(Counter(image.split or "none" for image in captions.images)),
        "left_out": len(captions.left_out),
    }
    print(f"uploading {about['pictures']:,} pictures with {about['captions']:,} captions", file=sys.stderr)
    name = upload_data(artifact, root, project=project, entity=entity, by_reference=reference, metadata=about)
    if json:
        print(json_module.dumps({"artifact": name, **about}))
    else:
        print(f"{name}: clip-lightning fit --data.artifact {name}")
