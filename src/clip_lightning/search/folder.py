"""Stores embeddings: `embed` writes them, `index` adds a FAISS file, and `search` reads them.

    OUT/manifest.json                       model, data, settings, and the files of the current version
    OUT/images-00000-of-00012-DIGEST.npy    float32 (rows, D), unit length; or int8 (see `as_int8`)
    OUT/images-00000-of-00012-DIGEST.jsonl  one line per row: {"path": ..., "captions": [...], ...}
    OUT/captions-00000-of-00060-DIGEST.npy  the same of captions; a line is {"path": ..., "caption": ...}
    OUT/images-DIGEST.faiss                 an approximate index of all images, if there is one
    OUT/text_tower-DIGEST/                  the text tower as ONNX, if there is one
    OUT/broken.json                         reasons for which images cannot be decoded, by path

Parts are named by the digest of their content and never change, and the manifest is replaced last: if a
process is killed, the folder has the old or the new version, the next process reuses every complete part, and
readers need no lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from jsonargparse.typing import PositiveInt

from clip_lightning.errors import UserError, as_user_error
from clip_lightning.files import write_atomically, write_json

Dtype = Literal["float32", "int8"]
Row = dict[str, Any]
MADE_BY = "clip-lightning embeddings 2"
_DIGEST = "[0-9a-f]{16}"
_STEM = rf"(images|captions)-\d{{5,}}-of-\d{{5,}}-{_DIGEST}"
_PART = re.compile(rf"{_STEM}\.npy")
_OURS = re.compile(
    rf"{_STEM}\.(npy|jsonl)|images-{_DIGEST}\.faiss|\.?text_tower-{_DIGEST}(-.+)?|\.lock"
    r"|\..+\.\d+\.tmp"  # a draft of `complete_file`
)


@dataclass(frozen=True)
class Options:
    """Options for embeddings and indexes.

    Attributes:
        type: type of the index: flat (exact), ivfpq (compressed), or auto, which uses flat below 100,000
            images and ivfpq above.
        onnx: store the text tower as ONNX in the index, so that search answers a sentence within a second or
            two without loading the model; by default if onnxruntime is installed and the tower can be
            exported.
        batch_size: number of images or captions per forward pass; by default 64 and 128, or 512 on a GPU.
        num_workers: number of threads that read and decode images; by default one per core.
        what: images, captions, or both; by default what the folder has, or images for a new folder.
        shard_size: number of rows per file; by default as in the folder, or 1024.
        precision: precision of the towers; by default as in the folder, or 32-true.
        dims: keep only the first numbers of each embedding, normalized again; by default as in the folder, or
            all.
        dtype: float32, or int8, which takes a quarter of the space; by default as in the folder, or float32.
    """

    type: Literal["auto", "flat", "ivfpq"] = "auto"
    onnx: bool | None = None
    batch_size: PositiveInt | None = None
    num_workers: PositiveInt | None = None
    what: Literal["images", "captions", "both"] | None = None
    shard_size: PositiveInt | None = None
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] | None = None
    dims: PositiveInt | None = None
    dtype: Dtype | None = None


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json, which is checked, as it is not trusted."""

    identity: str = ""  # digest of the model's weights, transform and tokenizer
    model: str = ""  # location from which the model was loaded; empty for a model in memory
    source: str = ""  # folder or annotation file of the data
    width: int = 0
    precision: str = "32-true"
    dtype: Dtype = "float32"
    what: str = "images"
    shard_size: int = 1024
    images: int = 0  # number of rows
    captions: int = 0
    parts: list[str] = field(default_factory=list)  # in order
    type: str = "flat"
    faiss_bytes: int = 0  # size of the FAISS file
    text_tower: str = ""  # digest of the text tower's files; empty if there are none
    finished: bool = False  # whether all parts exist
    made_by: str = MADE_BY

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, list if name == "parts" else type(vars(Manifest)[name])):
                raise ValueError(f"{name} is {value!r}")
        in_range = min(self.width, self.shard_size) > 0 and self.dtype in ("float32", "int8")
        if not in_range or not all(map(_PART.fullmatch, self.parts)):
            raise ValueError("a value is out of range, or names another file")


