"""Decode, resize and augment images to uint8 pixels; towers normalize them later, on the device.

B batch, H height, W width. Pixels are channels-last in memory throughout: decoders write them like this, and
torch's uint8 resize is two to three times as fast for this layout.
"""

from __future__ import annotations

import contextlib
import io
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as vision

from clip_lightning.data.image_formats import IMAGE_FORMATS
from clip_lightning.errors import check_option, reason_of

RETRY_SECONDS = (0.2, 2.0)
"""Pauses before reading a file again after an error."""
MOST_PIXELS = 100_000_000
LARGEST_SIDE = 4096
_CROP_TRIES = 10
_CROP_RATIO = 4 / 3
_LONGEST_COVER = 4
_EARLIER = {"fit": "crop", "shortest_edge": None}

# Once for the process: one thread's `catch_warnings` would end while another thread still decodes.
warnings.filterwarnings("ignore", module=r"PIL\.|torchvision\.io\.")


class BrokenImage(ValueError):
    """An image cannot be decoded; the message is a short reason without the file name."""


class UnreadableFile(BrokenImage, OSError):
    """A file cannot be read at the moment, whatever its content is."""


def read_file(path: Path, pauses: Sequence[float] = RETRY_SECONDS) -> bytes:
    """Read a file, and retry after each pause (in seconds), as disks and networks may fail for a moment."""
    try:
        return path.read_bytes()
    except OSError as error:
        if not pauses:
            raise UnreadableFile(error.strerror or "the file cannot be read") from error
    time.sleep(pauses[0])
    return read_file(path, pauses[1:])


def decode_image(path: Path, pauses: Sequence[float] = RETRY_SECONDS) -> Tensor:
    """Decode an image to RGB, uint8 (3, H, W), rotated as its EXIF data requires.

    Transparent images are composited on white, 16 bits are scaled to 8, and animations are reduced to their
    first frame. A file that cannot be read is retried after each of the `pauses`.
    """
    return decode_bytes(read_file(path, pauses))


