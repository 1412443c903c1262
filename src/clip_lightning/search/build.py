"""Builds, resumes and updates embeddings and indexes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from clip_lightning.cpu import cores
from clip_lightning.data.formats import NothingFound, read_captions
from clip_lightning.data.image_formats import READ_SUFFIXES, counted, is_image, walk
from clip_lightning.data.images import UnreadableFile, decode_bytes, read_file
from clip_lightning.errors import UserError
from clip_lightning.files import complete_file, whole_folder
from clip_lightning.model.checkpoint import model_identity
from clip_lightning.model.clip import CLIP
from clip_lightning.model.encode import best_device, encode_images, encode_texts
from clip_lightning.model.export.onnx import write_text_tower
from clip_lightning.search import vectors
from clip_lightning.search.folder import EmbeddingsFolder, Manifest, Options, Row, digest
from clip_lightning.terminal import one_line, printable

_AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def build_index(
    model: CLIP | str | Path, source: Path, out: Path, options: Options, *, embeddings_only: bool = False
) -> dict[str, Any]:
    """Embed a data set and, unless `embeddings_only`, build its index, reusing what the folder has already.

    Return JSON values: the content of the folder, the numbers of images that were `added`, `changed`,
    `removed`, `unchanged` and `embedded`, `seconds`, and the reasons by path for images that are `broken`
    (they cannot be decoded) or `unreadable` (the next run tries again). `text_tower` is `onnx`, or the reason
    for which the index does not contain the text tower.
    """
    start = time.perf_counter()
    embedder = Embedder(model, source, out, options)
    folder, text_tower = embedder.folder, ""
    if not embeddings_only:
        vectors.chosen_type(options.type, len(embedder.captions_of))  # fail before hours of work
    with folder.writing():
        old, new = embedder.embed(needs_images=not embeddings_only)
        if not embeddings_only:
            new = _with_faiss(folder, new, options.type)
            new, text_tower = _with_text_tower(embedder.clip, folder, new, options.onnx)
        folder.publish(new, embedder.broken)
    before, after = embedder.digests(old.parts), embedder.digests(new.parts)
    added = len(after.keys() - before.keys())
    unchanged = len(after.items() & before.items())
    return {name: getattr(new, name) for name in ("model", "type", "images", "captions", "width")} | {
        "shards": len(new.parts),
        "added": added,
        "changed": len(after) - added - unchanged,
        "removed": len(before.keys() - after.keys()),
        "unchanged": unchanged,
        "embedded": embedder.embedded,
        "seconds": round(time.perf_counter() - start, 2),
        "text_tower": text_tower,
        "broken": embedder.broken,
        "unreadable": embedder.unreadable,
    }


def find_images(source: Path) -> dict[str, tuple[str, ...]]:
    """Return the captions of each image by absolute path.

    In a folder, all images are found, except those in hidden folders, with the captions of its annotations if
    `read_captions` finds any. In an annotation file, the images that it names are found.
    """
    if not source.exists():
        raise UserError(f"no folder or file {source}; give a folder of images or a data set")
    captions_of: dict[str, tuple[str, ...]] = {}
    if source.is_dir():
        skipped: Counter[str] = Counter()
        for folder, names in walk(source.resolve(), skipped):
            captions_of |= {os.path.join(folder, name): () for name in names if is_image(name)}
        if skipped:
            print(one_line(f"skipped: {counted(skipped)}"), file=sys.stderr)
    try:
        data = read_captions(source)
    except UserError as error:
        if not source.is_dir():
            raise
        if not isinstance(error, NothingFound):  # there are captions, but they cannot be read
            print(one_line(f"continuing without captions: {error}"), file=sys.stderr)
    else:
        captions_of |= {os.path.abspath(image.path): image.captions for image in data.images}
        for name, reason in {} if source.is_dir() else data.left_out.items():
            print(one_line(f"left out {name}: {reason}"), file=sys.stderr)
    if not captions_of:
        raise UserError(
            f"no images in {source}; expected files that end in {', '.join(sorted(READ_SUFFIXES))}"
        )
    return dict(sorted(captions_of.items()))


class Embedder:
    """Embeds a data set into the parts of a folder, and reuses embeddings that are in the folder already."""

    def __init__(self, model: CLIP | str | Path, source: Path, out: Path, options: Options) -> None:
        """Find the images and load the model, without writing anything."""
        self.captions_of = find_images(source)  # by absolute path
        if options.what in ("captions", "both") and not any(self.captions_of.values()):
            raise UserError(f"{source} has no readable captions; give --what images")
        self.clip = model if isinstance(model, CLIP) else CLIP.from_pretrained(model).to(best_device())
        self.folder, self.options = EmbeddingsFolder(out), options
        names = ("what", "format", "shard_size", "precision")
        self._settings = {name: value for name in names if (value := getattr(options, name)) is not None}
        self._settings["source"] = str(source.resolve())
        if not isinstance(model, CLIP):
            self._settings["model"] = str(Path(model).resolve() if Path(model).exists() else model)
        width = self.clip.embed_images([]).shape[1]
        self.manifest = Manifest(model_identity(self.clip), width=width, **self._settings)
        self.broken: dict[str, str] = {}  # reasons for which images cannot be decoded, by path
        self.unreadable: dict[str, str] = {}  # reasons for which files could not be read this time, by path
        self.embedded = 0  # images
        self._rows: dict[str, list[Row]] = {}  # by part
        self._known: dict[Any, tuple[str, int]] = {}  # part and number of a row by its identity and content
        self._read = lru_cache(4)(self.folder.read)

    def embed(self, *, needs_images: bool = False, helps: bool = False) -> tuple[Manifest, Manifest]:
        """Write the missing parts, and return the old manifest and the new one, which is not yet written.

        A process that `helps` leaves the manifest, and parts that others are writing, to others.
        """
        old = self.folder.manifest() or self.manifest
        new = replace(old, **self._settings)
        if (old.identity, old.precision) != (self.manifest.identity, new.precision):
            raise UserError(
                f"--out {self.folder.root} contains embeddings of another model or precision "
                f"({old.model or 'unnamed'}, {old.precision}); give the same, or another --out"
            )
        if old is self.manifest and not helps:
            self.folder.write_manifest(old)  # so that the parts are never taken for those of another model
        self.manifest = replace(new, what="both") if needs_images and new.what == "captions" else new
        self._look_for("")
        parts, written = self._plan(), dict[str, str]()
        total = sum(_key(row) not in self._known for rows in parts.values() for row in rows)
        with tqdm(total=total, desc="embedding", unit="row", disable=helps or not total) as self._bar:
            for waits, stem in product((False,) if helps else (False, True), parts):
                lock = FileLock(self.folder.root / f".{stem}.lock", timeout=-1 if waits else 0)
                if stem not in written:
                    with contextlib.suppress(Timeout), lock:
                        written[stem] = self._write(stem, parts[stem])
        names = [written[stem] for stem in parts if stem in written]
        images = len(self.digests(names))
        if not (images or helps or self.manifest.what == "captions"):
            path, reason = next(iter((self.broken | self.unreadable).items()))
            raise UserError(f"none of {len(self.captions_of):,} images can be read ({path}: {reason})")
        captions = sum(len(self._rows[name]) for name in names) - images
        new = replace(self.manifest, images=images, captions=captions, parts=names, finished=True)
        return old, new if names == old.parts else replace(new, type="flat", faiss_bytes=0)

    def digests(self, parts: Iterable[str]) -> dict[str, str]:
        """Return the SHA-256 of each image in these parts by path."""
        rows = (row for part in parts for row in self._rows.get(part, []))
        return {row["path"]: row["sha256"] for row in rows if "sha256" in row}

    def _plan(self) -> dict[str, list[Row]]:
        """Return the known values of the rows of each part by stem; all processes get the same result."""
        images: list[Row] = []
        captions: list[Row] = []
        for path, texts in self.captions_of.items():
            try:
                path.encode()  # names that are not UTF-8 cannot be stored
                status = os.stat(path)
            except (OSError, UnicodeError) as error:
                self.unreadable[printable(path)] = getattr(error, "strerror", None) or str(error)
            else:
                about = {"file_size": status.st_size, "modified_ns": status.st_mtime_ns}
                images.append({"path": path, "captions": list(texts), **about})
                captions += ({"path": path, "caption": text} for text in texts)
        size = self.manifest.shard_size
        return {
            f"{kind}-{start // size:05}-of-{-(-len(rows) // size):05}": rows[start : start + size]
            for kind, rows in (("images", images), ("captions", captions))
            if self.manifest.what in (kind, "both")
            for start in range(0, len(rows), size)
        }

    def _look_for(self, stem: str) -> None:
        """Read parts that this process has not written."""
        for name in self.folder.intact_parts(stem):
            if name not in self._rows:
                with contextlib.suppress(OSError):  # another process has just replaced it
                    self._learn(name, [json.loads(line) for line in self.folder.read(name)[0]])

    def _learn(self, name: str, rows: list[Row]) -> None:
        self._rows[name] = rows
        for number, row in enumerate(rows):
            self._known[_key(row)] = self._known[row.get("sha256")] = name, number

    def _write(self, stem: str, rows: list[Row]) -> str:
        """Embed the unknown rows of a part, and write it; if all are known, this is the part that exists."""
        unknown = [row for row in rows if _key(row) not in self._known]
        if unknown:
            self._look_for(stem)  # another process may have written it
        missing = [row for row in unknown if _key(row) not in self._known]
        self._bar.update(len(unknown) - len(missing))
        try:
            if missing:
                (self._embed_images if stem.startswith("images") else self._embed_captions)(missing)
        finally:  # after Ctrl-C, too: the next command resumes from here
            complete, embeddings = [], []
            for row in rows:
                embedding = row.pop("embedding", None)
                if embedding is None and (key := _key(row)) in self._known:
                    name, number = self._known[key]
                    row, embedding = self._rows[name][number] | row, self._read(name)[1][number]
                if embedding is not None:
                    complete.append(row)
                    embeddings.append(embedding)
            array = np.array(embeddings, np.float32).reshape(-1, self.manifest.width)
            part = self.folder.write_part(stem, self.manifest.format, complete, array)
            self._learn(part, complete)
        return part

    def _embed_images(self, missing: list[Row]) -> None:
        def decode(row: Row) -> Tensor | None:
            data = read_file(Path(row["path"]), pauses=())  # the next command tries again
            sha256 = hashlib.sha256(data).hexdigest()
            if sha256 in self._known:
                self._known[_key(row)] = self._known[sha256]
                return None
            pixels = decode_bytes(data)
            row |= {"sha256": sha256, "width": pixels.shape[2], "height": pixels.shape[1]}
            return self.clip.transform(pixels)

        batches = encode_images(
            self.clip.image_tower,
            missing,
            decode,
            project=self.clip.project_image,
            batch_size=self.options.batch_size,
            threads=self.options.num_workers or cores(),
            precision=_AUTOCAST[self.manifest.precision],
        )
        for batch in batches:
            for row, embedding in zip(batch.rows, batch.features.numpy(), strict=True):
                missing[row]["embedding"] = embedding
            for row, _, reason in batch.broken:
                reasons = self.unreadable if isinstance(reason, UnreadableFile) else self.broken
                reasons[missing[row]["path"]] = str(reason)
            self.embedded += len(batch.rows)
            self._bar.update(batch.size)

    def _embed_captions(self, missing: list[Row]) -> None:
        texts = list(dict.fromkeys(row["caption"] for row in missing))
        embeddings = encode_texts(
            self.clip.text_tower,
            texts,
            project=self.clip.project_text,
            batch_size=self.options.batch_size,
            precision=_AUTOCAST[self.manifest.precision],
        )
        embedding_of = dict(zip(texts, embeddings.numpy(), strict=True))
        for row in missing:
            row["embedding"] = embedding_of[row["caption"]]
        self._bar.update(len(missing))


def _key(row: Row) -> Any:
    """Return the identity of a row: its caption, or its file with size and modification time."""
    return row["caption"] if "caption" in row else (row["path"], row["file_size"], row["modified_ns"])


def _with_faiss(folder: EmbeddingsFolder, manifest: Manifest, type: str) -> Manifest:
    """Write the FAISS file if it is missing and the index needs one."""
    if (chosen := vectors.chosen_type(type, manifest.images)) == "flat":
        return replace(manifest, type=chosen, faiss_bytes=0)
    file = folder.faiss_file(manifest.parts)
    if not file.exists() or file.stat().st_size != manifest.faiss_bytes:
        parts = [folder.read(part)[1] for part in manifest.parts if part.startswith("images")]
        with complete_file(file) as draft:
            index = vectors.build(np.concatenate(parts))
            vectors.faiss_module().write_index(index, str(draft))
    return replace(manifest, type=chosen, faiss_bytes=file.stat().st_size)


def _with_text_tower(
    clip: CLIP, folder: EmbeddingsFolder, manifest: Manifest, wanted: bool | None
) -> tuple[Manifest, str]:
    """Write the text tower as ONNX if it is missing, and return `onnx` or the reason for leaving it out."""
    if wanted is False:
        return replace(manifest, text_tower=""), "--onnx false"
    place = folder.text_tower(manifest.identity)
    if _tower_digest(place) != manifest.text_tower:
        try:
            with whole_folder(place) as draft:
                write_text_tower(clip, draft)
        except UserError as error:
            if wanted:
                raise UserError(f"--onnx true: {error}") from error
            return replace(manifest, text_tower=""), str(error)
    return replace(manifest, text_tower=_tower_digest(place)), "onnx"


def _tower_digest(folder: Path) -> str:
    return digest(f"{file.name} {digest([file.read_bytes()])}".encode() for file in sorted(folder.glob("*")))


def build_in_processes(
    model: str, source: Path, out: Path, options: Options, devices: int | None
) -> dict[str, Any] | None:
    """Embed a data set with several processes, each of which embeds different parts.

    `devices` is the number of processes on this machine, by default one per GPU, and is ignored if torchrun
    or srun started the processes. In theirs with a rank above 0, None is returned.
    """
    variables = os.environ
    siblings = devices or torch.cuda.device_count() or 1
    rank, local, spawned = 0, siblings - 1, siblings - 1
    if "RANK" in variables:
        rank, local, siblings = (int(variables[name]) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        spawned = 0
    elif int(variables.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in variables:
        rank, local, siblings, spawned = int(variables["SLURM_PROCID"]), int(variables["SLURM_LOCALID"]), 1, 0
    options = replace(options, num_workers=options.num_workers or max(1, cores() // siblings))
    task = siblings, model, source, out, options
    if rank > 0:
        _help(local, *task)
        return None
    helpers = torch.multiprocessing.spawn(_help, task, spawned, join=False, daemon=True)
    try:
        _use_device(local, siblings)
        return build_index(model, source, out, options, embeddings_only=True)
    finally:
        for process in helpers.processes:
            process.terminate()  # all parts are written


def _help(local: int, siblings: int, model: str, source: Path, out: Path, options: Options) -> None:
    parent = multiprocessing.parent_process()
    if parent is None or parent.is_alive():  # it may be killed before torch can follow it
        _use_device(local, siblings)
        Embedder(model, source, out, options).embed(helps=True)


def _use_device(local: int, siblings: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    elif siblings > 1:
        torch.set_num_threads(max(1, cores() // siblings))