@dataclass(frozen=True)
class EmbeddingsFolder:
    """The folder of one model's embeddings."""

    root: Path

    def manifest(self) -> Manifest | None:
        """Read the manifest; return None if there is none."""
        file = self.root / "manifest.json"
        with as_user_error(f"{file} is damaged", "write to a new folder"):
            if not file.is_file():
                return None
            content = json.loads(file.read_bytes())
            is_ours = isinstance(content, dict) and content.get("made_by") == MADE_BY
            if is_ours and content.pop("format", "npy") == "npy":  # 0.2.0 could also write Parquet
                return Manifest(**content)
        raise UserError(f"{file} was written by another program or version; give another folder")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Lock the folder, which must contain nothing else, against other commands that write to it."""
        root = self.root
        try:
            if self.manifest() is None and root.exists() and not all(map(_is_ours, root.iterdir())):
                raise UserError(f"--out {root} contains something other than embeddings; give a new folder")
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / ".lock", timeout=0):
                yield
        except Timeout as error:
            raise UserError(f"another process is writing to {root}; wait, or give another --out") from error
        except OSError as error:
            raise UserError(f"--out {root} cannot be written ({error}); give another --out") from error

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Replace the exceptions that NumPy and FAISS raise for damaged files by a `UserError`."""
        return as_user_error(
            f"{self.root} is damaged", "repair it by running the command that wrote it again"
        )

    def intact_parts(self) -> Iterator[str]:
        """Yield the parts whose content matches the digest in their name, whether or not they are current."""
        for file in sorted(filter(lambda file: _PART.fullmatch(file.name), self.root.iterdir())):
            with contextlib.suppress(FileNotFoundError):  # half a part
                contents = file.with_suffix(".jsonl").read_bytes(), file.read_bytes()
                if file.stem.endswith(digest(contents)):
                    yield file.name

    def read(self, part: str) -> tuple[list[bytes], np.ndarray]:
        """Return the rows of a part as JSON, and their embeddings, (rows, D) fp32."""
        file = self.root / part
        lines = file.with_suffix(".jsonl").read_bytes().splitlines()
        rows = np.load(file, "r", allow_pickle=False)
        return lines, from_int8(rows) if rows.dtype == np.int8 else rows

    def read_embeddings(self, parts: Sequence[str], count: int, width: int) -> np.ndarray:
        """Return the embeddings of all these parts, (count, width) fp32, with one file open at a time."""
        embeddings, start = np.empty((count, width), np.float32), 0
        for part in parts:
            _, block = self.read(part)
            rows = embeddings[start : start + len(block)]
            if (block.shape, block.dtype) != (rows.shape, rows.dtype):
                raise ValueError("its parts do not match")
            rows[:] = block
            start += len(block)
        if start != count:
            raise ValueError("its parts do not match")
        return embeddings

    def faiss_file(self, parts: Iterable[str]) -> Path:
        """Return the path of the FAISS index of these parts, which may not exist."""
        images = (part.encode() for part in parts if part.startswith("images"))
        return self.root / f"images-{digest(images)}.faiss"

    def text_tower(self, identity: str) -> Path:
        """Return the folder of a model's text tower, which may not exist."""
        return self.root / f"text_tower-{identity[:16]}"

    def write_part(self, stem: str, rows: Sequence[Row], width: int, dtype: Dtype) -> str:
        """Write a part of rows with their `embedding`, and return its name."""
        buffer = BytesIO()
        embeddings = np.array([row["embedding"] for row in rows], np.float32).reshape(-1, width)
        np.save(buffer, as_int8(embeddings) if dtype == "int8" else embeddings)
        plain = ({name: value for name, value in row.items() if name != "embedding"} for row in rows)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in plain)
        contents = {"jsonl": lines.encode(), "npy": buffer.getvalue()}
        name = f"{stem}-{digest(contents.values())}"
        for suffix, content in contents.items():
            file = self.root / f"{name}.{suffix}"
            if not file.exists() or file.read_bytes() != content:
                write_atomically(file, content)
        return f"{name}.npy"

    def publish(self, manifest: Manifest) -> None:
        """Make this the current version, and remove the files of other versions."""
        write_json(self.root / "manifest.json", asdict(manifest))
        kept = {self.root / part for part in manifest.parts}
        kept |= {part.with_suffix(".jsonl") for part in kept} | {self.root / ".lock"}
        kept |= {self.faiss_file(manifest.parts)} if manifest.faiss_bytes else set()
        kept |= {self.text_tower(manifest.identity)} if manifest.text_tower else set()
        for entry in filter(_is_ours, {*self.root.iterdir()} - kept):
            if "text_tower-" in entry.name:
                shutil.rmtree(entry)
            elif entry.is_file():
                entry.unlink(missing_ok=True)


def as_int8(embeddings: np.ndarray) -> np.ndarray:
    """Round embeddings (N, D) of unit length to int8; 127 stands for the largest number of each row.

    The factors of the rows need not be stored, because the length of an embedding is known.
    """
    largest = np.abs(embeddings).max(axis=1, keepdims=True, initial=1e-12)
    return np.rint(embeddings * (127 / largest)).astype(np.int8)


def from_int8(rows: np.ndarray) -> np.ndarray:
    """Return embeddings (N, D) fp32 of unit length; `as_int8` of them gives the same rows again."""
    embeddings = rows.astype(np.float32)
    lengths: np.ndarray = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / lengths.clip(min=1)


def digest(contents: Iterable[bytes]) -> str:
    """Return the first 16 hexadecimal digits of the contents' SHA-256."""
    return hashlib.sha256(b"".join(contents)).hexdigest()[:16]


def _is_ours(path: Path) -> bool:
    return _OURS.fullmatch(path.name) is not None