def decode_bytes(data: bytes, *, max_pixels: int = MOST_PIXELS) -> Tensor:
    """Decode the content of a file like `decode_image`."""
    image = open_image(data, max_pixels)
    with decoder_errors():
        # torchvision silently fills JPEGs without their end marker with gray
        is_complete_jpeg = image.format == "JPEG" and data.rstrip(b"\0\r\n ").endswith(b"\xff\xd9")
        if is_complete_jpeg and image.mode in ("RGB", "L"):
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            pixels: Tensor = decode_jpeg(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
            return pixels
        return _to_tensor(image)


def open_image(data: bytes, max_pixels: int = MOST_PIXELS) -> Image.Image:
    """Read the header of an encoded image, whose size is checked before anything is decoded."""
    if not data:
        raise BrokenImage("the file is empty")
    with decoder_errors():
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    if image.width * image.height > max_pixels:
        raise BrokenImage(f"{image.width}x{image.height} pixels are more than {max_pixels}")
    return image


@contextlib.contextmanager
def decoder_errors() -> Iterator[None]:
    """Turn errors into BrokenImage: decoders raise nearly every kind of error for a damaged file."""
    try:
        yield
    except BrokenImage:
        raise
    except UnidentifiedImageError as error:
        raise BrokenImage("not an image of a known format") from error
    except Exception as error:
        raise BrokenImage(reason_of(error)) from error


def to_pixels(image: Any) -> Tensor:
    """Convert an image in any form that `CLIP.embed_images` accepts to RGB, uint8 (3, H, W)."""
    if isinstance(image, str | Path):
        return decode_image(Path(image), pauses=())
    with decoder_errors():
        image = image.read() if hasattr(image, "read") else image
        if isinstance(image, bytes | bytearray | memoryview):
            return decode_bytes(bytes(image))
        dtype, shape = str(getattr(image, "dtype", "")), tuple(getattr(image, "shape", ()))
        if isinstance(image, np.ndarray) and dtype == "uint8" and shape[2:] in ((), (3,), (4,)):
            image = Image.fromarray(image)
        if isinstance(image, Image.Image) and all(image.size):
            return _to_tensor(image.copy())
        if isinstance(image, Tensor) and dtype == "torch.uint8" and shape[:-2] == (3,) and all(shape):
            return image.cpu()
    kind = f"{dtype} values of shape {shape}" if shape else f"a {type(image).__name__}"
    raise BrokenImage(
        f"it is {kind}; expected a file name, the content of a file, a PIL image, a uint8 array (H, W, 3), "
        "or a uint8 tensor (3, H, W)"
    )


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


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
    """

    size: tuple[int, int]
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Literal["crop", "squash"] = "crop"
    shortest_edge: int | None = None

    def __post_init__(self) -> None:
        edge = max(self.size) if self.shortest_edge is None else self.shortest_edge
        sides, channels = (*self.size, edge), (*self.mean, *self.std)
        if not (
            len(sides) == 3
            and all(isinstance(side, int) and 1 <= side <= LARGEST_SIDE for side in sides)
            and edge >= max(self.size)
            and len(self.mean) == len(self.std) == 3
            and all(map(math.isfinite, channels))
            and min(self.std) > 0
            and self.interpolation in ("bilinear", "bicubic")
            and self.fit in ("crop", "squash")
        ):
            raise ValueError(
                f"expected sides of 1 to {LARGEST_SIDE} pixels, shortest_edge of at least the size, a finite "
                f"mean and a std above 0 for 3 channels, bilinear or bicubic, and crop or squash, got {self}"
            )

    def __call__(self, image: Any) -> Tensor:
        """Resize and crop uint8 (3, H, W), or what `to_pixels` accepts, to uint8 (3, h, w)."""
        image = image if isinstance(image, Tensor) else to_pixels(image)
        if self.fit == "squash":
            return self.resize(image, self.size)
        height, width = self.size if self.shortest_edge is None else (self.shortest_edge,) * 2
        # Only the center remains, so the ends of a panorama need not be resized (1x5000 becomes 1x4).
        scale = max(height / image.shape[1], width / image.shape[2])
        longest = [math.ceil(_LONGEST_COVER * side / scale) for side in (height, width)]
        image = vision.center_crop(image, [*map(min, longest, image.shape[1:])])
        rows, columns = image.shape[1:]
        cover = max(height, int(rows * width / columns)), max(width, int(columns * height / rows))
        return vision.center_crop(self.resize(image, cover), [*self.size])

    def resize(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize uint8 (3, H, W) to exactly `size`, regardless of the aspect ratio."""
        if image.shape[1:] == size:
            return image
        return functional.interpolate(image[None], size, mode=self.interpolation, antialias=True)[0]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values.

        New fields are left out if they have their default value, so that old keys of caches stay the same.
        """
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name not in _EARLIER or value != _EARLIER[name]
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ImageTransform:
        """Return the transform with the fields that `as_dict` returned."""
        values: Any = {k: tuple(value) if isinstance(value, list) else value for k, value in fields.items()}
        return cls(**values)


@dataclass(frozen=True)
class Augmentation:
    """Random changes to training images.

    Attributes:
        flip: mirror images with a probability of one half; use false if captions mention left and right.
        min_scale: smallest fraction of an image's area that a random crop keeps; 1 disables random crops.
        colour: largest relative change of brightness, contrast and saturation, from 0 to 1; 0 disables it.
    """

    flip: bool = True
    min_scale: float = 1.0
    colour: float = 0.0

    def __post_init__(self) -> None:
        scale, colour = self.min_scale, self.colour
        check_option("data.augmentation.min_scale", scale, 0 < scale <= 1, "a fraction above 0 and at most 1")
        check_option("data.augmentation.colour", colour, 0 <= colour <= 1, "a fraction from 0 to 1")


def augment(
    image: Tensor, transform: ImageTransform, augmentation: Augmentation, rng: np.random.Generator
) -> Tensor:
    """Randomly crop, flip and color uint8 (3, H, W) to uint8 (3, h, w), using only `rng`.

    The crop is an Inception crop, up to a third off the tower's ratio. Images that are too long and thin for
    it, and all if `min_scale` is 1, are only transformed.
    """
    rows, columns = image.shape[1:]
    for _ in range(_CROP_TRIES if augmentation.min_scale < 1 else 0):
        area = rows * columns * rng.uniform(augmentation.min_scale, 1)
        ratio = transform.size[1] / transform.size[0] * _CROP_RATIO ** rng.uniform(-1, 1)
        height, width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < height <= rows and 0 < width <= columns:
            top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
            image = transform.resize(image[:, top : top + height, left : left + width], transform.size)
            break
    else:
        image = transform(image)
    if augmentation.flip and rng.random() < 0.5:
        image = image.flip(-1)
    if augmentation.colour > 0:
        for adjust in (vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation):
            image = adjust(image, 1 + augmentation.colour * rng.uniform(-1, 1))
    return image
