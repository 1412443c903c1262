"""Searches images by sentences, images or embeddings, and captions by images.

Q queries, N sentences, D the width of the embeddings.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from clip_lightning.errors import UserError
from clip_lightning.search import vectors
from clip_lightning.search.folder import EmbeddingsFolder, Manifest, Options

if TYPE_CHECKING:  # torch takes seconds to import, and a sentence may need none of it
    from torch import Tensor

    from clip_lightning.model.clip import CLIP


DEFAULTS = Options()
TEXTS = 64  # sentences per forward pass
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image in the results of a query.

    Attributes:
        path: absolute path.
        score: cosine similarity of the image and the query.
        captions: captions of the image in the data set.
        width: width in pixels.
        height: height in pixels.
        missing: whether the file no longer exists.
    """

    path: Path
    score: float
    captions: tuple[str, ...]
    width: int
    height: int
    missing: bool


@dataclass(frozen=True, slots=True)
class FoundCaption:
    """A caption in the results of a query, with its cosine similarity and the images that it belongs to."""

    caption: str
    score: float
    paths: tuple[Path, ...]


class OnnxTextTower:
    """Embeds sentences without torch; the results equal those of the model up to rounding."""

    def __init__(self, folder: Path) -> None:
        """Load `text.onnx` and `tokenizer.json`.

        Raises:
            ModuleNotFoundError: onnxruntime or tokenizers is not installed.
        """
        import onnxruntime
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        options = {"providers": ["CPUExecutionProvider"]}
        self._session = onnxruntime.InferenceSession(str(folder / "text.onnx"), **options)

    def embed(self, sentences: Sequence[str]) -> np.ndarray:
        """Return unit-length embeddings (N, D) fp32; a warning is logged for truncated sentences."""
        parts = [self._run(sentences[at : at + TEXTS]) for at in range(0, len(sentences), TEXTS)]
        return np.concatenate(parts)

    def _run(self, sentences: Sequence[str]) -> np.ndarray:
        encoded = self._tokenizer.encode_batch(list(sentences))
        for sentence, tokens in zip(sentences, encoded, strict=True):
            if tokens.overflowing:
                _warn_of_truncation(sentence, len(tokens.ids))
        ids = np.array([tokens.ids for tokens in encoded], np.int64)
        mask = np.array([tokens.attention_mask for tokens in encoded], np.int64)
        if ids.shape[1] == 0:  # all sentences are empty, and the tokenizer adds no special tokens
            ids = np.full((len(encoded), 1), (self._tokenizer.padding or {})["pad_id"], np.int64)
            mask = np.zeros_like(ids)
        embeddings: np.ndarray = self._session.run(
            ["embeddings"], {"input_ids": ids, "attention_mask": mask}
        )[0]
        return embeddings


