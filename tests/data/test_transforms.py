import contextlib
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from clip_lightning.data.images import (
    Augmentation,
    BrokenImage,
    ImageTransform,
    augment,
    decode_bytes,
    decode_image,
)
from clip_lightning.errors import UserError

NORMALISATION: Any = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
SQUARE = ImageTransform((32, 32), "bicubic", *NORMALISATION)


def photograph(mode: str = "RGB", size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Smooth, so that JPEG keeps it, and different in every corner and channel."""
    y, x = np.mgrid[0 : 1 : size[1] * 1j, 0 : 1 : size[0] * 1j]
    pixels = np.stack([x, y, (1 - x) * (1 - y)], axis=-1)
    return Image.fromarray((pixels * 255).astype(np.uint8)).convert(mode)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def difference(one: Tensor, other: Tensor) -> int:
    assert one.shape == other.shape and one.dtype == other.dtype == torch.uint8
    return int((one.int() - other.int()).abs().max())


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


MODES = "jpg-RGB jpg-L jpg-CMYK png-RGB png-L png-P png-1 avif-RGB webp-RGB gif-P bmp-RGB tif-CMYK ppm-RGB"
SEVERAL: dict[str, Any] = {"save_all": True, "append_images": [Image.new("RGB", (48, 32), "blue")]}
WAYS_TO_SAVE: dict[str, dict[str, Any]] = {
    **{mode: {} for mode in MODES.split()},
    "tif-YCbCr": {"compression": "tiff_lzw"},  # Pillow 12 does not read what it writes without compression
    **{f"{kind}-RGB-{i}": {"exif": turned(i)} for kind in ("jpg", "png", "webp") for i in range(1, 9)},
    "jpg-RGB-MPO": {"format": "MPO", **SEVERAL},  # as phones take them; only the first image is decoded
    "gif-RGB-GIF": {"format": "GIF", **SEVERAL},  # an animation
}


@pytest.mark.parametrize("kind", WAYS_TO_SAVE)
def test_images_are_decoded_like_pillow_and_upright(kind: str, tmp_path: Path) -> None:
    suffix, mode = kind.split("-")[:2]
    path = save(tmp_path / f"a.{suffix}", photograph(mode), **WAYS_TO_SAVE[kind])
    with Image.open(path) as image:
        assert image.format == WAYS_TO_SAVE[kind].get("format", image.format)
        expected = pixels(ImageOps.exif_transpose(image))
    assert difference(decode_image(path), expected) <= 3


def test_inverted_cmyk(tmp_path: Path) -> None:
    """Adobe's YCCK: what Photoshop writes; Pillow's own writer marks its CMYK in the same way."""
    path = save(tmp_path / "a.jpg", photograph("CMYK"), quality=95)
    decoded, expected = decode_image(path), pixels(photograph())
    assert b"Adobe" in path.read_bytes() and difference(decoded, expected) <= 40
    assert (decoded.float() - expected.float()).abs().mean() < 3


@pytest.mark.parametrize(("suffix", "mode"), [("png", "RGBA"), ("png", "LA"), ("webp", "RGBA"), ("png", "P")])
def test_transparent_images_are_composited_on_white(mode: str, suffix: str, tmp_path: Path) -> None:
    image = photograph("RGBA" if mode == "P" else mode)
    opaque = Image.new("L", image.size, 0)
    opaque.paste(255, (0, 0, 8, 32))
    image.putalpha(opaque)
    expected = image.convert("P").convert("RGBA") if mode == "P" else image
    options = {"lossless": True} if suffix == "webp" else {}
    decoded = decode_image(save(tmp_path / f"a.{suffix}", image.convert(mode), **options))
    assert (decoded[:, :, 8:] == 255).all()
    assert difference(decoded[:, :, :8], pixels(expected)[:, :, :8]) == 0


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_to_eight(suffix: str, tmp_path: Path) -> None:
    values = np.array([[0, 128, 257, 32768, 65535]], dtype=np.uint16)
    decoded = decode_image(save(tmp_path / f"a.{suffix}", Image.fromarray(values)))
    assert decoded.tolist() == [[[0, 0, 1, 128, 255]]] * 3


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2), (32, 32), (31, 47)])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_images_of_any_size_are_resized(suffix: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = save(tmp_path / f"a.{suffix}", Image.new("RGB", size, (200, 100, 50)))
    image = decode_image(path)
    assert image.shape == (3, size[1], size[0])
    for transform in (SQUARE, ImageTransform((7, 19), "bilinear", *NORMALISATION)):
        result = transform(image)
        assert result.shape == (3, *transform.size)
        assert result.dtype == torch.uint8
        assert difference(result, image[:, :1, :1].expand_as(result)) <= 2
        rng = np.random.default_rng(0)
        assert augment(image, transform, Augmentation(min_scale=0.2), rng).shape == result.shape


def test_truncated_images_are_broken(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for kind in ("progressive", "JPEG", "PNG", "WEBP", "GIF", "BMP"):
        whole = io.BytesIO()
        noise.save(whole, **({"format": "JPEG", kind: True} if kind == "progressive" else {"format": kind}))
        data = whole.getvalue()
        for share in (0.0, 0.01, 0.1, 0.5, 0.9, 0.98):
            path = tmp_path / "cut"
            path.write_bytes(data[: int(len(data) * share)])
            with pytest.raises(BrokenImage) as error:
                decode_image(path)
            assert "\n" not in str(error.value) and 0 < len(str(error.value)) <= 200


def test_bytes_after_the_end_do_not_break_an_image(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", photograph())
    expected = decode_image(path)
    for tail in (b"\0" * 10, b"\r\n", b"something else"):
        (tmp_path / "b.jpg").write_bytes(path.read_bytes() + tail)
        assert difference(decode_image(tmp_path / "b.jpg"), expected) <= 3


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_damaged_images_decode_or_are_broken(data: st.DataObject, tmp_path_factory: Any) -> None:
    suffix = data.draw(st.sampled_from(["jpg", "png", "webp", "gif", "tif", "bmp"]))
    path = save(tmp_path_factory.getbasetemp() / f"damaged.{suffix}", photograph(size=(16, 16)))
    content = bytearray(path.read_bytes())
    change = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))
    for position, byte in data.draw(st.lists(change)):
        content[position] = byte
    with contextlib.suppress(BrokenImage):
        assert decode_bytes(bytes(content), max_pixels=10**6).dtype == torch.uint8


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + checksum + b"\0\0\0\0IDAT"


def test_files_that_are_not_images(tmp_path: Path) -> None:
    for content, reason in (
        (b"", "the file is empty"),
        (b"<html>not found</html>", "not an image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
        (png_header(12_000, 9_000), "12000x9000 pixels are more than 100000000"),
        (png_header(60_000, 60_000), "decompression bomb"),
    ):
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(BrokenImage, match=reason):
            decode_image(tmp_path / "a.jpg")
    with pytest.raises(BrokenImage, match="No such file"):
        decode_image(tmp_path / "missing.jpg", pauses=())
    with pytest.raises(BrokenImage, match="floating-point"):
        decode_image(save(tmp_path / "a.tif", Image.new("F", (2, 2))))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(48, 32), (200, 90), (33, 101), (20, 24)])
def test_the_transform_is_a_resize_and_center_crop(interpolation: Any, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = torch.from_numpy(noise).permute(2, 0, 1)
    mode = reference.InterpolationMode(interpolation)
    transform = ImageTransform((32, 32), interpolation, *NORMALISATION)
    assert ImageTransform.from_dict(json.loads(json.dumps(transform.as_dict()))) == transform
    expected = reference.center_crop(reference.resize(image, [32], interpolation=mode), [32, 32])
    assert difference(transform(image), expected) == 0
    smaller = reference.resize(Image.fromarray(noise), [32], interpolation=mode)
    by_pillow = reference.center_crop(smaller, [32, 32])
    assert (transform(image).float() - pixels(by_pillow).float()).abs().mean() < 0.5
    assert difference(transform(image.contiguous()), expected) <= 1


def test_augmentation_depends_only_on_the_generator() -> None:
    image, plain = pixels(photograph()), SQUARE(pixels(photograph()))

    def results(augmentation: Augmentation, count: int = 6) -> list[Tensor]:
        return [augment(image, SQUARE, augmentation, np.random.default_rng(seed)) for seed in range(count)]

    everything = Augmentation(flip=True, min_scale=0.3, colour=0.4)
    first, second = results(everything), results(everything)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(result.shape == (3, 32, 32) and result.dtype == torch.uint8 for result in first)
    assert len({result.numpy().tobytes() for result in first}) == 6
    assert all(torch.equal(result, plain) for result in results(Augmentation(flip=False)))
    mirrored = [torch.equal(result, plain.flip(-1)) for result in results(Augmentation(), 40)]
    assert 10 < sum(mirrored) < 30
    for name, value in (("min_scale", 0.0), ("min_scale", 1.5), ("colour", -0.1), ("colour", 2.0)):
        with pytest.raises(UserError, match=rf"--data\.augmentation\.{name} {value}"):
            Augmentation(**{name: value})  # type: ignore[arg-type]


@pytest.mark.real
def test_photographs_are_decoded_like_pillow(shared_data: Path) -> None:
    for path in sorted((shared_data / "flickr8k" / "Images_original").iterdir())[:10]:
        with Image.open(path) as image:
            assert difference(decode_image(path), pixels(image)) <= 3
