"""Write captioned images, or the samples of tars, to new tars (`data convert`), in parallel and resumable."""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import signal
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, islice, starmap
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from pyarrow import parquet
from tqdm import tqdm

from clip_lightning.data.captions import CaptionedImage, reading, split_by_image
from clip_lightning.data.formats import read_captions
from clip_lightning.data.images import BrokenImage, decoder_errors, open_image, to_rgb
from clip_lightning.data.readers import RECOGNIZED, ReadOptions
from clip_lightning.data.shards.index import ABOUT, FILE, HEADER, Index, Splits, load
from clip_lightning.data.shards.storage import expand, known
from clip_lightning.data.shards.tars import Filter, Record, scan
from clip_lightning.errors import RunFailed, UserError, check_option, reason_of
from clip_lightning.files import complete_file, write_atomically

_ORIENTATION, _FIRST_TURNED = 0x0112, 5  # EXIF's tag, and its first value for a quarter turn


@dataclass(frozen=True)
class Settings:
    """Options for writing tars, which `data convert` describes."""

    samples_per_shard: int = 2000
    short_side: int | None = None
    quality: int = 92
    filters: Sequence[Filter] = ()

    def __post_init__(self) -> None:
        check_option("quality", self.quality, 1 <= self.quality <= 100, "a number from 1 to 100")


Content = Sequence[tuple[int, CaptionedImage]] | str
"""What a tar is written from: captioned images with their numbers, or another tar."""


class Source(NamedTuple):
    """The content of each tar by its name, a digest of all, and name → reason for what is left out."""

    contents: Mapping[str, Content]
    digest: str
    left_out: Mapping[str, str]


def captioned(root: Path, samples_per_shard: int, read: ReadOptions = RECOGNIZED) -> Source:
    """Split captioned images as `fit` does, and shuffle the training images once."""
    captions = read_captions(root, read)
    parts = split_by_image(captions, read.splits)
    # Neighboring images in a folder are similar, and other programs shuffle only within a small buffer.
    order = np.random.default_rng(read.splits.seed).permutation(len(parts["train"]))
    parts["train"] = [parts["train"][i] for i in order]
    contents = {
        f"{split}/{number:05d}": [*zip(count(first), images[first : first + samples_per_shard])]
        for split, images in parts.items()
        for number, first in enumerate(range(0, len(images), samples_per_shard))
    }
    return Source(contents, captions.digest(), captions.left_out)


def tars(source: str, split: str) -> Source:
    """Use WebDataset tars as img2dataset writes them; each becomes one tar."""
    urls = expand(source)
    digest = hashlib.sha256(json.dumps([*map(known, urls)]).encode()).hexdigest()
    return Source({f"{split}/{number:05d}": url for number, url in enumerate(urls)}, digest, {})


def convert(source: Source, settings: Settings, out: Path, num_workers: int) -> tuple[Splits, dict[str, str]]:
    """Write the missing tars, and `shards.json` when all are complete.

    A tar is complete when the table of its samples is beside it. Return the tars per split; and name →
    reason, for samples that could not be used.
    """
    plan = {"source": source.digest, "shards": len(source.contents), **asdict(settings)}
    pending = out / "pending"
    begun = pending / hashlib.sha256(json.dumps(plan).encode()).hexdigest()
    if begun.exists() or not out.exists() or not any(out.iterdir()):
        try:
            pending.mkdir(parents=True, exist_ok=True)
            with FileLock(pending / "lock", timeout=0):
                begun.touch()
                _write_all(source, settings, plan, out, num_workers)
                shutil.rmtree(pending)
        except Timeout as error:
            raise UserError(
                f"another process is writing to {out}; wait for it, or give another --out"
            ) from error
        except (OSError, BrokenProcessPool) as error:
            raise RunFailed(
                f"tars cannot be written to {out} ({reason_of(error)}); free some space or memory, and run "
                "the same command again: finished tars are kept"
            ) from error
    if (out / FILE).exists():
        splits, then = load((out / FILE).read_bytes(), str(out / FILE))
        left_out = then.pop("left_out", {})
        if json.dumps(then) == json.dumps(plan):
            return splits, left_out
    raise UserError(
        f"--out {out} is not empty, and has no conversion of this data with these options; give a new folder"
    )


