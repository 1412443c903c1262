"""`data convert`: captioned images, or the samples of tars, as new tars; in parallel, and resumable."""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import signal
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet
from tqdm import tqdm

from clip_lightning.data.captions import CaptionedImage, split_by_image
from clip_lightning.data.captions import Splits as SplitFractions
from clip_lightning.data.columns import RECOGNISED, ReadOptions
from clip_lightning.data.formats import read_captions
from clip_lightning.data.images import to_rgb
from clip_lightning.data.shards.index import Index
from clip_lightning.data.shards.manifest import FIELDS_FILE, FILE, Shard, Splits, dump, load
from clip_lightning.data.shards.record import BrokenRecord, Filter, Record
from clip_lightning.data.shards.storage import expand, known
from clip_lightning.data.shards.tars import joined, scan, write_table
from clip_lightning.errors import RunFailed, UserError
from clip_lightning.files import write_atomically

PENDING = "pending"
_ORIENTATION, _FIRST_TURNED = 0x0112, 5  # EXIF's tag, and its first value for a quarter turn


@dataclass(frozen=True)
class Settings:
    """How tars are written; see `data convert`."""

    samples_per_shard: int = 2000
    short_side: int | None = None
    quality: int = 92
    filters: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.samples_per_shard < 1:
            raise UserError(f"--samples_per_shard {self.samples_per_shard}: expected 1 or more")
        if self.short_side is not None and self.short_side < 1:
            raise UserError(f"--short_side {self.short_side}: expected 1 or more pixels")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality}: expected 1 to 100")
        for text in self.filters:
            Filter.parse(text)


class Job(NamedTuple):
    """A tar to write: its split and number, and the captioned images or the tar that it is made from."""

    split: str
    number: int
    content: Sequence[CaptionedImage] | str

    def note(self, out: Path) -> Path:
        """Return the file that holds the table of its samples once the tar is finished."""
        return out / PENDING / f"{self.split}-{self.number:05d}.parquet"


class Source(NamedTuple):
    """What is converted: the tars to write, a digest of their content, and what is left out, with reasons."""

    jobs: Sequence[Job]
    digest: str
    left_out: Mapping[str, str]


def captioned(
    root: Path,
    samples_per_shard: int,
    dataset: str = "auto",
    val_share: float = 0.1,
    test_share: float = 0.1,
    split_seed: int = 0,
    read: ReadOptions = RECOGNISED,
) -> Source:
    """Divide captioned images as `fit` divides them; those of `train` come in an order drawn once."""
    captions = read_captions(root, dataset, read)
    parts = split_by_image(captions, SplitFractions(val_share, test_share, split_seed))
    # neighbours in a folder resemble each other, and other programs shuffle only what is close together
    order = np.random.default_rng(split_seed).permutation(len(parts["train"]))
    parts["train"] = [parts["train"][i] for i in order]
    jobs = [
        Job(split, number, images[first : first + samples_per_shard])
        for split, images in parts.items()
        for number, first in enumerate(range(0, len(images), samples_per_shard))
    ]
    return Source(jobs, captions.digest(), captions.left_out)


def tars(source: str, split: str) -> Source:
    """Take WebDataset tars, as img2dataset writes them; from each, one tar is made."""
    urls = expand(source)
    digest = hashlib.sha256(json.dumps([*map(known, urls)]).encode()).hexdigest()
    return Source([Job(split, number, url) for number, url in enumerate(urls)], digest, {})


def convert(source: Source, settings: Settings, out: Path, num_workers: int) -> tuple[Splits, dict[str, str]]:
    """Write the tars that are not there yet, and `shards.json` when all are.

    What an interrupted conversion of the same source has left in `out` is kept.

    Returns:
        What was written; and name → reason, of samples that could not be used.

    Raises:
        UserError: the folder holds something else.
        RunFailed: there is no room, something cannot be read at the moment, or no sample could be used.
    """
    plan = {"source": source.digest, "shards": len(source.jobs), **asdict(settings)}
    if (out / FILE).exists():
        splits, then = load((out / FILE).read_bytes(), str(out / FILE))
        left_out = then.pop("left_out", {})
        if json.dumps(then) != json.dumps(plan):
            raise UserError(f"{out} holds another conversion; give another folder to --out, or remove it")
        return splits, left_out
    note, content = out / PENDING / "plan.json", json.dumps(plan, indent=1).encode()
    if note.exists() and note.read_bytes() != content:
        raise UserError(f"{out} holds the beginning of another conversion; remove it, or give another --out")
    if not note.exists() and out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; give a new folder")
    try:
        write_atomically(note, content)
        missing = [job for job in source.jobs if not job.note(out).exists()]
        done = len(source.jobs) - len(missing)
        for _ in tqdm(_run(missing, settings, out, num_workers), "tars", len(source.jobs), initial=done):
            pass
        return _finish(source, out, plan)
    except OSError as error:
        raise RunFailed(
            f"tars cannot be written to {out} ({error.strerror or error}); the finished ones stay: make room "
            "and give the same command again"
        ) from error


