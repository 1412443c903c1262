"""Stores embeddings: `embed` writes them, `index` adds a FAISS file, and `search` reads them.

    OUT/manifest.json                       model, data, settings, and the files of the current version
    OUT/images-00000-of-00012-DIGEST.npy    float32 (rows, D), unit length
    OUT/images-00000-of-00012-DIGEST.jsonl  one line per row: {"path": ..., "captions": [...], ...}
    OUT/captions-00000-of-00060-DIGEST.npy  the same of captions; a line is {"path": ..., "caption": ...}
    OUT/images-DIGEST.faiss                 an approximate index of all images, if there is one
    OUT/text_tower-DIGEST/                  the text tower as ONNX, if there is one
    OUT/broken.json                         reasons for which images cannot be decoded, by path

With Parquet, a part is one file, with the vectors in the column `embedding`. Parts are named by the digest of
their content and never change, and the manifest is replaced last: if a process is killed, the folder has the
old or the new version, the next process reuses every complete part, and readers need no lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout

from clip_lightning.errors import UserError
from clip_lightning.files import is_draft, write_atomically

What = Literal["images", "captions", "both"]
Format = Literal["npy", "parquet"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
IndexType = Literal["flat", "ivfpq"]
Row = dict[str, Any]
MADE_BY = "clip-lightning embeddings 1"
_SUFFIXES = {"npy": ("jsonl", "npy"), "parquet": ("parquet",)}  # in the order of writing
_STEM, _DIGEST = r"(images|captions)-\d{5,}-of-\d{5,}", "[0-9a-f]{16}"
_PART = re.compile(rf"{_STEM}-{_DIGEST}\.(npy|parquet)")
_FAISS = re.compile(rf"images-{_DIGEST}\.faiss")
_OTHER = re.compile(rf"{_STEM}-{_DIGEST}\.jsonl|\.{_STEM}\.lock|\.?text_tower-{_DIGEST}(-.+)?")


@dataclass(frozen=True)
class Options:
    """Options for embeddings and indexes.

    Attributes:
        type: type of the index: flat (exact), ivfpq (compressed), or auto, which uses flat below 100,000
            images and ivfpq above.
        onnx: store the text tower as ONNX in the index, so that search answers a sentence within a second or
            two without loading the model; by default if onnxruntime is installed and the tower can be
            exported.
        batch_size: number of images or captions per forward pass.
        num_workers: number of threads that read and decode images; by default one per core.
        what: images, captions, or both; by default what the folder has, or images for a new folder.
        format: npy, with a JSON lines file for the rows, or parquet, with everything in one file; by default
            the format of the folder, or npy for a new folder.
        shard_size: number of rows per file; by default as in the folder, or 1024.
        precision: precision of the towers; by default as in the folder, or 32-true.
    """

    type: Literal["auto", "flat", "ivfpq"] = "auto"
    onnx: bool | None = None
    batch_size: int = 64
    num_workers: int | None = None
    what: What | None = None
    format: Format | None = None
    shard_size: int | None = None
    precision: Precision | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("batch_size", "num_workers", "shard_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name} {value}: expected 1 or more")

    def settings(self) -> dict[str, Any]:
        """Return the given options that are stored in the folder."""
        names = ("what", "format", "shard_size", "precision")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        identity: digest of the model's weights, transform and tokenizer.
        model: location from which the model was loaded; empty for a model in memory.
        source: folder or annotation file of the data.
        images: number of rows of images.
        captions: number of rows of captions.
        parts: number of rows of each file, in order.
        faiss: number of bytes of the FAISS file by its name.
        text_tower: digest of the text tower's files; empty if there are none.
        finished: whether all parts exist.
    """

    identity: str = ""
    model: str = ""
    source: str = ""
    width: int = 0
    precision: Precision = "32-true"
    what: What = "images"
    format: Format = "npy"
    shard_size: int = 1024
    images: int = 0
    captions: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    type: IndexType = "flat"
    faiss: dict[str, int] = field(default_factory=dict)
    text_tower: str = ""
    finished: bool = False
    made_by: str = MADE_BY

    def __post_init__(self) -> None:
        """Check the values, which are not trusted.

        Raises:
            ValueError: a value has the wrong type, or names a file elsewhere.
        """
        for name, value in vars(self).items():
            if type(value) is not (dict if name in ("parts", "faiss") else type(vars(Manifest)[name])):
                raise ValueError(f"{name} is {value!r}")
        if self.format not in _SUFFIXES or min(self.width, self.shard_size) < 1:
            raise ValueError("a value is out of range")
        if not all(map(_PART.fullmatch, self.parts)) or not all(map(_FAISS.fullmatch, self.faiss)):
            raise ValueError("it names other files")