def _write_all(source: Source, settings: Settings, plan: dict[str, Any], out: Path, num_workers: int) -> None:
    """Write the missing tars in parallel, and then `shards.json`."""
    for draft in out.rglob(".*.tmp"):  # of a process that was killed
        draft.unlink(missing_ok=True)
    missing = {name: part for name, part in source.contents.items() if not (out / f"{name}.parquet").exists()}
    total = len(source.contents)
    # Do not fork, as this process has threads.
    spawn, ignore = get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(num_workers, spawn, signal.signal, ignore) as pool:
        run = map if num_workers == 1 else pool.map
        written = run(partial(_write, settings, out), missing, missing.values())
        list(tqdm(written, "tars", total, initial=total - len(missing)))
    splits: dict[str, list[dict[str, Any]]] = {}
    left_out = dict(source.left_out)
    for name in source.contents:
        table = out / f"{name}.parquet"
        about = json.loads(parquet.read_schema(table).metadata[ABOUT])
        left_out |= about["left_out"]
        if about["shard"]["samples"]:
            splits.setdefault(table.parent.name, []).append(about["shard"])
        else:
            table.unlink()
            table.with_suffix(".tar").unlink()
    if not splits:
        example = "".join(f" (first {name}: {reason})" for name, reason in islice(left_out.items(), 1))
        raise RunFailed(f"no sample is usable and passes --filters{example}; remove {out} and try again")
    content = {**HEADER, "splits": splits, "settings": {**plan, "left_out": left_out}}
    write_atomically(out / FILE, json.dumps(content, indent=1).encode() + b"\n")


def _write(settings: Settings, out: Path, name: str, content: Content) -> None:
    """Write a tar, and then the table of its samples."""
    path, left_out = out / f"{name}.tar", dict[str, str]()
    with complete_file(path) as draft:
        write_tar(_records(content, settings, left_out), draft)
        with draft.open("rb") as file:
            table = scan(file, path.name)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = draft.stat().st_size
    shard = {"file": path.name, "samples": len(table), "bytes": size, "sha256": digest}
    about = {ABOUT: json.dumps({"shard": shard, "left_out": left_out})}
    with complete_file(path.with_suffix(".parquet")) as draft:
        parquet.write_table(table.replace_schema_metadata(about), draft)


def write_tar(records: Iterable[Record], path: Path) -> None:
    """Write a WebDataset tar with each sample's image, the field `txt` as `.txt`, and others as `.json`."""
    with tarfile.open(path, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for record in records:
            fields, files = dict(record.fields), {record.suffix(): record.image}
            if isinstance(fields.get("txt"), str):
                files["txt"] = fields.pop("txt").encode(errors="replace")
            files["json"] = json.dumps(fields, ensure_ascii=False).encode(errors="replace")
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{record.name.rpartition('#')[2]}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _records(content: Content, settings: Settings, left_out: dict[str, str]) -> Iterator[Record]:
    """Yield the usable samples for a tar that pass the filters."""
    if isinstance(content, str):
        index = Index([content], "train")
        left_out |= index.broken
        records = index.records()
    else:
        records = starmap(_record, content)
    for record in records:
        try:
            record = _sized(record, settings)
            if all(condition([record.fields.get(condition.field)])[0] for condition in settings.filters):
                yield record
        except BrokenImage as error:
            left_out[str(record.fields.get("name", record.name))] = str(error)


def _record(number: int, image: CaptionedImage) -> Record:
    with reading(image.path):
        data = image.path.read_bytes()
    fields = {"txt": image.captions[0], "captions": [*image.captions], "name": image.path.name}
    return Record(f"#{number:09d}", data, fields)


def _sized(record: Record, settings: Settings) -> Record:
    """Set the fields width and height, and resize the image to JPEG if its short side is longer."""
    image, content = open_image(record.image), record.image
    with decoder_errors():
        scale = min(1.0, (settings.short_side or math.inf) / min(image.size))
        width, height = size = [round(side * scale) for side in image.size]
        if image.getexif().get(_ORIENTATION, 1) >= _FIRST_TURNED:
            width, height = height, width
        if scale < 1:
            image.draft("RGB", (2 * size[0], 2 * size[1]))
            smaller, encoded = to_rgb(image).resize((width, height), Image.Resampling.BICUBIC), io.BytesIO()
            smaller.save(encoded, "JPEG", quality=settings.quality)
            content = encoded.getvalue()
    return Record(record.name, content, {**record.fields, "width": width, "height": height})
