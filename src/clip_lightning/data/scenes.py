"""Generate synthetic scenes with captions, a data set for demonstrations and tests without downloads."""

from __future__ import annotations

import contextlib
import csv
import io
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from clip_lightning.errors import UserError
from clip_lightning.files import make_once

SIZES = {"small": 0.095, "large": 0.175}
"""Radius as a fraction of the image's side."""
COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 20),
    "yellow": (252, 214, 50),
    "green": (46, 150, 72),
    "blue": (42, 92, 210),
    "purple": (130, 62, 170),
    "black": (28, 28, 30),
    "white": (246, 246, 242),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
RELATIONS = ("left", "above")
"""The position of the first object; right and below describe the same scenes from the other object."""

# Ten consecutive scenes have eight for training, so that every number of scenes has the same fractions.
_SPLIT_PATTERN = ("train",) * 4 + ("val",) + ("train",) * 4 + ("test",)
_SYNONYMS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_FORWARD = {
    "left": ("left of", "to the left of", "on the left side of"),
    "above": ("above", "over", "higher up than"),
}
_BACKWARD = {
    "left": ("right of", "to the right of", "on the right side of"),
    "above": ("below", "under", "further down than"),
}
_OVERSAMPLING = 4
# JPEG decodes faster than PNG; chroma subsampling would bleed colors over edges.
_FILE_FORMAT: dict[str, Any] = {"format": "JPEG", "quality": 92, "subsampling": 0}


@dataclass(frozen=True, slots=True)
class Thing:
    """One of the two objects in a scene."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        """Return the plainest description, without an article."""
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of an image: `first` is `relation` (left of, above) `second`."""

    first: Thing
    second: Thing
    relation: str
    background: str


@lru_cache(maxsize=1)
def _combinations() -> list[Scene]:
    """Return all scenes; the two objects of a scene have different colors and shapes."""
    things = [Thing(*attributes) for attributes in product(SIZES, COLOURS, SHAPES)]
    return [
        Scene(first, second, relation, background)
        for first, second in product(things, repeat=2)
        if first.colour != second.colour and first.shape != second.shape
        for relation, background in product(RELATIONS, COLOURS)
        if background not in (first.colour, second.colour)
    ]


@lru_cache(maxsize=1)
def _order(seed: int) -> list[int]:
    order: list[int] = np.random.default_rng(seed).permutation(len(_combinations())).tolist()
    return order


def scene(seed: int, index: int) -> Scene:
    """Return the scene at `index`; different indices have different scenes."""
    return _combinations()[_order(seed)[index]]


def split(index: int) -> str:
    """Return `train`, `val` or `test`: 80, 10 and 10 % of every ten consecutive scenes."""
    return _SPLIT_PATTERN[index % len(_SPLIT_PATTERN)]


def describe(seed: int, index: int) -> tuple[str, ...]:
    """Return five captions of the scene, of which the first is the plainest."""
    shown = scene(seed, index)
    rng = np.random.default_rng((seed, index, 0))

    def a(thing: Thing) -> str:
        return f"a {rng.choice(_SYNONYMS[thing.size])} {thing.colour} {thing.shape}"

    first, second, relation = shown.first, shown.second, shown.relation
    backdrop = f"{'an' if shown.background == 'orange' else 'a'} {shown.background} background"
    forward, backward = _FORWARD[relation], _BACKWARD[relation]
    on_side = {"left": ("on its left", "on its right"), "above": ("above it", "below it")}[relation]
    return (
        f"a {first} {forward[0]} a {second} on {backdrop}",
        f"a {second} {backward[0]} a {first} on {backdrop}",
        f"{a(first)} {rng.choice(forward[1:])} {a(second)}, on {backdrop}",
        f"{a(second)} with {a(first)} {on_side[0]}, against {backdrop}",
        f"on {backdrop}, {a(first)} and {on_side[1]} {a(second)}",
    )


