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
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from PIL import Image
from pyarrow import parquet
from tqdm import tqdm

from clip_lightning.data.captions import CaptionedImage, split_by_image, unreadable
from clip_lightning.data.formats import read_captions
from clip_lightning.data.images import BrokenImage, decoder_errors, open_image, to_rgb
from clip_lightning.data.readers import RECOGNIZED, ReadOptions
from clip_lightning.data.shards.index import FIELDS_FILE, FILE, HEADER, Index, Shard, Splits, load
from clip_lightning.data.shards.record import Filter, Record
from clip_lightning.data.shards.storage import expand, known
from clip_lightning.data.shards.tars import joined, scan, write_table
from clip_lightning.errors import RunFailed, UserError
from clip_lightning.files import write_atomically

PENDING = "pending"
_ORIENTATION, _FIRST_TURNED = 0x0112, 5  # EXIF's tag, and its first value for a quarter turn


@dataclass(frozen=True)
class Settings:
    """Options for writing tars, which `data convert` describes."""

    samples_per_shard: int = 2000
    short_side: int | None = None
    quality: int = 92
    filters: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality}: expected 1 to 100")
        for text in self.filters:
            Filter.parse(text)


class Job(NamedTuple):
    """A tar to write: its split, its number, and the captioned images or the tar to write it from."""

    split: str
    number: int
    content: Sequence[CaptionedImage] | str

    def note(self, out: Path) -> Path:
        """Return the file with the table of its samples, which exists when the tar is finished."""
        return out / PENDING / f"{self.split}-{self.number:05d}.parquet"


class Source(NamedTuple):
    """The tars to write, a digest of their content, and name → reason for what is left out."""

    jobs: Sequence[Job]
    digest: str
    left_out: Mapping[str, str]


def captioned(root: Path, samples_per_shard: int, read: ReadOptions = RECOGNIZED) -> Source:
    """Split captioned images as `fit` does, and shuffle the training images once."""
    captions = read_captions(root, read)
    parts = split_by_image(captions, read.splits)
    # Neighboring images in a folder are similar, and other programs shuffle only within a small buffer.
    order = np.random.default_rng(read.splits.seed).permutation(len(parts["train"]))
    parts["train"] = [parts["train"][i] for i in order]
    jobs = [
        Job(split, number, images[first : first + samples_per_shard])
        for split, images in parts.items()
        for number, first in enumerate(range(0, len(images), samples_per_shard))
    ]
    return Source(jobs, captions.digest(), captions.left_out)


def tars(source: str, split: str) -> Source:
    """Use WebDataset tars as img2dataset writes them; each becomes one tar."""
    urls = expand(source)
    digest = hashlib.sha256(json.dumps([*map(known, urls)]).encode()).hexdigest()
    return Source([Job(split, number, url) for number, url in enumerate(urls)], digest, {})


def convert(source: Source, settings: Settings, out: Path, num_workers: int) -> tuple[Splits, dict[str, str]]:
    """Write the missing tars, and `shards.json` when all are complete.

    Return the tars per split; and name → reason, for samples that could not be used.
    """
    plan = {"source": source.digest, "shards": len(source.jobs), **asdict(settings)}
    note, content = out / PENDING / "plan.json", json.dumps(plan, indent=1).encode()
    if (out / FILE).exists():
        splits, then = load((out / FILE).read_bytes(), str(out / FILE))
        left_out = then.pop("left_out", {})
        if json.dumps(then) == json.dumps(plan):
            return splits, left_out
    elif (note.exists() and note.read_bytes() == content) or not (out.exists() and any(out.iterdir())):
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(note.with_name("lock"), timeout=0):
                write_atomically(note, content)
                _run(source.jobs, settings, out, num_workers)
                return _finish(source, out, plan)
        except Timeout as error:
            raise UserError(
                f"another process is writing to {out}; wait for it, or give another --out"
            ) from error
        except OSError as error:
            raise RunFailed(
                f"tars cannot be written to {out} ({error.strerror or error}); free some space and run the "
                "same command again: finished tars are kept"
            ) from error
    raise UserError(
        f"--out {out} is not empty, and has no conversion of this data with these options; give a new folder"
    )


def _run(jobs: Sequence[Job], settings: Settings, out: Path, num_workers: int) -> None:
    """Write the tars that are missing, in parallel."""
    missing = [job for job in jobs if not job.note(out).exists()]
    bar = partial(tqdm, desc="tars", total=len(jobs), initial=len(jobs) - len(missing))
    do = partial(_write, settings=settings, out=out)
    if num_workers == 1 or len(missing) < 2:
        list(bar(map(do, missing)))
        return
    # Do not fork, as this process has threads.
    spawn, ignore = get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
    try:
        with ProcessPoolExecutor(min(num_workers, len(missing)), spawn, signal.signal, ignore) as pool:
            list(bar(pool.map(do, missing)))
    except BrokenProcessPool as error:
        raise RunFailed(
            "a worker process was killed, perhaps because memory ran out; run the same command again with "
            "fewer --num_workers: finished tars are kept"
        ) from error


def _write(job: Job, settings: Settings, out: Path) -> None:
    """Write a tar under a temporary name, rename it, and then write the note that it is finished."""
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


def _records(job: Job, settings: Settings, left_out: dict[str, str]) -> Iterator[Record]:
    """Yield the usable samples for a tar that pass the filters."""
    filters = [*map(Filter.parse, settings.filters)]
    if isinstance(job.content, str):
        index = Index([job.content], job.split)
        left_out |= index.broken
        records = index.records()
    else:
        records = map(_record, count(job.number * settings.samples_per_shard), job.content)
    for record in records:
        try:
            image, width, height = sized(record, settings.short_side, settings.quality)
        except BrokenImage as error:
            left_out[str(record.fields.get("name", record.name))] = str(error)
            continue
        # img2dataset has these fields, too; they describe the stored image, which may have been resized.
        fields = {**record.fields, "width": width, "height": height}
        if all(condition([fields.get(condition.field)])[0] for condition in filters):
            yield Record(record.name, image, fields)


def _record(number: int, image: CaptionedImage) -> Record:
    try:
        data = image.path.read_bytes()
    except OSError as error:  # it existed when the captions were read
        raise unreadable(image.path, error.strerror or error) from error
    fields = {"txt": image.captions[0], "captions": [*image.captions], "name": image.path.name}
    return Record(f"#{number:09d}", data, fields)


def sized(record: Record, short_side: int | None, quality: int) -> tuple[bytes, int, int]:
    """Return the encoded image, its width and its height; resize it to JPEG if its short side is longer."""
    image = open_image(record.image)
    with decoder_errors():
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


def _finish(source: Source, out: Path, plan: dict[str, Any]) -> tuple[Splits, dict[str, str]]:
    """Combine the notes on all tars."""
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
        example = "".join(f" (first {name}: {reason})" for name, reason in islice(left_out.items(), 1))
        raise RunFailed(f"no sample is usable and passes --filters{example}; remove {out} and try again")
    for split, part in tables.items():
        write_table(joined(part), out / split / FIELDS_FILE)
    shards = {split: [*map(asdict, part)] for split, part in splits.items()}
    content = {**HEADER, "splits": shards, "settings": {**plan, "left_out": left_out}}
    write_atomically(out / FILE, json.dumps(content, indent=1).encode() + b"\n")
    shutil.rmtree(out / PENDING)
    return splits, left_out
