"""Searches images by sentences, images or embeddings.

Q queries, N sentences, D the width of the embeddings.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from clip_lightning.errors import UserError
from clip_lightning.search import vectors
from clip_lightning.search.folder import EmbeddingsFolder, Manifest, Options

if TYPE_CHECKING:  # torch takes seconds to import, and a sentence may need none of it
    from torch import Tensor

    from clip_lightning.model.clip import CLIP


DEFAULTS = Options()
BATCH_SIZE = 64  # sentences per forward pass
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image in the results of a query."""

    path: Path  # absolute
    score: float  # cosine similarity of the image and the query
    captions: tuple[str, ...]  # of the image in the data set
    width: int  # in pixels
    height: int
    missing: bool  # whether the file no longer exists


class ImageIndex:
    """The embeddings of images, as they were when the index was loaded."""

    def __init__(
        self, folder: EmbeddingsFolder, manifest: Manifest, model: CLIP | str | Path | None = None
    ) -> None:
        self.manifest = manifest
        self._folder, self._model = folder, model
        # read now, as a writer may replace the files later
        self._lines, self._index = self._read()

    @classmethod
    def build(
        cls, model: CLIP | str | Path, source: str | Path, out: str | Path, options: Options = DEFAULTS
    ) -> Self:
        """Build or update the index of a folder of images or a data set, as `clip-lightning index` does.

        The source may also be the annotation file of a data set. Embeddings that are in `out` are reused.
        """
        from clip_lightning.search.build import build_index

        build_index(model, Path(source), Path(out), options)
        return cls.load(out, model)

    @classmethod
    def load(cls, path: str | Path, model: CLIP | str | Path | None = None) -> Self:
        """Load an index, or embeddings written by `embed`; a `UserError` says if it is missing or damaged.

        The model is loaded when a query needs it, by default from the location that the index records.
        """
        folder = EmbeddingsFolder(Path(path))
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
            if manifest == folder.manifest():
                raise
            return cls.load(path, model)  # a writer has just replaced the files

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._lines)

    @cached_property
    def clip(self) -> CLIP:
        """The model that built the index; a `UserError` says if it was moved or is another model."""
        from clip_lightning.model.checkpoint import model_identity
        from clip_lightning.model.clip import CLIP
        from clip_lightning.model.encode import best_device

        stored = self.manifest.model
        model = self._model or stored
        if not model or (model == stored and os.path.isabs(stored) and not os.path.exists(stored)):
            raise UserError(f"the model of the index is not in {stored or 'a folder'}; give it as --model")
        clip = model if isinstance(model, CLIP) else CLIP.from_pretrained(model).to(best_device())
        clip = clip.with_dims(min(self.manifest.width, clip.dims))
        if model_identity(clip) != self.manifest.identity:
            raise UserError(
                f"{'this' if isinstance(model, CLIP) else model} is not the model that the index was built "
                f"with ({stored or 'unnamed'}): weights, transform or tokenizer differ; give that model as "
                "--model, or build another index"
            )
        return clip

    def search(
        self, queries: str | Sequence[str] | Tensor | np.ndarray, k: int = 9
    ) -> list[list[FoundImage]]:
        """Find the k most similar images, or all if there are fewer, for each query, the best first.

        The queries are one or several sentences, or unit-length embeddings (Q, D).
        """
        if not hasattr(queries, "ndim"):
            queries = self._embed_texts([queries] if isinstance(queries, str) else list(queries))
        hits = vectors.search(self._index, queries, k)
        with self._folder.reading():
            return [[self._image(row, score) for row, score in of_query] for of_query in hits]

    def search_by_image(self, images: Any, k: int = 9) -> list[list[FoundImage]]:
        """Find the k images most similar to each of one or several images; an indexed image finds itself.

        The images may have any form that `CLIP.embed_images` accepts.
        """
        return self.search(self.clip.embed_images(images), k)

    def _read(self) -> tuple[list[bytes], Any]:
        """Return the rows of the images as JSON, and their FAISS index or their embeddings."""
        parts = [part for part in self.manifest.parts if part.startswith("images")]
        lines = [line for part in parts for line in self._folder.read(part)[0]]
        if len(lines) != self.manifest.images:
            raise ValueError("its parts do not match")
        if self.manifest.faiss_bytes:
            file = self._folder.faiss_file(self.manifest.parts)
            index = vectors.read_index(file, self.manifest.faiss_bytes)
            if (index.ntotal, index.d) != (len(lines), self.manifest.width):
                raise ValueError("its parts do not match")
            return lines, index
        return lines, self._folder.read_embeddings(parts, len(lines), self.manifest.width)

    def _embed_texts(self, sentences: list[str]) -> Any:
        """Return unit-length embeddings (N, D); those of ONNX equal those of the model up to rounding."""
        if not sentences or self._text_tower is None:
            tokenize = self.clip.tokenize
            for sentence in sentences:
                if len(tokenize.tokenizer(sentence, verbose=False)["input_ids"]) > tokenize.max_length:
                    _warn_of_truncated(sentence, tokenize.max_length)
            return self.clip.embed_texts(sentences)
        (tokenizer, session), parts = self._text_tower, []
        for start in range(0, len(sentences), BATCH_SIZE):
            batch = sentences[start : start + BATCH_SIZE]
            encoded = tokenizer.encode_batch(batch)
            for sentence, tokens in zip(batch, encoded, strict=True):
                if tokens.overflowing:
                    _warn_of_truncated(sentence, len(tokens.ids))
            ids = np.array([tokens.ids for tokens in encoded], np.int64)
            mask = np.array([tokens.attention_mask for tokens in encoded], np.int64)
            parts += session.run(["embeddings"], {"input_ids": ids, "attention_mask": mask})
        return np.concatenate(parts)

    @cached_property
    def _text_tower(self) -> tuple[Any, Any] | None:
        """Tokenizer and ONNX session of the tower in the index, unless a model was given or is loaded."""
        if self.manifest.text_tower and not self._model and "clip" not in self.__dict__:
            folder = self._folder.text_tower(self.manifest.identity)
            with self._folder.reading(), contextlib.suppress(ModuleNotFoundError):
                import onnxruntime
                from tokenizers import Tokenizer

                tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
                model, providers = str(folder / "text.onnx"), ["CPUExecutionProvider"]
                return tokenizer, onnxruntime.InferenceSession(model, providers=providers)
        return None

    def _image(self, number: int, score: float) -> FoundImage:
        row = json.loads(self._lines[number])
        path, size = Path(row["path"]), (row["width"], row["height"])
        return FoundImage(path, score, tuple(row["captions"]), *size, missing=not path.exists())


def _warn_of_truncated(sentence: str, length: int) -> None:
    _log.warning("the model reads only the first %d tokens of %r", length, f"{sentence[:60]}...")
