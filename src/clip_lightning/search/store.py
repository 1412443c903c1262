"""How an index lies on disk: whole versions, a file that names the current one, shards of what is unfinished.

    IDX/current                 the name of the current version; replaced last, in one step
    IDX/versions/NAME/          manifest.json, left_out.json,
                                image.index, metadata/metadata_0.parquet, img_emb/img_emb_0.npy,
                                where captions are searched: captions.index, captions.parquet, captions.npy,
                                where it can be exported: text_tower/text.onnx, text_tower/tokenizer.json
    IDX/pending/DIGEST/         embeddings of a build that has not finished, by the model that made them

A version is never changed. So a build that is killed at any moment leaves the old index or the new one, and
whoever reads meanwhile needs no lock. Row i of the metadata, of the embeddings and of the FAISS index are the
same picture; names and columns are those of clip-retrieval.

N pictures, D the width of the embeddings.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow
from filelock import FileLock, Timeout
from pyarrow import parquet

from clip_lightning.errors import UserError
from clip_lightning.files import is_draft, write_atomically
from clip_lightning.search.text_tower import FOLDER, TextTowerFiles
from clip_lightning.search.vectors import IndexType, read_index, write_index

FORMAT = 1
# A cosine of two unit vectors changes by some 1e-5, which no search notices, and the files are half as large.
DTYPE = np.dtype(np.float16)
_VERSION = re.compile(r"v\d{6,}")
_PENDING = re.compile(r"[0-9a-f]{32}")
_PARTS = {"metadata", "img_emb", "image.index", "captions.index", "captions.parquet", "captions.npy"}
_PARTS |= {FOLDER, "left_out.json", "manifest.json"}


@dataclass(frozen=True, slots=True)
class Row:
    """What the metadata say of one picture.

    Attributes:
        path: absolute.
        captions: those that its data set has for it.
        width: pixels, upright; likewise `height`.
        file_size: bytes.
        modified_ns: nanoseconds since the epoch.
        sha256: of the file's bytes, hexadecimal.
    """

    path: str
    captions: tuple[str, ...]
    width: int
    height: int
    file_size: int
    modified_ns: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a version says of itself.

    Attributes:
        identity: digest of the model's weights, transform and tokenizer.
        model: where the model was loaded from; None for one that was never on disk.
        source: the folder or annotation file.
        type: of the FAISS index.
        pictures: their number.
        captions: number of the captions that are searched; 0 where none are.
        width: of the embeddings.
        text_tower: digest of the text tower as ONNX, None where the version carries none.
    """

    identity: str
    model: str | None
    source: str
    type: IndexType
    pictures: int
    captions: int
    width: int
    text_tower: str | None = None
    created: str = ""
    format: int = FORMAT

    def __post_init__(self) -> None:
        """Check the values; a stranger may have written them.

        Raises:
            ValueError: one is of another kind.
        """
        texts = self.identity, self.source, self.created, self.model or "", self.text_tower or ""
        numbers = self.pictures, self.captions, self.width
        sound = all(isinstance(each, str) for each in texts) and self.type in get_args(IndexType)
        if not sound or not all(isinstance(each, int) and each >= 0 for each in numbers):
            raise ValueError("manifest.json holds values of another kind")