class ImageIndex:
    """The embeddings of images, as they were when the index was loaded."""

    def __init__(
        self, folder: EmbeddingsFolder, manifest: Manifest, model: CLIP | str | Path | None = None
    ) -> None:
        self.manifest = manifest
        self._folder, self._model = folder, model
        # read now, as a writer may replace the files later
        self._lines, self._index = self._read("images")

    @classmethod
    def build(
        cls,
        model: CLIP | str | Path,
        source: str | Path,
        out: str | Path,
        options: Options = DEFAULTS,
    ) -> Self:
        """Build or update the index of a folder of images or a data set.

        Args:
            model: a CLIP, or the folder, Hub id or artifact of one.
            source: a folder of images, or a data set that `fit --data.root` accepts.
            out: folder of the index; embeddings that are in it already are reused.
            options: options of the index.

        Raises:
            UserError: see `clip-lightning index`.
        """
        from clip_lightning.search.build import build_index

        build_index(model, Path(source), Path(out), options)
        return cls.load(out, model)

    @classmethod
    def load(cls, path: str | Path, model: CLIP | str | Path | None = None) -> Self:
        """Load an index, or embeddings written by `embed`; the model is loaded when a query needs it.

        Args:
            path: folder of the index.
            model: the model that built the index; by default, it is loaded from its recorded location.

        Raises:
            UserError: there is no finished index, or it is damaged.
        """
        folder = EmbeddingsFolder(Path(path))
        while True:
            manifest = folder.manifest()
            if manifest is None or not manifest.finished or not manifest.images:
                raise UserError(
                    f"there is no finished index in {path}; build or resume it with "
                    f"clip-lightning index MODEL FOLDER --out {path}"
                )
            try:
                with folder.reading():
                    return cls(folder, manifest, model)
            except UserError:
                if manifest == folder.manifest():  # otherwise a writer has just replaced it
                    raise

    def __len__(self) -> int:
        """Return the number of images."""
        return self.manifest.images

    @cached_property
    def clip(self) -> CLIP:
        """The model that built the index.

        Raises:
            UserError: the model was moved, or it is another model.
        """
        from clip_lightning.model.checkpoint import model_identity
        from clip_lightning.model.clip import CLIP
        from clip_lightning.model.encode import best_device

        model = self._model or self.manifest.model
        if not model:
            raise UserError("the index does not record the location of its model; give --model")
        if not self._model and os.path.isabs(self.manifest.model) and not os.path.isdir(self.manifest.model):
            raise UserError(
                f"the model of the index is no longer in {model}; give its new location as --model"
            )
        clip = (model if isinstance(model, CLIP) else CLIP.from_pretrained(model).to(best_device())).eval()
        if model_identity(clip) != self.manifest.identity:
            raise UserError(
                f"{'this' if isinstance(model, CLIP) else model} is not the model that the index was built "
                f"with ({self.manifest.model or 'unnamed'}): weights, transform or tokenizer differ; give "
                "that model as --model, or build another index"
            )
        return clip

    def search(
        self, queries: str | Sequence[str] | Tensor | np.ndarray, k: int = 9
    ) -> list[list[FoundImage]]:
        """Find the k most similar images for each query, the best first.

        Args:
            queries: one or several sentences, or unit-length embeddings (Q, D).
            k: number of images per query; all images are returned if there are fewer.
        """
        if hasattr(queries, "ndim"):
            embeddings = self._checked(queries)
        else:
            sentences = [queries] if isinstance(queries, str | Path) else queries
            embeddings = self._embed_texts([*map(str, sentences)])
        return [
            [self._image(self._lines[row], score) for row, score in hits]
            for hits in vectors.search(self._index, embeddings, k)
        ]

    def search_by_image(self, images: Any, k: int = 9) -> list[list[FoundImage]]:
        """Find the k images most similar to each query; the results include the query if it is indexed.

        Args:
            images: one or several images, in any form that `CLIP.embed_images` accepts.
            k: number of images per query; all images are returned if there are fewer.

        Raises:
            BrokenImage: an image cannot be read.
        """
        return self.search(self.clip.embed_images(images), k)

    def captions(self, images: Any, k: int = 9) -> list[list[FoundCaption]]:
        """Find the k captions of the data set that match each query best.

        Args:
            images: one or several images, in any form that `CLIP.embed_images` accepts, or embeddings (Q, D).
            k: number of captions per query; all captions are returned if there are fewer.

        Raises:
            BrokenImage: an image cannot be read.
            UserError: the index was built without captions.
        """
        if not self.manifest.captions:
            raise UserError("the index contains no captions; build it with --captions true")
        are_embeddings = getattr(images, "ndim", 0) == 2
        embeddings = self._checked(images if are_embeddings else self.clip.embed_images(images))
        images_of, stored = self._captions
        texts = list(images_of)
        return [
            [FoundCaption(texts[row], score, tuple(images_of[texts[row]])) for row, score in hits]
            for hits in vectors.search(stored, embeddings, k)
        ]

    def _read(self, kind: Literal["images", "captions"]) -> tuple[list[bytes], Any]:
        """Return the rows of one kind as JSON, and their FAISS index or their embeddings."""
        parts = [part for part in self.manifest.parts if part.startswith(kind)]
        lines = [line for part in parts for line in self._folder.lines(part)]
        if kind == "images" and self.manifest.faiss:
            [(name, size)] = self.manifest.faiss.items()
            index = vectors.read_index(self._folder.root / name, size)
            shape = index.ntotal, index.d
        else:
            index = np.concatenate([*map(self._folder.vectors, parts)], dtype=np.float32, casting="no")
            shape = index.shape
        if shape != (len(lines), self.manifest.width) or len(lines) != getattr(self.manifest, kind):
            raise ValueError("its parts do not match")
        return lines, index

    @cached_property
    def _captions(self) -> tuple[dict[str, list[Path]], np.ndarray]:
        """The images of each distinct caption, and the embeddings of these captions."""
        images_of, first = defaultdict[str, list[Path]](list), []
        with self._folder.reading():
            lines, stored = self._read("captions")
            for number, row in enumerate(map(json.loads, lines)):
                if row["caption"] not in images_of:
                    first.append(number)
                images_of[row["caption"]].append(Path(row["path"]))
        return images_of, stored[first]

    @cached_property
    def _text_tower(self) -> OnnxTextTower | None:
        """The text tower in the index, unless a model was given or is already loaded."""
        if self.manifest.text_tower and not self._model and "clip" not in self.__dict__:
            with self._folder.reading(), contextlib.suppress(ModuleNotFoundError):
                return OnnxTextTower(self._folder.text_tower(self.manifest.identity))
        return None

    def _embed_texts(self, sentences: list[str]) -> np.ndarray:
        if not sentences:
            return np.empty((0, self.manifest.width), np.float32)
        if self._text_tower is not None:
            return self._text_tower.embed(sentences)
        tokenize = self.clip.tokenize
        tokens = tokenize.tokenizer(sentences, verbose=False)["input_ids"]
        for sentence, ids in zip(sentences, tokens, strict=True):
            if len(ids) > tokenize.max_length:
                _warn_of_truncation(sentence, tokenize.max_length)
        embeddings: np.ndarray = self.clip.embed_texts(sentences).numpy()
        return embeddings

    def _checked(self, embeddings: Any) -> np.ndarray:
        array = np.asarray(embeddings.detach().cpu() if hasattr(embeddings, "detach") else embeddings)
        if array.ndim != 2 or array.shape[1] != self.manifest.width:
            raise UserError(f"embeddings of shape {array.shape}: expected (queries, {self.manifest.width})")
        return array

    def _image(self, line: bytes, score: float) -> FoundImage:
        with self._folder.reading():
            row = json.loads(line)
            path, size = Path(row["path"]), (row["width"], row["height"])
            return FoundImage(path, score, tuple(row["captions"]), *size, missing=not path.exists())


def _warn_of_truncation(sentence: str, most: int) -> None:
    _log.warning("the model reads only the first %d tokens of %r", most, sentence[:60] + "...")
