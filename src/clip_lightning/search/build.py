"""Building an index, finishing one that was stopped, and bringing one up to date: the same function."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from clip_lightning.cores import cores
from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP
from clip_lightning.model.export.onnx import write_text_tower
from clip_lightning.model.identity import load_model, location, model_identity
from clip_lightning.search import vectors
from clip_lightning.search.embed import Known, embed_captions, embed_pictures, load_pending
from clip_lightning.search.images import find_pictures
from clip_lightning.search.store import DTYPE, Content, Manifest, Row, Store, Version
from clip_lightning.search.text_tower import TextTowerFiles


@dataclass(frozen=True)
class Options:
    """How an index is built.

    Attributes:
        type: flat, hnsw, ivfpq, or auto, which goes by the number of pictures.
        batch_size: pictures that the tower sees at once.
        num_workers: threads that read and decode; one a core if None.
        captions: whether captions are embedded, too; as it was if None, and at first not.
        onnx: whether the index carries its text tower as ONNX; where that can be if None.
    """

    type: str = "auto"
    batch_size: int = 64
    num_workers: int | None = None
    captions: bool | None = None
    onnx: bool | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value in (("batch_size", self.batch_size), ("num_workers", self.num_workers)):
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: expected 1 or more")
        vectors.chosen_type(self.type, vectors.FEWEST_IVFPQ)  # an unknown type is told at once


@dataclass(frozen=True)
class Report:
    """What a build did; numbers of pictures, except `captions`, and `seconds` from end to end.

    `text_tower` is `onnx`, or why the index does not carry it; then a search loads torch and the model.
    """

    pictures: int
    added: int
    changed: int
    removed: int
    unchanged: int
    embedded: int
    captions: int
    type: str
    seconds: float
    embedding_seconds: float
    text_tower: str
    left_out: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """All of it on one line."""
        captions = f", {self.captions:,} captions" if self.captions else ""
        changes = {
            "new": self.added,
            "changed": self.changed,
            "unchanged": self.unchanged,
            "removed": self.removed,
            "left out": len(self.left_out),
        }
        counts = ", ".join(f"{count:,} {name}" for name, count in changes.items() if count)
        return f"{self.pictures:,} pictures{captions} ({counts}), {self.type}, in {self.seconds:.1f} s"


def build_index(model: CLIP | str | Path, source: Path, out: Path, options: Options) -> Report:
    """Make `out` the index of the pictures of `source`, computing only what is not there.

    Raises:
        UserError: no model, no pictures, an index of another model, another writer, or no room.
    """
    start = time.perf_counter()
    vectors.faiss_module()  # before hours of work
    store = Store(out)
    captions_of, left_out = find_pictures(source)
    vectors.chosen_type(options.type, len(captions_of))
    if options.captions and not any(captions_of.values()):
        raise UserError(f"--captions true: {source} has no captions that can be read; leave it out")
    try:
        with store.writing():
            clip = model if isinstance(model, CLIP) else load_model(model)
            where = None if isinstance(model, CLIP) else location(model)
            builder = _Builder(clip.eval(), where, str(source.resolve()), store, options)
            report = builder.build(captions_of, left_out)
    except OSError as error:
        raise UserError(
            f"the index {out} cannot be written ({error.strerror or error}); free some space there, or give "
            "another --out"
        ) from error
    return replace(report, seconds=round(time.perf_counter() - start, 2))


class _Builder:
    def __init__(self, clip: CLIP, where: str | None, source: str, store: Store, options: Options) -> None:
        self.clip, self.where, self.source = clip, where, source
        self.store, self.options = store, options
        self.identity = model_identity(clip)
        self.old = store.current()
        if self.old is not None and self.old.manifest.identity != self.identity:
            raise UserError(
                f"--out {store.root} was built with another model ({self.old.manifest.model or 'unnamed'}); "
                "give that one, or another --out"
            )
        self.pending = store.pending(self.identity)
        self.text_tower: TextTowerFiles | None = None
        self.no_text_tower = "--onnx false"

    def build(self, captions_of: dict[str, tuple[str, ...]], left_out: dict[str, str]) -> Report:
        """Embed what is new and write a version, unless it would be the current one again."""
        known = Known()
        old_rows = self.old.rows() if self.old is not None else []
        if self.old is not None:
            known.add(old_rows, self.old.embeddings())
        load_pending(self.pending, known)
        start = time.perf_counter()
        found, embedded, broken = self._rows(list(captions_of), known)
        left_out |= broken
        seconds = time.perf_counter() - start
        if not found:
            path, reason = next(iter(left_out.items()))
            raise UserError(f"none of {len(left_out):,} pictures can be read ({path}: {reason})")
        rows = [replace(row, captions=captions_of[path]) for path, row in found.items()]
        self._find_text_tower()
        manifest = self._manifest(rows, len(next(iter(known.contents.values())).vector))
        if not self._is_current(manifest, rows, old_rows, left_out):
            self.store.write(self._content(manifest, rows, known, left_out))
        self.store.remove_pending()
        before = {row.path: row.sha256 for row in old_rows}
        same = sum(before.get(row.path) == row.sha256 for row in rows)
        added = sum(row.path not in before for row in rows)
        return Report(
            pictures=len(rows),
            added=added,
            changed=len(rows) - same - added,
            removed=len(before.keys() - found.keys()),
            unchanged=same,
            embedded=embedded,
            captions=manifest.captions,
            type=manifest.type,
            seconds=0.0,
            embedding_seconds=round(seconds, 2),
            text_tower="onnx" if self.text_tower is not None else self.no_text_tower,
            left_out=left_out,
        )

    def _rows(self, paths: Sequence[str], known: Known) -> tuple[dict[str, Row], int, dict[str, str]]:
        """Rows in the order of the paths, how many were embedded, and what cannot be read."""
        rows: dict[str, Row | None] = {}
        left_out = {}
        for path in paths:
            try:
                rows[path] = known.unchanged(path, os.stat(path))
            except OSError as error:
                left_out[path] = error.strerror or str(error)
        new = [path for path, row in rows.items() if row is None]
        workers = self.options.num_workers or cores()
        read, broken, embedded = embed_pictures(
            self.clip, new, known, self.pending, self.options.batch_size, workers
        )
        all_rows = {path: row or read.get(path) for path, row in rows.items()}
        return {path: row for path, row in all_rows.items() if row is not None}, embedded, left_out | broken

    def _find_text_tower(self) -> None:
        """Take the current version's text tower as ONNX, or write one where that can be."""
        if self.options.onnx is False:
            return
        self.text_tower = self.old.text_tower() if self.old is not None else None
        if self.text_tower is not None:
            return
        draft = self.pending / "text_tower"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            write_text_tower(self.clip, draft)
        except UserError as error:
            if self.options.onnx:
                raise UserError(f"--onnx true: {error}") from error
            self.no_text_tower = str(error)
        else:
            self.text_tower = TextTowerFiles(draft)

    def _manifest(self, rows: Sequence[Row], width: int) -> Manifest:
        searched = self.options.captions
        if searched is None:
            searched = self.old is not None and self.old.manifest.captions > 0
        captions = len({text for row in rows for text in row.captions}) if searched else 0
        kind = vectors.chosen_type(self.options.type, len(rows))
        text_tower = self.text_tower.digest if self.text_tower is not None else None
        return Manifest(self.identity, self.where, self.source, kind, len(rows), captions, width, text_tower)

    def _is_current(
        self, manifest: Manifest, rows: list[Row], old_rows: list[Row], left_out: dict[str, str]
    ) -> bool:
        if self.old is None or rows != old_rows or left_out != self.old.left_out():
            return False
        if self.text_tower is not None and self.text_tower.folder.parent != self.old.folder:
            return False  # a new one in place of one that is damaged
        return manifest == replace(self.old.manifest, created="")

    def _content(
        self, manifest: Manifest, rows: Sequence[Row], known: Known, left_out: dict[str, str]
    ) -> Content:
        stacked = np.stack([known.contents[row.sha256].vector for row in rows]).astype(DTYPE)
        index = vectors.build(manifest.type, stacked)
        if not manifest.captions:
            return Content(manifest, rows, stacked, index, left_out, text_tower=self.text_tower)
        having: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            for text in dict.fromkeys(row.captions):
                having.setdefault(text, []).append(number)
        embedded = _caption_vectors(self.old)
        embed_captions(self.clip, list(having), embedded, self.pending)
        texts = np.stack([embedded[text] for text in having]).astype(DTYPE)
        text_index = vectors.build(vectors.chosen_type("auto", len(having)), texts)
        return Content(
            manifest,
            rows,
            stacked,
            index,
            left_out,
            captions=list(having),
            captions_of=list(having.values()),
            caption_vectors=texts,
            caption_index=text_index,
            text_tower=self.text_tower,
        )


def _caption_vectors(old: Version | None) -> dict[str, np.ndarray]:
    """Caption → embedding, of those that the current version has."""
    if old is None or not old.manifest.captions:
        return {}
    captions = old.caption_table()["caption"].to_pylist()
    return dict(zip(captions, old.caption_embeddings(), strict=True))
