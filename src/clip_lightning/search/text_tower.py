"""The text tower that an index carries as ONNX: sentences → embeddings within a second, without torch.

N sentences, L tokens, D the width of the embeddings.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from clip_lightning.errors import UserError

FOLDER = "text_tower"
BATCH = 64


class TextTowerFiles:
    """`text.onnx` and `tokenizer.json` in a folder; `digest` is SHA-256 (hex) over both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sha = hashlib.sha256()
        for file in self._files():
            with file.open("rb") as stream:
                sha.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
        self.digest = sha.hexdigest()

    def put_into(self, folder: Path) -> None:
        """Have the same files in another folder, of the same disk blocks where the file system can."""
        folder.mkdir()
        for file in self._files():
            try:
                os.link(file, folder / file.name)
            except OSError:
                shutil.copyfile(file, folder / file.name)

    def _files(self) -> list[Path]:
        return sorted(file for file in self.folder.glob("*") if file.is_file())


class OnnxTextTower:
    """Embeds sentences as the model's own text tower does, up to rounding."""

    def __init__(self, files: TextTowerFiles) -> None:
        """Load it.

        Raises:
            ModuleNotFoundError: onnxruntime or tokenizers is not installed.
        """
        import onnxruntime
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(files.folder / "tokenizer.json"))
        self._session = onnxruntime.InferenceSession(
            str(files.folder / "text.onnx"), providers=["CPUExecutionProvider"]
        )

    @classmethod
    def of_version(cls, version: Path, digest: str | None) -> Self | None:
        """The one that a version of an index carries.

        Args:
            version: its folder.
            digest: what the manifest says of the files; None where it has none.

        Returns:
            None where there is none, the version has been replaced meanwhile, or packages are missing.

        Raises:
            UserError: the files are not those that were written.
        """
        if digest is None or not version.is_dir():
            return None
        files = TextTowerFiles(version / FOLDER)
        if files.digest != digest:
            raise UserError(
                f"the text tower in {version / FOLDER} is damaged; clip-lightning index ... --out with the "
                "same folders mends it, and --model searches without it"
            )
        try:
            return cls(files)
        except ModuleNotFoundError:
            return None

    def embed(self, sentences: Sequence[str]) -> np.ndarray:
        """Unit-length embeddings (N, D) fp32."""
        sentences = [sentences] if isinstance(sentences, str) else sentences
        parts = [self._run(sentences[at : at + BATCH]) for at in range(0, len(sentences), BATCH)]
        return np.concatenate(parts)

    def _run(self, sentences: Sequence[str]) -> np.ndarray:
        encoded = self._tokenizer.encode_batch(list(sentences))
        ids = np.array([each.ids for each in encoded], np.int64)
        mask = np.array([each.attention_mask for each in encoded], np.int64)
        if ids.shape[1] == 0:  # nothing but empty texts, and a tokenizer that adds no special token
            padding = self._tokenizer.padding or {}
            ids = np.full((len(encoded), 1), padding["pad_id"], dtype=np.int64)
            mask = np.zeros_like(ids)
        (embeddings,) = self._session.run(["embeddings"], {"input_ids": ids, "attention_mask": mask})
        found: np.ndarray = embeddings
        return found
