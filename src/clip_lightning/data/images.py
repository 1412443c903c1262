"""Decode, resize and augment images to uint8 pixels; towers normalize them later, on the device.

B batch, H height, W width. Pixels are channels-last in memory throughout: decoders write them like this, and
torch's uint8 resize is two to three times as fast for this layout.
"""

from __future__ import annotations

import io
import math
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import adjust_brightness, adjust_contrast, adjust_saturation

from clip_lightning.data.image_formats import IMAGE_FORMATS
from clip_lightning.errors import UserError, reason_of

RETRY_SECONDS = (0.2, 2.0)
"""Pauses before reading a file again after an error."""
_CROP_TRIES = 10
_CROP_RATIO = 4 / 3
_LONGEST_COVER = 4
LARGEST_SIDE = 4096
_EARLIER = {"fit": "crop", "shortest_edge": None}


class BrokenImage(ValueError):
    """An image cannot be decoded; the message is a short reason without the file name."""


class UnreadableFile(BrokenImage):
    """A file cannot be read at the moment, whatever its content is."""


def read_file(path: Path, pauses: Sequence[float] = RETRY_SECONDS) -> bytes:
    """Read a file, and retry after each pause (in seconds), as disks and networks may fail for a moment.

    Raises:
        UnreadableFile: every attempt failed.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        if not pauses:
            raise UnreadableFile(error.strerror or "the file cannot be read") from error
    time.sleep(pauses[0])
    return read_file(path, pauses[1:])


def decode_image(path: Path, *, max_pixels: int = 100_000_000, pauses: Sequence[float] = ()) -> Tensor:
    """Decode an image to RGB, uint8 (3, H, W), rotated as its EXIF data requires.

    Transparent images are composited on white, 16 bits are scaled to 8, and animations are reduced to their
    first frame. A file that cannot be read is retried after each of the `pauses`.

    Raises:
        UnreadableFile: the file does not exist or cannot be read at the moment.
        BrokenImage: the content is empty, truncated or not an image, or has more than `max_pixels` pixels
            according to its header, which is checked before decoding.
    """
    return decode_bytes(read_file(path, pauses), max_pixels=max_pixels)


def open_image(data: bytes) -> Image.Image:
    """Read the header of an encoded image, or raise BrokenImage."""
    _ignore_warnings_of_decoders()
    try:
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Exception as error:  # as in `decode_bytes`
        raise BrokenImage("not an image of a known format") from error


def decode_bytes(data: bytes, *, max_pixels: int = 100_000_000) -> Tensor:
    """Decode the content of a file like `decode_image`.

    Raises:
        BrokenImage: as for `decode_image`.
    """
    if not data:
        raise BrokenImage("the file is empty")
    _ignore_warnings_of_decoders()
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise BrokenImage(f"{image.width}x{image.height} pixels are more than {max_pixels}")
            if image.format == "JPEG" and image.mode in ("RGB", "L") and _is_complete(data):
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                pixels: Tensor = decode_jpeg(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
                return pixels
            return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
    except BrokenImage:
        raise
    except UnidentifiedImageError as error:
        raise BrokenImage("not an image of a known format") from error
    except Exception as error:  # decoders raise nearly every kind of error for a damaged file
        raise BrokenImage(reason_of(error)) from error


def _ignore_warnings_of_decoders() -> None:
    """Add a filter that stays: one thread's `catch_warnings` would end while another thread still decodes."""
    module = re.compile(r"PIL\.|torchvision\.io\.")
    if warnings.filters[0] != ("ignore", None, Warning, module, 0):
        warnings.filterwarnings("ignore", module=module.pattern)


def to_pixels(image: Any) -> Tensor:
    """Convert an image in any form that `CLIP.embed_images` accepts to RGB, uint8 (3, H, W).

    Raises:
        BrokenImage: the image cannot be decoded, or is not an image.
    """
    if isinstance(image, str | Path):
        return decode_image(Path(image))
    try:
        if hasattr(image, "read"):
            image = image.read()
        if isinstance(image, bytes | bytearray | memoryview):
            return decode_bytes(bytes(image))
        if isinstance(image, Image.Image):
            return torch.from_numpy(np.array(to_rgb(image.copy()))).permute(2, 0, 1)
        dtype, shape = str(getattr(image, "dtype", "")), tuple(getattr(image, "shape", ()))
        if isinstance(image, Tensor) and dtype == "torch.uint8" and shape[:-2] == (3,) and all(shape):
            return image.cpu()
        if isinstance(image, np.ndarray) and dtype == "uint8" and shape[2:] in ((), (3,), (4,)):
            return to_pixels(Image.fromarray(image))
    except BrokenImage:
        raise
    except Exception as error:  # as in `decode_bytes`
        raise BrokenImage(reason_of(error)) from error
    kind = f"{dtype} values of shape {shape}" if shape else f"a {type(image).__name__}"
    raise BrokenImage(
        f"it is {kind}; expected a file name, the content of a file, a PIL image, a uint8 array (H, W, 3), "
        "or a uint8 tensor (3, H, W)"
    )


def _is_complete(data: bytes) -> bool:
    """Return whether a JPEG has its end marker; torchvision silently fills truncated files with gray."""
    return data.rstrip(b"\0\r\n ").endswith(b"\xff\xd9")


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an upright RGB image, composited on white, with 16 bits scaled to 8."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise BrokenImage("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):
        values = np.asarray(image).clip(0, 65535).astype(np.uint32)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


