"""Builds, resumes and updates embeddings and indexes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from clip_lightning import __version__
from clip_lightning.data.formats import NothingFound, read_captions
from clip_lightning.data.image_formats import READ_SUFFIXES, counted, is_image, walk
from clip_lightning.data.images import UnreadableFile, decode_bytes, read_file
from clip_lightning.errors import UserError
from clip_lightning.files import cache_folder, complete_file, whole_folder, write_json
from clip_lightning.model.checkpoint import model_identity
from clip_lightning.model.clip import CLIP
from clip_lightning.model.encode import best_device, encode_images, encode_texts
from clip_lightning.model.export.onnx import write_text_tower
from clip_lightning.search import vectors
from clip_lightning.search.folder import EmbeddingsFolder, Manifest, Options, Row, digest
from clip_lightning.terminal import note, printable


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
    captions_of = find_images(source)
    if options.what in ("captions", "both") and not any(captions_of.values()):
        raise UserError(f"{source} has no readable captions; give --what images")
    if not embeddings_only:
        vectors.chosen_type(options.type, len(captions_of))  # fail before hours of work
    clip = model if isinstance(model, CLIP) else CLIP.from_pretrained(model).to(best_device())
    settings = {"source": str(source.resolve())}
    if not isinstance(model, CLIP):
        settings["model"] = str(Path(model).resolve() if Path(model).exists() else model)
    folder, text_tower = EmbeddingsFolder(out), ""
    with folder.writing():
        stored = folder.manifest()
        clip = clip.with_dims(options.dims or min(stored.width if stored else clip.dims, clip.dims)).eval()
        old, new = _manifests(folder, clip, options, settings)
        if not embeddings_only and new.what == "captions":
            new = replace(new, what="both")
        embedder = Embedder(clip, folder, new, options)
        new = embedder.embed(captions_of)
        if new.parts != old.parts:
            new = replace(new, type="flat", faiss_bytes=0)
        if not embeddings_only:
            new = _with_faiss(folder, new, options.type)
            new, text_tower = _with_text_tower(clip, folder, new, options.onnx)
        write_json(out / "broken.json", embedder.broken)
        folder.publish(new)
    before, after = embedder.digests(old.parts), embedder.digests(new.parts)
    added, unchanged = len(after.keys() - before.keys()), len(after.items() & before.items())
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
            note(f"skipped: {counted(skipped)}")
    try:
        data = read_captions(source)
    except UserError as error:
        if not source.is_dir():
            raise
        if not isinstance(error, NothingFound):  # there are captions, but they cannot be read
            note(f"continuing without captions: {error}")
    else:
        captions_of |= {os.path.abspath(image.path): image.captions for image in data.images}
        for name, reason in {} if source.is_dir() else data.left_out.items():
            note(f"left out {name}: {reason}")
    if not captions_of:
        suffixes = ", ".join(sorted(READ_SUFFIXES))
        raise UserError(f"no images in {source}; expected files that end in {suffixes}")
    return dict(sorted(captions_of.items()))


def _manifests(
    folder: EmbeddingsFolder, clip: CLIP, options: Options, settings: dict[str, Any]
) -> tuple[Manifest, Manifest]:
    """Return the manifest of the folder, which is written if it is new, and the one to be completed."""
    names = ("what", "shard_size", "precision", "dtype")
    settings |= {name: value for name in names if (value := getattr(options, name)) is not None}
    first = Manifest(model_identity(clip), width=clip.dims, **settings)
    old = folder.manifest() or first
    new = replace(old, identity=first.identity, width=clip.dims, **settings)
    if any(getattr(old, name) != getattr(new, name) for name in ("identity", "width", "precision", "dtype")):
        raise UserError(
            f"--out {folder.root} contains embeddings of another model, precision, dims or dtype "
            f"({old.model or 'unnamed'}, {old.precision}, {old.width}, {old.dtype}); give the same, or "
            "another --out"
        )
    if old is first:
        # its parts are never taken for another model's
        write_json(folder.root / "manifest.json", asdict(old))
    return old, new


class Embedder:
    """Embeds a data set into the parts of a folder, and reuses embeddings that are in the folder already."""

    def __init__(self, clip: CLIP, folder: EmbeddingsFolder, manifest: Manifest, options: Options) -> None:
        """Read the rows of the parts that the folder has."""
        self.clip, self.folder, self.manifest, self.options = clip, folder, manifest, options
        self.broken: dict[str, str] = {}  # reasons for which images cannot be decoded, by path
        self.unreadable: dict[str, str] = {}  # reasons for which files could not be read this time, by path
        self.embedded = 0  # images
        self._rows: dict[str, list[Row]] = {}  # by part
        self._known: dict[Any, tuple[str, int]] = {}  # part and number of a row by its identity and content
        self._read = lru_cache(4)(folder.read)  # as many open files or parts in memory
        precision = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        self._encoding: Any = {"precision": precision[manifest.precision], "batch_size": options.batch_size}
        for name in folder.intact_parts():
            self._learn(name)

    def embed(self, captions_of: dict[str, tuple[str, ...]]) -> Manifest:
        """Write the missing parts, and return the manifest of all, which is not yet written."""
        parts = self._plan(captions_of)
        total = sum(_key(row) not in self._known for rows in parts.values() for row in rows)
        with tqdm(total=total, desc="embedding", unit="row", disable=not total) as self._bar:
            names = [self._write(stem, parts.pop(stem)) for stem in [*parts]]
        images = len(self.digests(names))
        if not images and self.manifest.what != "captions":
            path, reason = next(iter((self.broken | self.unreadable).items()))
            raise UserError(f"none of {len(captions_of):,} images can be read ({path}: {reason})")
        captions = sum(len(self._rows[name]) for name in names) - images
        return replace(self.manifest, images=images, captions=captions, parts=names, finished=True)

    def digests(self, parts: Iterable[str]) -> dict[str, str]:
        """Return the SHA-256 of each image in these parts by path."""
        rows = (row for part in parts for row in self._rows.get(part, []))
        return {row["path"]: row["sha256"] for row in rows if "sha256" in row}

    def _plan(self, captions_of: dict[str, tuple[str, ...]]) -> dict[str, list[Row]]:
        """Return what is known of the rows of each part before they are embedded, by the stem of its name."""
        images: list[Row] = []
        captions: list[Row] = []
        for path, texts in captions_of.items():
            try:
                path.encode()  # names that are not UTF-8 cannot be stored
                status = os.stat(path)
            except (OSError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or "its name is not UTF-8; rename it"
                self.unreadable[printable(path)] = reason
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

    def _learn(self, part: str) -> None:
        self._rows[part] = [json.loads(line) for line in self.folder.read(part)[0]]
        for number, row in enumerate(self._rows[part]):
            self._known[_key(row)] = self._known[row.get("sha256")] = part, number

    def _write(self, stem: str, rows: list[Row]) -> str:
        """Embed the unknown rows of a part, and write it; if all are known, this is the part that exists."""
        missing = [row for row in rows if _key(row) not in self._known]
        try:
            if missing:
                (self._embed_images if stem.startswith("images") else self._embed_captions)(missing)
        finally:  # after Ctrl-C, too: the next command resumes from here
            for row in rows:
                if "embedding" not in row and _key(row) in self._known:
                    old, number = self._known[_key(row)]
                    row |= self._rows[old][number] | row | {"embedding": self._read(old)[1][number]}
            complete = [row for row in rows if "embedding" in row]
            about = self.manifest
            part = self.folder.write_part(stem, complete, about.width, about.dtype)
            self._learn(part)
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

        options: dict[str, Any] = {"threads": self.options.num_workers, **self._encoding}
        tower, project = self.clip.image_tower, self.clip.project_image
        for batch in encode_images(tower, missing, decode, project=project, **options):
            for row, embedding in zip(batch.rows, batch.features.numpy(), strict=True):
                missing[row]["embedding"] = embedding
            for row, _, reason in batch.broken:
                reasons = self.unreadable if isinstance(reason, UnreadableFile) else self.broken
                reasons[missing[row]["path"]] = str(reason)
            self.embedded += len(batch.rows)
            self._bar.update(batch.size)

    def _embed_captions(self, missing: list[Row]) -> None:
        texts = list(dict.fromkeys(row["caption"] for row in missing))
        tower, project = self.clip.text_tower, self.clip.project_text
        embeddings = encode_texts(tower, texts, project=project, **self._encoding)
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
        parts = [part for part in manifest.parts if part.startswith("images")]
        with complete_file(file) as draft:
            index = vectors.build(folder.read_embeddings(parts, manifest.images, manifest.width))
            vectors.faiss_module().write_index(index, str(draft))
    return replace(manifest, type=chosen, faiss_bytes=file.stat().st_size)


def _with_text_tower(
    clip: CLIP, folder: EmbeddingsFolder, manifest: Manifest, wanted: bool | None
) -> tuple[Manifest, str]:
    """Write the text tower as ONNX if it is missing, and return `onnx` or the reason for leaving it out."""
    if wanted is False:
        return replace(manifest, text_tower=""), "--onnx false"
    place = folder.text_tower(manifest.identity)
    if tower_digest(place) != manifest.text_tower:
        try:
            with whole_folder(place) as draft:
                _write_text_tower(clip, manifest.identity, draft)
        except UserError as error:
            if wanted:
                raise UserError(f"--onnx true: {error}") from error
            return replace(manifest, text_tower=""), str(error)
    return replace(manifest, text_tower=tower_digest(place)), "onnx"


def _write_text_tower(clip: CLIP, identity: str, out: Path) -> None:
    """Write the text tower as ONNX, or copy it from the cache, which has the last one that was written.

    Exporting takes as long as embedding hundreds of images.
    """
    cache = cache_folder("text_tower")
    # heads of several layers have the same weights for all dims
    key = digest([f"{identity} {clip.dims} {torch.__version__} {__version__}".encode()])
    with contextlib.suppress(OSError):  # another process may be replacing it
        for folder in cache.glob(f"{key}-*"):
            shutil.copytree(folder, out, dirs_exist_ok=True)
            if folder.name == f"{key}-{tower_digest(out)}":  # else it is damaged
                return
    write_text_tower(clip, out)
    with contextlib.suppress(OSError):  # the disk is full, for example
        shutil.rmtree(cache, ignore_errors=True)
        with whole_folder(cache / f"{key}-{tower_digest(out)}") as draft:
            shutil.copytree(out, draft, dirs_exist_ok=True)


def tower_digest(folder: Path) -> str:
    """Return the digest of the files of a text tower."""
    return digest(file.read_bytes() for file in sorted(folder.glob("*")))
