"""`data convert`: captioned pictures, or the samples of tars, as new shards; in parallel, and resumable."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm

from clip_lightning.data.captions import CaptionedImage, CaptionSet, Splits, split_by_image, unreadable
from clip_lightning.data.images import UnreadableFile, read_file
from clip_lightning.data.shards.manifest import FIELDS_FILE, FILE, Format, Manifest, Shard
from clip_lightning.data.shards.record import BrokenRecord, Filter, Record, passes
from clip_lightning.data.shards.storage import expand, identities
from clip_lightning.data.shards.tars import read_tar
from clip_lightning.data.shards.write import SUFFIX, checksum, joined, sized, table, write_chunk, write_tar
from clip_lightning.errors import RunFailed, UserError
from clip_lightning.files import write_atomically

PENDING = "pending"


@dataclass(frozen=True)
class Settings:
    """How shards are written.

    Attributes:
        format: of the shards.
        samples_per_shard: of captioned pictures; a tar becomes one shard.
        short_side: in pixels, that longer pictures are re-encoded to; None to keep all as they are.
        quality: of the JPEGs that are written then, 1 to 100.
        filters: conditions on a sample's fields.
    """

    format: Format
    samples_per_shard: int
    short_side: int | None
    quality: int
    filters: tuple[str, ...]

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


@dataclass(frozen=True)
class Job:
    """One shard to be written.

    Attributes:
        split: `train`, `val` or `test`.
        number: of the shard in its split.
        first: number of its first sample in the split.
        images: what it holds; or else
        tar: the tar whose samples it holds.
    """

    split: str
    number: int
    first: int = 0
    images: tuple[CaptionedImage, ...] = ()
    tar: str | None = None

    @property
    def name(self) -> str:
        """Of its files, without a suffix."""
        return f"{self.number:05d}"


@dataclass(frozen=True)
class Source:
    """What is converted.

    Attributes:
        jobs: all shards.
        digest: of what goes into them.
        left_out: name → reason, of what was not usable before a picture was opened.
    """

    jobs: tuple[Job, ...]
    digest: str
    left_out: dict[str, str]


def captioned(
    captions: CaptionSet, settings: Settings, *, val_share: float, test_share: float, split_seed: int
) -> Source:
    """Divide captioned images as `fit` divides them, those of `train` in an order drawn once.

    Raises:
        UserError: they cannot be divided.
    """
    parts = split_by_image(captions, Splits(val_share, test_share, split_seed))
    # neighbours in a folder resemble each other, and a reader mixes only samples that lie close together
    order = np.random.default_rng(split_seed).permutation(len(parts["train"]))
    parts["train"] = [parts["train"][i] for i in order]
    jobs = [
        Job(split, number, first, tuple(images[first : first + settings.samples_per_shard]))
        for split, images in parts.items()
        for number, first in enumerate(range(0, len(images), settings.samples_per_shard))
    ]
    return Source(tuple(jobs), captions.digest(), captions.left_out)


def tars(source: str, split: str) -> Source:
    """WebDataset tars, as img2dataset writes them, one shard each.

    Raises:
        UserError: there is none.
    """
    urls = expand(source)
    jobs = [Job(split, number, tar=url) for number, url in enumerate(urls)]
    digest = hashlib.sha256(json.dumps(identities(urls)).encode()).hexdigest()
    return Source(tuple(jobs), digest, {})


def convert(
    source: Source, settings: Settings, out: Path, num_workers: int
) -> tuple[Manifest, dict[str, str]]:
    """Write all shards, those first that are not there yet, and `shards.json` when all are.

    Args:
        source: what to write.
        settings: how.
        out: folder of the new data set; what an interrupted conversion of the same has left is kept.
        num_workers: processes.

    Returns:
        What was written; and name → reason, of samples that could not be used.

    Raises:
        UserError: the folder holds something else.
        RunFailed: there is no room, or no sample could be used.
    """
    plan = _plan(source, settings)
    if (out / FILE).exists():
        return _converted(out, plan)
    _begin(out, plan)
    missing = [job for job in source.jobs if not _note(out, job).exists()]
    with tqdm(total=len(source.jobs), initial=len(source.jobs) - len(missing), desc="shards", unit="") as bar:
        for _ in _run(missing, settings, out, num_workers):
            bar.update()
    return _finish(source, settings, out, plan)


def _plan(source: Source, settings: Settings) -> dict[str, Any]:
    return {
        "source": source.digest,
        "shards": len(source.jobs),
        **asdict(settings),
        "filters": [*settings.filters],
    }


def _converted(out: Path, plan: dict[str, Any]) -> tuple[Manifest, dict[str, str]]:
    manifest = Manifest.load((out / FILE).read_bytes(), str(out / FILE))
    if {**manifest.settings, "left_out": None} != {**plan, "left_out": None}:
        raise UserError(f"{out} holds another conversion; give another folder to --out, or remove it")
    return manifest, dict(manifest.settings.get("left_out") or {})


def _begin(out: Path, plan: dict[str, Any]) -> None:
    note, content = out / PENDING / "plan.json", json.dumps(plan, indent=1).encode()
    if note.exists():
        if note.read_bytes() != content:
            raise UserError(
                f"{out} holds the beginning of another conversion; remove it, or give another --out"
            )
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; give a new folder")
    else:
        write_atomically(note, content)


def _note(out: Path, job: Job) -> Path:
    """Written once the job's shard is in its place."""
    return out / PENDING / f"{job.split}-{job.name}.json"