@dataclass(frozen=True)
class ImageTransform:
    """The size that an image tower expects, and the normalization that the tower applies itself.

    Attributes:
        size: height and width in pixels.
        interpolation: interpolation for resizing, which is always antialiased.
        mean: mean of red, green and blue for pixels from 0 to 1, which the tower subtracts on the device.
        std: standard deviation of red, green and blue, by which the tower divides.
        fit: `crop` keeps the aspect ratio and crops the center, `squash` shows the complete image.
        shortest_edge: length of the shortest edge before the center is cropped; by default the image just
            covers `size`.

    Raises:
        ValueError: a value is out of range; bundles from others may contain any values.
    """

    size: tuple[int, int]
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Literal["crop", "squash"] = "crop"
    shortest_edge: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        edge = max(self.size) if self.shortest_edge is None else self.shortest_edge
        sides, channels = (*self.size, edge), (*self.mean, *self.std)
        if len(sides) != 3 or not all(isinstance(side, int) and 1 <= side <= LARGEST_SIDE for side in sides):
            raise ValueError(f"size {self.size}, shortest_edge {edge}: expected 1 to {LARGEST_SIDE} pixels")
        if edge < max(self.size):
            raise ValueError(f"shortest_edge {edge}: expected at least the longer side of size {self.size}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(map(math.isfinite, channels)):
            raise ValueError(f"mean {self.mean}, std {self.std}: expected a finite number per channel")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std}: expected numbers above 0")
        if self.interpolation not in ("bilinear", "bicubic") or self.fit not in ("crop", "squash"):
            raise ValueError(f"interpolation {self.interpolation!r} or fit {self.fit!r} is unknown")

    def __call__(self, image: Any) -> Tensor:
        """Resize an image to uint8 (3, h, w), and crop its center if `fit` is `crop`.

        Args:
            image: uint8 (3, H, W), or any other form that `to_pixels` accepts.
        """
        image = image if isinstance(image, Tensor) else to_pixels(image)
        if self.fit == "squash":
            return self.resize(image, self.size)
        height, width = self.size if self.shortest_edge is None else (self.shortest_edge,) * 2
        # Only the center remains, so the ends of a panorama need not be resized (1x5000 becomes 1x4).
        scale = max(height / image.shape[1], width / image.shape[2])
        image = _crop_center(
            image,
            min(image.shape[1], math.ceil(_LONGEST_COVER * height / scale)),
            min(image.shape[2], math.ceil(_LONGEST_COVER * width / scale)),
        )
        cover = (
            max(height, int(image.shape[1] * width / image.shape[2])),
            max(width, int(image.shape[2] * height / image.shape[1])),
        )
        return _crop_center(self.resize(image, cover), *self.size)

    def resize(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize uint8 (3, H, W) to exactly `size`, regardless of the aspect ratio."""
        if image.shape[1:] == size:
            return image
        return functional.interpolate(image[None], size, mode=self.interpolation, antialias=True)[0]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values.

        Fields that are new since an earlier version are left out if they have their default value, so that
        the keys of cached features and indexes stay the same.
        """
        fields = {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }
        return {
            name: value for name, value in fields.items() if name not in _EARLIER or value != _EARLIER[name]
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ImageTransform:
        """Return the transform with the fields that `as_dict` returned."""
        mean, std = tuple(fields["mean"]), tuple(fields["std"])
        later = {name: fields[name] for name in _EARLIER if name in fields}
        return cls(tuple(fields["size"]), fields["interpolation"], mean, std, **later)


def _crop_center(image: Tensor, height: int, width: int) -> Tensor:
    top, left = round((image.shape[1] - height) / 2), round((image.shape[2] - width) / 2)
    return image[:, top : top + height, left : left + width]


@dataclass(frozen=True)
class Augmentation:
    """Random changes to training images.

    Attributes:
        flip: mirror images with a probability of one half; use false if captions mention left and right.
        min_scale: smallest fraction of an image's area that a random crop keeps; 1 disables random crops.
        colour: largest relative change of brightness, contrast and saturation, from 0 to 1; 0 disables it.

    Raises:
        UserError: a value is out of range.
    """

    flip: bool = True
    min_scale: float = 1.0
    colour: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.min_scale <= 1:
            raise UserError(
                f"--data.augmentation.min_scale {self.min_scale}: expected a fraction above 0 and at most 1, "
                "which disables random crops"
            )
        if not 0 <= self.colour <= 1:
            raise UserError(
                f"--data.augmentation.colour {self.colour}: expected a fraction from 0, which disables color "
                "changes, to 1"
            )


def augment(
    image: Tensor, transform: ImageTransform, augmentation: Augmentation, rng: np.random.Generator
) -> Tensor:
    """Randomly crop, flip and color uint8 (3, H, W) to uint8 (3, h, w), using only `rng`."""
    box = _random_box(image, transform, augmentation.min_scale, rng) if augmentation.min_scale < 1 else None
    if box is None:
        image = transform(image)
    else:
        top, left, height, width = box
        image = transform.resize(image[:, top : top + height, left : left + width], transform.size)
    if augmentation.flip and rng.random() < 0.5:
        image = image.flip(-1)
    if augmentation.colour > 0:
        for adjust in (adjust_brightness, adjust_contrast, adjust_saturation):
            image = adjust(image, 1 + augmentation.colour * rng.uniform(-1, 1))
    return image


def _random_box(
    image: Tensor, transform: ImageTransform, min_scale: float, rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """Return top, left, height and width of a random Inception crop, up to a third off the tower's ratio.

    Return None if the image is so long and thin that no such crop was found.
    """
    rows, columns = image.shape[1:]
    for _ in range(_CROP_TRIES):
        area = rows * columns * rng.uniform(min_scale, 1)
        ratio = transform.size[1] / transform.size[0] * _CROP_RATIO ** rng.uniform(-1, 1)
        height, width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < height <= rows and 0 < width <= columns:
            return int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1)), height, width
    return None
