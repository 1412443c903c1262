"""Images and texts to features: in their order, whatever the batches, and what cannot be read is named."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from clip_lightning import CLIP
from clip_lightning.data.formats import read_captions
from clip_lightning.data.images import decode_image
from clip_lightning.model.encode import Encoded, encode_images, encode_texts

MakeClip = Callable[..., CLIP]


def test_features_are_the_towers_in_the_order_of_the_images(
    make_clip: MakeClip, scenes: Path, tmp_path: Path
):
    clip = make_clip().eval()
    paths = [image.path for image in read_captions(scenes).images[:10]]
    (tmp_path / "broken.png").write_bytes(b"")
    given = [*paths[:5], tmp_path / "broken.png", tmp_path / "missing.png", *paths[5:]]
    encoded = Encoded.join(encode_images(clip.image_tower, given))
    assert (encoded.size, encoded.rows) == (12, [0, 1, 2, 3, 4, 7, 8, 9, 10, 11])
    names = [(5, str(tmp_path / "broken.png")), (6, str(tmp_path / "missing.png"))]
    assert [broken[:2] for broken in encoded.broken] == names
    with torch.no_grad():
        pixels = torch.stack([clip.transform(path) for path in paths])
        torch.testing.assert_close(encoded.features, clip.image_tower(pixels), atol=1e-5, rtol=0)

    batches = list(encode_images(clip.image_tower, given, project=clip.project_image, batch_size=4))
    assert [(batch.size, len(batch.rows)) for batch in batches] == [(4, 4), (4, 2), (4, 4)]
    torch.testing.assert_close(torch.cat([b.features for b in batches]), clip.embed_images(paths))


def test_a_decoder_may_leave_images_out_and_end_everything(make_clip: MakeClip, scenes: Path):
    clip, fail = make_clip().eval(), Mock(side_effect=OSError("the disk is gone"))
    paths = sorted(scenes.glob("*.jpg"))[:3]

    def decode(path: Path) -> torch.Tensor | None:
        return None if path == paths[1] else clip.transform(decode_image(path))

    (batch,) = encode_images(clip.image_tower, paths, decode)
    assert (batch.size, batch.rows, batch.broken) == (3, [0, 2], [])

    with pytest.raises(OSError, match="the disk is gone"):
        list(encode_images(clip.image_tower, paths, fail))
    assert fail.called


def test_a_batch_that_is_too_large_for_the_memory_is_halved(
    make_clip: MakeClip, scenes: Path, monkeypatch: pytest.MonkeyPatch
):
    tower, sizes, most = make_clip().eval().image_tower, list[int](), 9
    forward, paths = tower.forward, sorted(scenes.glob("*.jpg"))[:9]

    def limited(pixels: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pixels))
        if len(pixels) > most:
            raise torch.OutOfMemoryError("too large")
        return forward(pixels)

    monkeypatch.setattr(tower, "forward", limited)
    (whole,) = encode_images(tower, paths)
    most = 3
    (halved,) = encode_images(tower, paths)
    torch.testing.assert_close(halved.features, whole.features)
    assert sizes == [9, 9, 4, 2, 2, 5, 2, 3]
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        list(encode_images(tower, paths))


def test_texts_come_back_in_their_order(make_clip: MakeClip, capsys: pytest.CaptureFixture[str]):
    clip = make_clip().eval()
    texts = ["a large red circle left of a small blue square", "a star", "", "two triangles"]
    features = encode_texts(clip.text_tower, texts, batch_size=3, progress="captions")
    with torch.no_grad():
        torch.testing.assert_close(features, clip.text_tower(**clip.tokenize(texts)), atol=1e-5, rtol=0)
    assert "captions: 100%" in capsys.readouterr().err
    embeddings = encode_texts(clip.text_tower, texts, project=clip.project_text)
    torch.testing.assert_close(embeddings, clip.project_text(features))
    half = encode_texts(clip.text_tower, texts, precision=torch.bfloat16)
    assert half.dtype == torch.float32 and not torch.equal(half, features)
