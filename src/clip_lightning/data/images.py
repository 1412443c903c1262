"""From a file to uint8 pixels of the tower's size; normalising happens later, on the device.

B batch, H height, W width. Pixels lie channels-last in memory throughout: that is how the decoders write
them, and torch's uint8 resize is two to three times as fast on it.
"""

from __future__ import annotations

import io
import math
import warnings
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

from clip_lightning.data.image_formats import PICTURE_FORMATS
from clip_lightning.errors import UserError

_CROP_TRIES = 10
_CROP_RATIO = 4 / 3
_LONGEST_COVER = 4
LARGEST_SIDE = 4096
_EARLIER = {"fit": "crop", "shortest_edge": None}


class BrokenImage(ValueError):
    """A file that cannot be decoded; the message is a short reason without the file's name."""


def decode_image(path: Path, *, max_pixels: int = 100_000_000) -> Tensor:
    """Decode a picture to RGB, uint8 (3, H, W), upright as its EXIF says.

    Transparency is laid on white, 16 bits are scaled to 8, of an animation the first frame is taken.

    Raises:
        BrokenImage: when the file is missing, empty, truncated, no picture, or has more than
            `max_pixels` pixels (seen in its header, before anything is decoded).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BrokenImage(error.strerror or "the file cannot be read") from error
    return decode_bytes(data, max_pixels=max_pixels)


def decode_bytes(data: bytes, *, max_pixels: int = 100_000_000) -> Tensor:
    """Decode a file's content as `decode_image` does the file.

    Raises:
        BrokenImage: likewise.
    """
    if not data:
        raise BrokenImage("the file is empty")
    # Files from elsewhere make decoders raise nearly every kind of error, and warn; both end here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise BrokenImage(f"{image.width}x{image.height} pixels are more than {max_pixels}")
                if image.format == "JPEG" and image.mode in ("RGB", "L") and _is_complete(data):
                    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                    pixels: Tensor = decode_jpeg(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
                    return pixels
                return torch.from_numpy(np.array(_to_rgb(image))).permute(2, 0, 1)
        except BrokenImage:
            raise
        except UnidentifiedImageError as error:
            raise BrokenImage("not a picture of a known format") from error
        except Exception as error:
            raise BrokenImage(" ".join(str(error).split())[:200] or type(error).__name__) from error


def to_pixels(image: Any) -> Tensor:
    """Return any form of an image as RGB, uint8 (3, H, W): the forms are those of `CLIP.embed_images`.

    Raises:
        BrokenImage: the image cannot be decoded, or is something else.
    """
    if isinstance(image, str | Path):
        return decode_image(Path(image))
    if hasattr(image, "pixels"):  # it is stored within a larger file
        pixels: Tensor = image.pixels()
        return pixels
    try:
        if hasattr(image, "read"):
            image = image.read()
        if isinstance(image, bytes | bytearray | memoryview):
            return decode_bytes(bytes(image))
        if isinstance(image, Image.Image):
            return torch.from_numpy(np.array(_to_rgb(image.copy()))).permute(2, 0, 1)
        dtype, shape = str(getattr(image, "dtype", "")), tuple(getattr(image, "shape", ()))
        if isinstance(image, Tensor) and dtype == "torch.uint8" and shape[:-2] == (3,) and all(shape):
            return image.cpu()
        if isinstance(image, np.ndarray) and dtype == "uint8" and shape[2:] in ((), (3,), (4,)):
            return to_pixels(Image.fromarray(image))
    except BrokenImage:
        raise
    except Exception as error:  # as in `decode_bytes`
        raise BrokenImage(" ".join(str(error).split())[:200] or type(error).__name__) from error
    found = f"{dtype} values of shape {shape}" if shape else f"a {type(image).__name__}"
    raise BrokenImage(
        f"it is {found}; expected a file's name or content, a PIL image, a uint8 array (H, W, 3), or a uint8 "
        "tensor (3, H, W)"
    )


def _is_complete(data: bytes) -> bool:
    """Whether a JPEG ends with its end marker: torchvision fills a truncated one with grey, unasked."""
    return data.rstrip(b"\0\r\n ").endswith(b"\xff\xd9")


def _to_rgb(image: Image.Image) -> Image.Image:
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
    """Resizing to what an image tower expects, and the normalisation that the tower does itself.

    Attributes:
        size: height and width in pixels.
        interpolation: how to resize; antialiased either way.
        mean: of red, green and blue, for pixels between 0 and 1; applied by the tower, on the device.
        std: likewise.
        fit: `crop` keeps the proportions and the centre, `squash` the whole picture.
        shortest_edge: that an image is resized to before the centre is cropped; by default it just covers
            `size`.

    Raises:
        ValueError: a value is out of its range; the transform of a bundle is whatever a stranger wrote.
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
        """Resize an image as `fit` says, and keep the centre: uint8 (3, h, w).

        Args:
            image: uint8 (3, H, W), or any other form that `to_pixels` takes.
        """
        image = image if isinstance(image, Tensor) else to_pixels(image)
        if self.fit == "squash":
            return self.resize(image, self.size)
        height, width = self.size if self.shortest_edge is None else (self.shortest_edge,) * 2
        # Only the centre survives, so that a panorama's ends need not be resized (1x5000 becomes 1x4).
        scale = max(height / image.shape[1], width / image.shape[2])
        image = _centre(
            image,
            min(image.shape[1], math.ceil(_LONGEST_COVER * height / scale)),
            min(image.shape[2], math.ceil(_LONGEST_COVER * width / scale)),
        )
        cover = (
            max(height, int(image.shape[1] * width / image.shape[2])),
            max(width, int(image.shape[2] * height / image.shape[1])),
        )
        return _centre(self.resize(image, cover), *self.size)

    def resize(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize uint8 (3, H, W) to exactly `size`, whatever that does to its proportions."""
        if image.shape[1:] == size:
            return image
        return functional.interpolate(image[None], size, mode=self.interpolation, antialias=True)[0]

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them.

        Without those that an earlier version did not have, where they are as it was: features and indexes
        are found by what it wrote down.
        """
        fields = {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }
        return {
            name: value for name, value in fields.items() if name not in _EARLIER or value != _EARLIER[name]
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ImageTransform:
        """The transform that `as_dict` described."""
        mean, std = tuple(fields["mean"]), tuple(fields["std"])
        later = {name: fields[name] for name in _EARLIER if name in fields}
        return cls(tuple(fields["size"]), fields["interpolation"], mean, std, **later)


def _centre(image: Tensor, height: int, width: int) -> Tensor:
    top, left = round((image.shape[1] - height) / 2), round((image.shape[2] - width) / 2)
    return image[:, top : top + height, left : left + width]


@dataclass(frozen=True)
class Augmentation:
    """What is left to chance in a training picture.

    Attributes:
        flip: mirror every second picture; to be switched off where captions say left and right.
        min_scale: smallest share of the picture's area that a random crop keeps; 1 switches crops off.
        colour: how far brightness, contrast and saturation change, as a share; 0 switches it off.

    Raises:
        UserError: when a value is out of its range.
    """

    flip: bool = True
    min_scale: float = 1.0
    colour: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.min_scale <= 1:
            raise UserError(
                f"--data.augmentation.min_scale is {self.min_scale}; expected a share of the area above 0 "
                "and at most 1, which switches random crops off"
            )
        if not 0 <= self.colour <= 1:
            raise UserError(
                f"--data.augmentation.colour is {self.colour}; expected a share between 0, which switches "
                "colour changes off, and 1"
            )


def augment(
    image: Tensor, transform: ImageTransform, augmentation: Augmentation, rng: np.random.Generator
) -> Tensor:
    """Crop, flip and colour uint8 (3, H, W) at random to uint8 (3, h, w); all chance comes from `rng`."""
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
    """Top, left, height and width of a random crop of the tower's proportions, give or take a third.

    None when the picture is so long and thin that no such crop was found (Inception's crops).
    """
    rows, columns = image.shape[1:]
    for _ in range(_CROP_TRIES):
        area = rows * columns * rng.uniform(min_scale, 1)
        ratio = transform.size[1] / transform.size[0] * _CROP_RATIO ** rng.uniform(-1, 1)
        height, width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < height <= rows and 0 < width <= columns:
            return int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1)), height, width
    return None