def draw(seed: int, index: int, size: int) -> Image.Image:
    """Draw the scene as an RGB image of `size` x `size` pixels, with slightly shifted objects."""
    shown = scene(seed, index)
    rng = np.random.default_rng((seed, index, 1))
    side = size * _OVERSAMPLING
    image = Image.new("RGB", (side, side), COLOURS[shown.background])
    canvas = ImageDraw.Draw(image)
    for thing, along in ((shown.first, 0.27), (shown.second, 0.73)):
        along += rng.uniform(-0.03, 0.03)
        across = 0.5 + rng.uniform(-0.15, 0.15)
        x, y = (along, across) if shown.relation == "left" else (across, along)
        radius = SIZES[thing.size] * rng.uniform(0.92, 1.08)
        tilt = math.radians(rng.uniform(-8, 8))
        outline = [(side * (x + radius * u), side * (y + radius * v)) for u, v in _outline(thing.shape, tilt)]
        canvas.polygon(outline, fill=COLOURS[thing.colour])
    return image.reduce(_OVERSAMPLING)


def _outline(shape: str, tilt: float) -> list[tuple[float, float]]:
    """Return the shape around the origin with a radius of about one, y pointing down, rotated by `tilt`."""
    if shape == "square":
        corners = [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    elif shape == "cross":
        quarter = [(0.32, -1.0), (0.32, -0.32), (1.0, -0.32)]
        corners = [_turn(point, turn * math.pi / 2) for turn in range(4) for point in quarter]
    elif shape == "heart":
        angles = [2 * math.pi * step / 90 for step in range(90)]
        corners = [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
            )
            for t in angles
        ]
    else:
        radii = {"circle": (1.0,) * 120, "triangle": (1.08,) * 3, "star": (1.08, 0.45) * 5}[shape]
        step = 2 * math.pi / len(radii)
        corners = [_turn((0.0, -radius), position * step) for position, radius in enumerate(radii)]
    return [_turn(corner, tilt) for corner in corners]


def _turn(point: tuple[float, float], angle: float) -> tuple[float, float]:
    (x, y), sine, cosine = point, math.sin(angle), math.cos(angle)
    return x * cosine - y * sine, x * sine + y * cosine


def write_scenes(folder: Path, count: int, size: int, seed: int) -> None:
    """Write `count` scenes of `size` x `size` pixels and their captions.csv (image, caption, split).

    Scene i is a pure function of (seed, i), and all scenes differ, so the scenes in `val` and `test` are not
    seen in training. The folder is either complete or does not exist, even if several processes write it. A
    folder with the same scenes is not changed.

    Raises:
        UserError: there are not enough different scenes, or the folder has other content.
    """
    most = len(_combinations())
    if not 1 <= count <= most:
        raise UserError(f"{count} scenes: expected a number from 1 to {most}")
    if size < 16:
        raise UserError(f"scenes of {size} pixels are too small; use 16 pixels or more")
    table = _captions_table(count, seed)

    def fill(draft: Path) -> Path:
        for index in range(count):
            draw(seed, index, size).save(draft / _file_name(index), **_FILE_FORMAT)
        (draft / "captions.csv").write_text(table, encoding="utf-8", newline="")
        return draft

    with contextlib.suppress(OSError):
        folder.rmdir()  # an empty one
    if not folder.exists():
        make_once(folder, fill)
    if not _holds(folder, table, size):
        raise UserError(f"{folder} has other content than these scenes; delete it, or change --data.root")


def _file_name(index: int) -> str:
    return f"{index:05d}.jpg"


def _captions_table(count: int, seed: int) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("image", "caption", "split"))
    for index in range(count):
        writer.writerows((_file_name(index), caption, split(index)) for caption in describe(seed, index))
    return table.getvalue()


def _holds(folder: Path, table: str, size: int) -> bool:
    try:
        same_captions = (folder / "captions.csv").read_bytes() == table.encode()
        with Image.open(folder / _file_name(0)) as image:
            return same_captions and image.size == (size, size)
    except OSError:
        return False
