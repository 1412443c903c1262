"""How embeddings lie on disk: shards that are written once, what is known of each, and a manifest of all.

    OUT/manifest.json                   model, data, settings; when all is done also each file's SHA-256
    OUT/images-00000-of-00012.npy       float32 (rows, D), unit length
    OUT/images-00000-of-00012.jsonl     a line a row: {"path": ..., "captions": [...]}
    OUT/captions-00000-of-00060.npy     likewise, its lines {"path": ..., "caption": ...}
    OUT/broken.json                     path → reason, of pictures that could not be read
    OUT/progress/                       what is known of finished shards, until all are

With Parquet there is one file a shard, with the columns path, captions (or caption) and embedding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from filelock import FileLock, Timeout
from pyarrow import parquet

from clip_lightning.errors import UserError
from clip_lightning.files import is_draft, write_atomically
from clip_lightning.search.plan import Kind, Plan, Shard

_DIFFERENCES = {"model": "another model", "data": "other data, or data that has changed since"}


@dataclass(frozen=True)
class Record:
    """What is known of a finished shard.

    Attributes:
        file: name of the file with the embeddings.
        rows: in it; pictures that could not be read have none.
        bytes: its size.
        sha256: of its content.
        broken: path → reason.
    """

    file: str
    rows: int
    bytes: int
    sha256: str
    broken: Mapping[str, str]


class Store:
    """The folder of one plan."""

    def __init__(self, root: Path, plan: Plan) -> None:
        self.root, self.plan = root, plan

    def check(self) -> None:
        """Complain of a folder that is not of this plan; an empty or new one is.

        Raises:
            UserError: it holds something else, or embeddings of another model, other data or settings.
        """
        if not self.root.exists():
            return
        if not self.root.is_dir():
            raise UserError(f"--out {self.root} is a file; give a new folder")
        file = self.root / "manifest.json"
        if not file.is_file():
            if any(entry.name != ".lock" and not is_draft(entry.name) for entry in self.root.iterdir()):
                raise UserError(f"--out {self.root} holds something else than embeddings; give a new folder")
            return
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
            parts = there["model"]["identity"], there["data"]["digest"], there["settings"]
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}); give a new folder to --out") from error
        own = self.plan.manifest()
        here = own["model"]["identity"], own["data"]["digest"], own["settings"]
        for name, then, now in zip(("model", "data", "settings"), parts, here, strict=True):
            if then != now:
                what = _DIFFERENCES.get(name) or _other_settings(then, now)
                raise UserError(f"--out {self.root} holds embeddings of {what}; give a new folder")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only command that writes there; for the first process of all.

        Raises:
            UserError: another one writes, the folder cannot be made, or it is full.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / ".lock", timeout=0):
                for file in (*self.root.iterdir(), *self.root.glob("progress/*")):
                    if is_draft(file.name):
                        file.unlink()  # of a process that was killed
                if not (self.root / "manifest.json").exists():
                    _write_json(self.root / "manifest.json", self.plan.manifest() | {"finished": False})
                yield
        except Timeout:
            raise UserError(
                f"another process is writing to {self.root}; wait for it, or give another --out"
            ) from None
        except OSError as error:
            raise UserError(
                f"--out {self.root} cannot be written ({error}); free some space there, or give another --out"
            ) from error

    def finished(self) -> dict[str, Record]:
        """Name → record of the shards that are there as they were written."""
        said: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError):
            said |= json.loads((self.root / "manifest.json").read_text()).get("shards", {})
        for file in (self.root / "progress").glob("*.json"):
            said[file.stem] = json.loads(file.read_text())
        records = {name: Record(**said[name]) for name in said}
        return {name: record for name, record in records.items() if self._is_whole(name, record)}

    def write(
        self, shard: Shard, rows: Sequence[int], vectors: np.ndarray, broken: Mapping[str, str]
    ) -> None:
        """Write a shard's files, and then that they are there.

        Args:
            shard: to be written.
            rows: the positions that have an embedding, ascending.
            vectors: (rows, D).
            broken: path → reason, of the others.
        """
        about = self._rows(shard, rows)
        if self.plan.format == "npy":
            buffer = BytesIO()
            np.save(buffer, vectors)
            data = buffer.getvalue()
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in about)
            write_atomically(self.root / f"{shard.name}.jsonl", "".join(lines).encode())
        else:
            data = _parquet(shard.kind, about, vectors, self.plan.width)
        file = f"{shard.name}.{self.plan.format}"
        write_atomically(self.root / file, data)
        record = Record(file, len(rows), len(data), hashlib.sha256(data).hexdigest(), broken)
        _write_json(self.root / "progress" / f"{shard.name}.json", asdict(record))

    def finish(self, left_out: Mapping[str, str]) -> dict[str, Record]:
        """Write what is known of all shards into the manifest; for the first process, after all others.

        Raises:
            UserError: a shard is missing.
        """
        records = self.finished()
        names = [shard.name for shard in self.plan.shards()]
        if missing := [name for name in names if name not in records]:
            raise UserError(
                f"{len(missing)} of {len(names)} shards are missing in {self.root} ({missing[0]}, ...); the "
                "same command again writes them"
            )
        broken = dict(left_out)
        for name in names:
            broken |= records[name].broken
        _write_json(self.root / "broken.json", broken)
        shards = {name: asdict(records[name]) for name in names}
        _write_json(self.root / "manifest.json", self.plan.manifest() | {"finished": True, "shards": shards})
        shutil.rmtree(self.root / "progress", ignore_errors=True)
        return records

    def _is_whole(self, name: str, record: Record) -> bool:
        file = self.root / record.file
        if self.plan.format == "npy" and not (self.root / f"{name}.jsonl").is_file():
            return False
        if not file.is_file() or file.stat().st_size != record.bytes:
            return False
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == record.sha256

    def _rows(self, shard: Shard, rows: Sequence[int]) -> list[dict[str, Any]]:
        if shard.kind == "images":
            return [
                {"path": path, "captions": list(texts)} for path, texts in (self.plan.images[r] for r in rows)
            ]
        return [{"path": path, "caption": text} for path, text in (self.plan.captions[r] for r in rows)]


def _other_settings(then: dict[str, Any], now: dict[str, Any]) -> str:
    """Which differ, as one would write them."""
    changed = [name for name in now if then.get(name) != now[name]]
    return (
        "other settings (" + ", ".join(f"{name} {then.get(name)}, not {now[name]}" for name in changed) + ")"
    )


def _parquet(shard: Kind, rows: Sequence[dict[str, Any]], vectors: np.ndarray, width: int) -> bytes:
    texts = "captions" if shard == "images" else "caption"
    kind = pyarrow.list_(pyarrow.string()) if shard == "images" else pyarrow.string()
    flat = pyarrow.array(vectors.astype(np.float32).reshape(-1))
    columns = {
        "path": pyarrow.array([row["path"] for row in rows], pyarrow.string()),
        texts: pyarrow.array([row[texts] for row in rows], kind),
        "embedding": pyarrow.FixedSizeListArray.from_arrays(flat, width),
    }
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(columns), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    write_atomically(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
