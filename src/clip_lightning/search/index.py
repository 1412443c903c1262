"""ImageIndex: pictures found by sentences, by pictures or by embeddings, and captions found by pictures.

Q queries, D the width of the embeddings.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from clip_lightning.errors import UserError
from clip_lightning.search import vectors
from clip_lightning.search.store import Store, Version
from clip_lightning.search.text_tower import OnnxTextTower

if TYPE_CHECKING:  # torch takes seconds to import, and a sentence may need none of it
    from torch import Tensor

    from clip_lightning.model.clip import CLIP


@dataclass(frozen=True, slots=True)
class FoundPicture:
    """A picture that a query found.

    Attributes:
        path: absolute.
        score: cosine of the query's and the picture's embedding.
        captions: what its data set says of it.
        width: pixels; likewise `height`.
        missing: whether the file is no longer there.
    """

    path: Path
    score: float
    captions: tuple[str, ...]
    width: int
    height: int
    missing: bool

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self) | {"path": str(self.path), "captions": list(self.captions)}


@dataclass(frozen=True, slots=True)
class FoundCaption:
    """A caption that a picture found, with its cosine and the pictures that the data set has it for."""

    caption: str
    score: float
    paths: tuple[Path, ...]

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self) | {"paths": [str(path) for path in self.paths]}


class ImageIndex:
    """A finished index, as it was when it was loaded."""

    def __init__(self, version: Version, model: CLIP | str | Path | None = None) -> None:
        self.manifest = version.manifest
        self._version = version
        self._model = model
        # read at once, so that a writer may replace the version meanwhile
        self._index = version.index()
        self._metadata = version.metadata()
        self._vectors = version.embeddings()
        shapes = (self._index.ntotal, self._index.d), (self._metadata.num_rows, self.manifest.width)
        if not shapes[0] == shapes[1] == self._vectors.shape == (self.manifest.pictures, self.manifest.width):
            raise UserError(f"{version.folder} is damaged: its parts do not belong together; build it anew")
        self._captions: tuple[Any, Any, np.ndarray] | None = None
        if self.manifest.captions:
            self._captions = (version.caption_index(), version.caption_table(), version.caption_embeddings())

    @classmethod
    def build(
        cls,
        model: CLIP | str | Path,
        source: str | Path,
        out: str | Path,
        *,
        type: str = "auto",
        batch_size: int = 64,
        num_workers: int | None = None,
        captions: bool | None = None,
        onnx: bool | None = None,
    ) -> Self:
        """Build the index of a folder of pictures or a data set, or bring it up to date.

        Args:
            model: a CLIP, or the folder, hub id or artifact of one.
            source: a folder of pictures, or what `fit --data.root` takes.
            out: the index's folder; what is there already is used.
            type: `flat`, `hnsw`, `ivfpq`, or `auto`, which goes by the number of pictures.
            batch_size: pictures that the tower sees at once.
            num_workers: threads that read and decode; one a core by default.
            captions: whether captions are searched, too; as it was by default, and at first not.
            onnx: whether the index carries its text tower as ONNX; by default where that can be.

        Raises:
            UserError: no model, no pictures, an index of another model, another writer, or no room.
        """
        from clip_lightning.search.build import Options, build_index

        options = Options(type, batch_size, num_workers, captions, onnx)
        build_index(model, Path(source), Path(out), options)
        return cls.load(out, model)

    @classmethod
    def load(cls, path: str | Path, model: CLIP | str | Path | None = None) -> Self:
        """Read a finished index; the model is loaded with the first query that needs it.

        Args:
            path: the index's folder.
            model: the model that built it; by default from where it was then.

        Raises:
            UserError: no index there, or a damaged one.
        """
        for attempt in range(3):
            version = Store(Path(path)).current()
            if version is None:
                raise UserError(
                    f"there is no finished index in {path}; make it, or finish it, with "
                    "clip-lightning index MODEL FOLDER --out " + str(path)
                )
            try:
                return cls(version, model)
            except MemoryError:
                raise
            except Exception as error:  # damaged files make Arrow, numpy and FAISS raise nearly every kind
                # a writer may have replaced it meanwhile
                if attempt == 2 or (version.folder / "manifest.json").exists():
                    reason = " ".join(str(error).split())
                    raise UserError(
                        f"the index {path} cannot be read: {reason}; build it anew in another folder"
                    ) from error
        raise AssertionError("unreachable")

    def __len__(self) -> int:
        """The number of pictures."""
        return self.manifest.pictures

    @cached_property
    def clip(self) -> CLIP:
        """The model that built the index.

        Raises:
            UserError: it is gone, or another one was given.
        """
        from clip_lightning.model.clip import CLIP
        from clip_lightning.model.identity import load_model, model_identity

        model = self._model if self._model is not None else self.manifest.model
        if model is None:
            raise UserError("the index does not say where its model is; give --model")
        if isinstance(model, CLIP):
            clip, name = model.eval(), "the model given"
        else:
            name = str(model)
            if self._model is None and os.path.isabs(name) and not os.path.isdir(name):
                raise UserError(f"the model of the index is no longer at {name}; give its place as --model")
            clip = load_model(model)
        if model_identity(clip) != self.manifest.identity:
            raise UserError(
                f"{name} is not the model that the index was built with "
                f"({self.manifest.model or 'unnamed'}): weights, transform or tokenizer differ; give "
                "that one as --model, or build another index"
            )
        return clip

    def search(
        self, queries: str | Sequence[str] | Tensor | np.ndarray, k: int = 9
    ) -> list[list[FoundPicture]]:
        """The k most similar pictures for each query, the best first.

        Args:
            queries: sentences (one of them may be given as it is), or embeddings (Q, D) of unit length.
            k: how many; all where there are fewer.
        """
        if isinstance(queries, str | Path):
            queries = [queries]
        if _is_array(queries):
            embeddings = self._checked(queries)
        else:
            embeddings = self._embedded_texts([str(query) for query in queries])
        _check_k(k)
        found = vectors.search(self._index, self.manifest.type, self._vectors, embeddings, k)
        return [self._pictures(hits) for hits in found]

    def search_by_image(self, images: Any, k: int = 9) -> list[list[FoundPicture]]:
        """Find the k images most similar to each query; one that is indexed finds itself.

        Args:
            images: one image or several, in any form that `CLIP.embed_images` takes.
            k: how many; all where there are fewer.

        Raises:
            UserError: an image cannot be read.
        """
        return self.search(self._embedded(images), k)

    def captions(self, images: Any, k: int = 9) -> list[list[FoundCaption]]:
        """Find the k captions of the data set that fit each query best.

        Args:
            images: one image or several, in any form that `CLIP.embed_images` takes, or embeddings (Q, D).
            k: how many; all where there are fewer.

        Raises:
            UserError: the index was built without captions, or an image cannot be read.
        """
        if self._captions is None:
            raise UserError("the index has no captions to find; build it with --captions true")
        _check_k(k)
        index, table, stored = self._captions
        embeddings = self._embedded(images) if getattr(images, "ndim", 0) != 2 else self._checked(images)
        kind = vectors.chosen_type("auto", len(stored))
        return [
            [self._caption(table, row, score) for row, score in hits]
            for hits in vectors.search(index, kind, stored, embeddings, k)
        ]

    @cached_property
    def _text_tower(self) -> OnnxTextTower | None:
        """The text tower that the index carries; a model that was given is asked itself."""
        if self._model is not None or "clip" in self.__dict__:
            return None
        return OnnxTextTower.of_version(self._version.folder, self.manifest.text_tower)

    def _embedded_texts(self, sentences: list[str]) -> np.ndarray:
        if not sentences:
            return np.empty((0, self.manifest.width), np.float32)
        if self._text_tower is not None:
            return self._text_tower.embed(sentences)
        embeddings: np.ndarray = self.clip.embed_texts(sentences).numpy()
        return embeddings

    def _embedded(self, images: Any) -> np.ndarray:
        from clip_lightning.data.images import BrokenImage

        try:
            embeddings: np.ndarray = self.clip.embed_images(images).numpy()
        except BrokenImage as error:
            raise UserError(str(error)) from error
        return embeddings

    def _checked(self, embeddings: Any) -> np.ndarray:
        array = np.asarray(embeddings.detach().cpu() if hasattr(embeddings, "detach") else embeddings)
        if array.ndim != 2 or array.shape[1] != self.manifest.width:
            raise UserError(
                f"embeddings of shape {array.shape}: expected (queries, {self.manifest.width}), of unit "
                "length"
            )
        return array

    def _pictures(self, hits: list[tuple[int, float]]) -> list[FoundPicture]:
        records = self._metadata.take([row for row, _ in hits]).to_pylist() if hits else []
        return [
            FoundPicture(
                path=Path(record["image_path"]),
                score=score,
                captions=tuple(record["captions"]),
                width=record["width"],
                height=record["height"],
                missing=not os.path.exists(record["image_path"]),
            )
            for record, (_, score) in zip(records, hits, strict=True)
        ]

    def _caption(self, table: Any, row: int, score: float) -> FoundCaption:
        names = self._metadata["image_path"]
        paths = tuple(Path(names[number].as_py()) for number in table["pictures"][row].as_py())
        return FoundCaption(table["caption"][row].as_py(), score, paths)


def _is_array(queries: Any) -> bool:
    """Whether these are embeddings: a tensor or an array."""
    return hasattr(queries, "ndim")


def _check_k(k: int) -> None:
    if k < 1:
        raise UserError(f"--k {k}: expected 1 or more")
