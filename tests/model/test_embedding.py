"""Pictures to features: the same as the model's own, in their order, broken ones left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clip_lightning import CLIP
from clip_lightning.data.formats import read_captions
from clip_lightning.model.encode import encode_pictures, project_pictures


def test_equals_the_models_own_embeddings(
    make_clip: Callable[..., CLIP], scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("clip_lightning.model.encode.BATCH_SIZE", 4)
    clip = make_clip().eval()
    paths = [image.path for image in read_captions(scenes).images[:10]]
    (tmp_path / "broken.png").write_bytes(b"")
    given = [*paths[:5], tmp_path / "broken.png", tmp_path / "missing.png", *paths[5:]]
    found = encode_pictures(clip, given)
    assert found.rows == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]
    assert list(found.broken) == [str(tmp_path / "broken.png"), str(tmp_path / "missing.png")]
    torch.testing.assert_close(
        project_pictures(clip, found.features), clip.embed_images(paths), atol=1e-5, rtol=0
    )


def test_nothing_readable(make_clip: Callable[..., CLIP], tmp_path: Path):
    clip = make_clip().eval()
    found = encode_pictures(clip, [tmp_path / "missing.png"])
    assert found.rows == [] and found.features.shape == (0, clip.image_tower.width)