class Version:
    """One whole index, read when asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise UserError(
                f"{folder} has format {content.get('format')!r}, this version reads {FORMAT}; upgrade "
                "clip-lightning, or build the index anew with clip-lightning index ... --out ANOTHER"
            )
        self.manifest = Manifest(**content)

    def metadata(self) -> Any:
        """The metadata as an Arrow table of N rows."""
        return parquet.read_table(self.folder / "metadata" / "metadata_0.parquet")

    def rows(self) -> list[Row]:
        """The metadata as records."""
        table = self.metadata()
        names = ("image_path", "captions", "width", "height", "file_size", "modified_ns", "sha256")
        columns = (table[name].to_pylist() for name in names)
        return [Row(path, tuple(texts), *rest) for path, texts, *rest in zip(*columns, strict=True)]

    def embeddings(self) -> np.ndarray:
        """Unit vectors (N, D) fp16, memory-mapped."""
        vectors: np.ndarray = np.load(self.folder / "img_emb" / "img_emb_0.npy", mmap_mode="r")
        return vectors

    def index(self) -> Any:
        """The FAISS index of the pictures."""
        return read_index(self.folder / "image.index")

    def caption_index(self) -> Any:
        """The FAISS index of the captions."""
        return read_index(self.folder / "captions.index")

    def caption_table(self) -> Any:
        """An Arrow table: `caption`, and `pictures`, the rows of those that have it."""
        return parquet.read_table(self.folder / "captions.parquet")

    def caption_embeddings(self) -> np.ndarray:
        """Unit vectors of the captions, fp16, memory-mapped."""
        vectors: np.ndarray = np.load(self.folder / "captions.npy", mmap_mode="r")
        return vectors

    def text_tower(self) -> TextTowerFiles | None:
        """The text tower as ONNX; None where there is none, or not the one that was written."""
        if self.manifest.text_tower is None:
            return None
        files = TextTowerFiles(self.folder / FOLDER)
        return files if files.digest == self.manifest.text_tower else None

    def left_out(self) -> dict[str, str]:
        """Path → reason, of pictures that could not be read."""
        found: dict[str, str] = json.loads((self.folder / "left_out.json").read_text(encoding="utf-8"))
        return found


@dataclass(frozen=True)
class Content:
    """What a new version is made of; `captions` are distinct, `captions_of` the rows that have each."""

    manifest: Manifest
    rows: Sequence[Row]
    vectors: np.ndarray
    index: Any
    left_out: Mapping[str, str]
    captions: Sequence[str] = ()
    captions_of: Sequence[Sequence[int]] = ()
    caption_vectors: np.ndarray | None = None
    caption_index: Any = None
    text_tower: TextTowerFiles | None = None


class Store:
    """The folder of an index."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._versions = root / "versions"

    def current(self) -> Version | None:
        """The current version, None before the first one is finished.

        Raises:
            UserError: it is damaged.
        """
        for _ in range(10):
            try:
                name = (self.root / "current").read_text(encoding="utf-8").strip()
            except (FileNotFoundError, NotADirectoryError):
                return None
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"{self.root} is damaged ({error}); build it anew in another folder"
                ) from error
            if not _VERSION.fullmatch(name):
                raise UserError(
                    f"{self.root} is damaged: it names {name!r} as its version; build it anew in "
                    "another folder"
                )
            try:
                return Version(self._versions / name)
            except FileNotFoundError:
                time.sleep(0.05)  # a writer removed it between the two lines: there is a newer one
            except UserError:
                raise
            except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(
                    f"{self.root} is damaged ({error}); build it anew in another folder"
                ) from error
        raise UserError(f"{self.root} is damaged: it has no version {name}; build it anew in another folder")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only one who writes, in a folder that is ours, without the rest of killed builds.

        Raises:
            UserError: somebody else writes, or the folder holds something else.
        """
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"--out {self.root} is a file; give a new folder or one of an index")
        self.root.mkdir(parents=True, exist_ok=True)
        # a current version is read before anything is removed, so that it is known to be ours
        if not (self.root / "current").exists() and not self._is_unfinished():
            raise UserError(
                f"--out {self.root} holds something else than an index; give a new or empty folder"
            )
        try:
            with FileLock(self.root / ".lock", timeout=0):
                self._remove_others()
                yield
        except Timeout:
            raise UserError(
                f"another process is writing the index {self.root}; wait for it, or give another --out"
            ) from None

    def pending(self, identity: str) -> Path:
        """Where the shards of an unfinished build with this model lie."""
        return self.root / "pending" / identity[:32]

    def write(self, content: Content) -> None:
        """Make the content the current version."""
        names = (folder.name for folder in self._versions.glob("v*"))
        numbers = [int(name[1:]) for name in names if _VERSION.fullmatch(name)]
        folder = self._versions / f"v{max(numbers, default=0) + 1:06d}"
        (folder / "metadata").mkdir(parents=True)
        (folder / "img_emb").mkdir()
        _write_table(folder / "metadata" / "metadata_0.parquet", _metadata(content.rows))
        np.save(folder / "img_emb" / "img_emb_0.npy", content.vectors.astype(DTYPE))
        write_index(content.index, folder / "image.index")
        if content.caption_vectors is not None:
            columns = {
                "caption": list(content.captions),
                "pictures": [list(rows) for rows in content.captions_of],
            }
            _write_table(folder / "captions.parquet", pyarrow.table(columns))
            np.save(folder / "captions.npy", content.caption_vectors.astype(DTYPE))
            write_index(content.caption_index, folder / "captions.index")
        if content.text_tower is not None:
            content.text_tower.put_into(folder / FOLDER)
        _write_json(folder / "left_out.json", dict(content.left_out))
        manifest = replace(content.manifest, created=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        _write_json(folder / "manifest.json", asdict(manifest))
        _reach_the_disk(folder)
        write_atomically(self.root / "current", folder.name.encode())
        self._remove_others()

    def remove_pending(self) -> None:
        """Forget the shards of unfinished builds: their content is in the current version."""
        shutil.rmtree(self.root / "pending", ignore_errors=True)

    def _is_unfinished(self) -> bool:
        """Return whether the folder holds nothing but the beginning of a first version."""
        others = {entry.name for entry in self.root.iterdir()} - {"versions", "pending", ".lock"}
        versions, pending = self._versions.glob("*"), (self.root / "pending").glob("*")
        return (
            all(map(is_draft, others))
            and all(_PENDING.fullmatch(folder.name) for folder in pending)
            and all(
                _VERSION.fullmatch(folder.name) and {entry.name for entry in folder.iterdir()} <= _PARTS
                for folder in versions
            )
        )

    def _remove_others(self) -> None:
        """Remove versions that are replaced or were never finished, and unfinished pointers to them."""
        current = self.current()
        for file in self.root.iterdir():
            if is_draft(file.name):
                file.unlink(missing_ok=True)
        for folder in self._versions.glob("v*"):
            if _VERSION.fullmatch(folder.name) and (current is None or folder.name != current.folder.name):
                shutil.rmtree(folder, ignore_errors=True)


def save_shard(folder: Path, kind: str, columns: dict[str, list[Any]], vectors: np.ndarray) -> None:
    """Keep finished embeddings (rows, D) with what they belong to, all or nothing."""
    raw = [vector.tobytes() for vector in vectors.astype(DTYPE)]
    buffer = BytesIO()
    parquet.write_table(pyarrow.table({**columns, "embedding": pyarrow.array(raw, pyarrow.binary())}), buffer)
    write_atomically(folder / f"{kind}-{time.time_ns()}.parquet", buffer.getvalue())


def load_shards(folder: Path, kind: str) -> Iterator[tuple[dict[str, list[Any]], np.ndarray]]:
    """The columns and embeddings of every shard that can be read; the others are computed again."""
    for file in sorted(folder.glob(f"{kind}-*.parquet")):
        try:
            columns = parquet.read_table(file).to_pydict()
            raw = columns.pop("embedding")
            vectors = np.frombuffer(b"".join(raw), DTYPE).reshape(len(raw), -1)
        except (pyarrow.ArrowException, OSError, ValueError, KeyError):
            file.unlink(missing_ok=True)
            continue
        yield columns, vectors


def _metadata(rows: Sequence[Row]) -> Any:
    texts = pyarrow.list_(pyarrow.string())
    first = [row.captions[0] if row.captions else None for row in rows]
    return pyarrow.table(
        {
            "image_path": [row.path for row in rows],
            "caption": pyarrow.array(first, pyarrow.string()),
            "captions": pyarrow.array([list(row.captions) for row in rows], texts),
            **{
                name: [getattr(row, name) for row in rows]
                for name in ("width", "height", "file_size", "modified_ns", "sha256")
            },
        }
    )


def _write_table(path: Path, table: Any) -> None:
    parquet.write_table(table, path, compression="zstd")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _reach_the_disk(folder: Path) -> None:
    """Or lost power could leave the new name with files that were never written."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