def _run(jobs: Sequence[Job], settings: Settings, out: Path, num_workers: int) -> Iterator[None]:
    """Do the jobs, and yield after each."""
    do = partial(_write, settings=settings, out=out)
    if num_workers == 1 or len(jobs) < 2:
        yield from map(do, jobs)
        return
    # not fork: this process has threads
    spawn, ignore = get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(min(num_workers, len(jobs)), spawn, signal.signal, ignore) as pool:
        try:
            for future in as_completed([pool.submit(do, job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool as error:
            raise RunFailed(
                "a process that wrote tars was killed, perhaps for memory; the finished tars stay: give the "
                "same command again, with fewer --num_workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _write(job: Job, settings: Settings, out: Path) -> None:
    """Write a tar beside its place, move it there, then note that it is finished."""
    path = out / job.split / f"{job.number:05d}.tar"
    draft = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    left_out: dict[str, str] = {}
    write_tar(_records(job, settings, left_out), draft)
    with draft.open("rb") as file:
        table = scan(file, path.name)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    shard = asdict(Shard(path.name, len(table), draft.stat().st_size, digest))
    draft.replace(path)
    about = json.dumps({"shard": shard, "left_out": left_out})
    write_table(table.replace_schema_metadata({"about": about}), job.note(out))


def write_tar(records: Iterable[Record], path: Path) -> None:
    """Write a WebDataset tar: per sample its image, `.txt` with the field of that name, `.json` with others.

    The same samples make the same bytes.
    """
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


def _records(job: Job, settings: Settings, left_out: dict[str, str]) -> Iterator[Record]:
    """Yield the samples for a tar that can be used and pass the filters."""
    filters = [Filter.parse(text) for text in settings.filters]
    if isinstance(job.content, str):
        index = Index([job.content], job.split)
        left_out |= index.broken
        found = index.records()
    else:
        found = map(_record, count(job.number * settings.samples_per_shard), job.content)
    for record in found:
        try:
            image, width, height = sized(record, settings.short_side, settings.quality)
        except BrokenRecord as error:
            left_out[str(record.fields.get("name", record.name))] = str(error)
            continue
        # img2dataset has these fields too: of the image as it is stored, which may be another one now
        fields = {**record.fields, "width": width, "height": height}
        if all(condition([fields.get(condition.field)])[0] for condition in filters):
            yield Record(record.name, image, fields)


def _record(number: int, image: CaptionedImage) -> Record:
    try:
        data = image.path.read_bytes()
    except OSError as error:  # it was there when the captions were read: this is no property of the data
        raise RunFailed(
            f"{image.path} cannot be read ({error.strerror or error}); the finished tars stay: give the same "
            "command again when it can be read"
        ) from error
    fields = {"txt": image.captions[0], "captions": [*image.captions], "name": image.path.name}
    return Record(f"#{number:09d}", data, fields)


def sized(record: Record, short_side: int | None, quality: int) -> tuple[bytes, int, int]:
    """Return an encoded image with its width and height, as JPEG with this short side if its own is longer.

    Raises:
        BrokenRecord: it cannot be read.
    """
    image = record.opened()
    try:
        scale = min(1.0, (short_side or math.inf) / min(image.size))
        size = [round(side * scale) for side in image.size]
        turned = image.getexif().get(_ORIENTATION, 1) >= _FIRST_TURNED
        width, height = size[::-1] if turned else size
        if scale == 1:
            return record.image, width, height
        image.draft("RGB", (2 * size[0], 2 * size[1]))
        smaller, encoded = to_rgb(image).resize((width, height), Image.Resampling.BICUBIC), io.BytesIO()
        smaller.save(encoded, "JPEG", quality=quality)
        return encoded.getvalue(), width, height
    except Exception as error:  # files from elsewhere make Pillow raise nearly every kind of error
        raise BrokenRecord(" ".join(str(error).split())[:200] or type(error).__name__) from error


def _finish(source: Source, out: Path, plan: dict[str, Any]) -> tuple[Splits, dict[str, str]]:
    """Put together what is noted of all tars."""
    splits: dict[str, list[Shard]] = {}
    tables: dict[str, list[pa.Table]] = {}
    left_out = dict(source.left_out)
    for job in source.jobs:
        table = parquet.read_table(job.note(out))
        about = json.loads(table.schema.metadata[b"about"])
        shard = Shard(**about["shard"])
        left_out |= about["left_out"]
        if shard.samples:
            splits.setdefault(job.split, []).append(shard)
            tables.setdefault(job.split, []).append(table)
        else:
            (out / job.split / shard.file).unlink(missing_ok=True)
    if not splits:
        example = "".join(f", for example {name}: {reason}" for name, reason in list(left_out.items())[:1])
        raise RunFailed(f"no sample can be used or passes the filters{example}; {out} can be removed")
    for split, part in tables.items():
        write_table(joined(part), out / split / FIELDS_FILE)
    write_atomically(out / FILE, dump(splits, {**plan, "left_out": left_out}))
    shutil.rmtree(out / PENDING)
    return splits, left_out