class EmbeddingsFolder:
    """The folder of one model's embeddings."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def manifest(self) -> Manifest | None:
        """Read the manifest; return None if there is none.

        Raises:
            UserError: the manifest is damaged, or was written by another program.
        """
        file = self.root / "manifest.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("made_by") != MADE_BY:
                raise UserError(f"{file} was written by another program or version; give another folder")
            return Manifest(**content)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except UserError:
            raise
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{file} is damaged ({error}); write to a new folder") from error

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Lock the folder against other commands that write to it.

        Raises:
            UserError: another command is writing, the folder contains other files, or it cannot be written.
        """
        try:
            if self.manifest() is None and self.root.exists():
                if not all(_is_ours(entry.name) for entry in self.root.iterdir()):
                    raise UserError(
                        f"--out {self.root} contains something other than embeddings; give a new folder"
                    )
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / ".lock", timeout=0):
                yield
        except Timeout:
            raise UserError(
                f"another process is writing to {self.root}; wait for it, or give another --out"
            ) from None
        except OSError as error:
            raise UserError(
                f"--out {self.root} cannot be written ({error}); free some space there, or give another --out"
            ) from error

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Replace the exceptions that NumPy, Arrow and FAISS raise for damaged files.

        Raises:
            UserError: a file is damaged.
        """
        try:
            yield
        except (UserError, MemoryError):
            raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.root} is damaged ({reason}); repair it by running the command that wrote it again"
            ) from error

    def parts(self, stem: str = "") -> list[str]:
        """List all parts in the folder, including those that are not in the manifest."""
        names = (entry.name for entry in self.root.iterdir())
        return sorted(name for name in names if name.startswith(stem) and _PART.fullmatch(name))

    def is_intact(self, part: str) -> bool:
        """Return whether the content of a part matches the digest in its name."""
        name, _, format = part.rpartition(".")
        contents = [(self.root / f"{name}.{suffix}").read_bytes() for suffix in _SUFFIXES[format]]
        return name.endswith("-" + digest(contents))

    def lines(self, part: str) -> list[bytes]:
        """Return the rows of a part as JSON."""
        file = self.root / part
        if file.suffix == ".npy":
            return file.with_suffix(".jsonl").read_bytes().splitlines()
        from pyarrow import parquet

        rows = parquet.read_table(file).drop_columns("embedding").to_pylist()
        return [json.dumps(row).encode() for row in rows]

    def vectors(self, part: str) -> np.ndarray:
        """Return the embeddings of a part, (rows, D) fp32."""
        file = self.root / part
        if file.suffix == ".npy":
            vectors: np.ndarray = np.load(file, "r", allow_pickle=False)
            return vectors
        from pyarrow import parquet

        column = parquet.read_table(file, columns=["embedding"])["embedding"]
        return column.combine_chunks().flatten().to_numpy().reshape(len(column), column.type.list_size)

    def text_tower(self, identity: str) -> Path:
        """Return the folder of a model's text tower, which may not exist."""
        return self.root / f"text_tower-{identity[:16]}"

    def write_part(self, stem: str, format: Format, rows: Sequence[Row], vectors: np.ndarray) -> str:
        """Write a part and return its name."""
        buffer = BytesIO()
        if format == "npy":
            np.save(buffer, vectors)
            contents = ["".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()]
        else:
            _write_parquet(buffer, stem.startswith("images"), rows, vectors)
            contents = []
        contents.append(buffer.getvalue())
        name = f"{stem}-{digest(contents)}"
        for suffix, content in zip(_SUFFIXES[format], contents, strict=True):
            file = self.root / f"{name}.{suffix}"
            if not file.exists() or file.read_bytes() != content:
                write_atomically(file, content)
        return f"{name}.{format}"

    def write_manifest(self, manifest: Manifest) -> None:
        """Make this the current version."""
        if manifest != self.manifest():
            _write_json(self.root / "manifest.json", asdict(manifest))

    def publish(self, manifest: Manifest, broken: Mapping[str, str]) -> None:
        """Make this the current version, and remove the files of other versions."""
        _write_json(self.root / "broken.json", broken)
        self.write_manifest(manifest)
        rows = (part.replace(".npy", ".jsonl") for part in manifest.parts)
        kept = {".lock", *manifest.parts, *rows, *manifest.faiss}
        if manifest.text_tower:
            kept.add(self.text_tower(manifest.identity).name)
        for entry in self.root.iterdir():
            if entry.name not in kept and _is_ours(entry.name):
                if "text_tower-" in entry.name:
                    shutil.rmtree(entry)
                elif entry.is_file():
                    entry.unlink(missing_ok=True)


def digest(contents: Iterable[bytes]) -> str:
    """Return the first 16 hexadecimal digits of the contents' SHA-256."""
    return hashlib.sha256(b"".join(contents)).hexdigest()[:16]


def _is_ours(name: str) -> bool:
    return name == ".lock" or is_draft(name) or any(form.fullmatch(name) for form in (_PART, _FAISS, _OTHER))


def _write_parquet(buffer: BytesIO, images: bool, rows: Sequence[Row], vectors: np.ndarray) -> None:
    import pyarrow
    from pyarrow import parquet

    text, number = pyarrow.string(), pyarrow.int64()
    fields = {"path": text, "caption": text}
    if images:
        fields = {"path": text, "captions": pyarrow.list_(text), "sha256": text}
        fields |= dict.fromkeys(("width", "height", "file_size", "modified_ns"), number)
    table = pyarrow.Table.from_pylist(list(rows), pyarrow.schema(fields))
    column = pyarrow.FixedSizeListArray.from_arrays(vectors.reshape(-1), vectors.shape[1])
    parquet.write_table(table.append_column("embedding", column), buffer)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    write_atomically(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