# One shard ----------------------------------------------------------------------------------------------


def _run(jobs: Sequence[Job], settings: Settings, out: Path, num_workers: int) -> Iterator[None]:
    """Do the jobs, and yield after each."""
    do = partial(_write, settings=settings, out=out)
    try:
        if num_workers == 1 or len(jobs) < 2:
            for job in jobs:
                yield do(job)
            return
        # not fork: this process has threads
        with ProcessPoolExecutor(
            min(num_workers, len(jobs)), get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
        ) as pool:
            futures: list[Future[None]] = [pool.submit(do, job) for job in jobs]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise RunFailed(
            "a process that wrote shards was killed, perhaps for memory; those that are there stay: give "
            "the same command again, with fewer --num_workers"
        ) from error
    except OSError as error:
        raise RunFailed(
            f"shards cannot be written to {out} ({error.strerror or error}); those that are there stay: make "
            "room and give the same command again"
        ) from error


def _write(job: Job, settings: Settings, out: Path) -> None:
    """Write the shard beside its place, move it there, then note that it is done."""
    folder = out / job.split
    folder.mkdir(parents=True, exist_ok=True)
    name = job.name + SUFFIX[settings.format]
    path, draft = folder / name, folder / f".{name}.tmp"
    left_out: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    records = _noted(_records(job, settings, left_out), rows)
    chunk = None
    if settings.format == "litdata":
        chunk = write_chunk(records, draft)
    else:
        write_tar(records, draft)
    shard = checksum(draft, len(rows))
    draft.replace(path)
    pa.parquet.write_table(table(rows), out / PENDING / f"{job.split}-{job.name}.parquet")
    note = {"shard": asdict(shard) | {"file": name}, "chunk": chunk, "left_out": left_out}
    write_atomically(_note(out, job), json.dumps(note).encode(errors="replace"))


def _noted(records: Iterator[Record], rows: list[dict[str, Any]]) -> Iterator[Record]:
    for record in records:
        rows.append({"key": record.key, **record.fields})
        yield record


def _records(job: Job, settings: Settings, left_out: dict[str, str]) -> Iterator[Record]:
    """The samples of a shard that can be used and pass the filters."""
    filters = [Filter.parse(text) for text in settings.filters]
    samples = _pictures(job) if job.tar is None else read_tar(job.tar, left_out)
    for record in samples:
        try:
            image, width, height = sized(record.image, settings.short_side, settings.quality)
        except BrokenRecord as error:
            left_out[str(record.fields.get("name", record.name))] = str(error)
            continue
        # img2dataset says them too: of the picture as it is stored, which may be another one now
        fields = {**record.fields, "width": width, "height": height}
        if passes(filters, fields):
            yield Record(record.key, image, fields)


def _pictures(job: Job) -> Iterator[Record]:
    for number, image in enumerate(job.images, job.first):
        try:
            data = read_file(image.path)
        except UnreadableFile as error:
            raise unreadable(image.path, error) from error
        yield Record(f"{number:09d}", data, {"captions": [*image.captions], "name": image.path.name})


# All of them --------------------------------------------------------------------------------------------


def _finish(
    source: Source, settings: Settings, out: Path, plan: dict[str, Any]
) -> tuple[Manifest, dict[str, str]]:
    """Put the notes of all shards together."""
    splits: dict[str, tuple[Shard, ...]] = {}
    left_out = dict(source.left_out)
    for split in dict.fromkeys(job.split for job in source.jobs):
        jobs = [job for job in source.jobs if job.split == split]
        notes = [json.loads(_note(out, job).read_text()) for job in jobs]
        for note in notes:
            left_out |= note["left_out"]
        kept = [(job, note) for job, note in zip(jobs, notes, strict=True) if note["shard"]["samples"]]
        for note in notes:
            if not note["shard"]["samples"]:
                (out / split / note["shard"]["file"]).unlink(missing_ok=True)
        if not kept:
            continue
        splits[split] = tuple(Shard(**note["shard"]) for _, note in kept)
        tables = [pa.parquet.read_table(out / PENDING / f"{split}-{job.name}.parquet") for job, _ in kept]
        pa.parquet.write_table(joined(tables), out / split / FIELDS_FILE)
        if settings.format == "litdata":
            _write_index(out / split, kept)
    if not splits:
        example = "".join(f", for example {name}: {reason}" for name, reason in list(left_out.items())[:1])
        raise RunFailed(f"no sample can be used or passes the filters{example}; {out} can be removed")
    manifest = Manifest(settings.format, splits, {**plan, "left_out": left_out})
    write_atomically(out / FILE, manifest.dump())
    shutil.rmtree(out / PENDING)
    return manifest, left_out


def _write_index(folder: Path, kept: Sequence[tuple[Job, dict[str, Any]]]) -> None:
    """Litdata's index of all chunks."""
    chunks = [
        {**chunk, "filename": note["shard"]["file"]} for _, note in kept for chunk in note["chunk"]["chunks"]
    ]
    index = {"chunks": chunks, "config": kept[0][1]["chunk"]["config"], "updated_at": "0"}
    write_atomically(folder / "index.json", json.dumps(index, sort_keys=True).encode())
