"""Generate synthetic scenes with captions, a data set for demonstrations and tests without downloads."""

from __future__ import annotations

import cmath
import csv
import math
from functools import lru_cache
from itertools import product
from math import cos
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

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
_SYNONYMS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_PHRASES = {  # right and below describe the same scenes from the other object
    # from the first object to the second, from the second to the first, and their sides
    "left": (
        ("left of", "to the left of", "on the left side of"),
        ("right of", "to the right of", "on the right side of"),
        ("on its left", "on its right"),
    ),
    "above": (
        ("above", "over", "higher up than"),
        ("below", "under", "further down than"),
        ("above it", "below it"),
    ),
}
_OVERSAMPLING = 4


class Thing(NamedTuple):
    """One of the two objects in a scene."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


class Scene(NamedTuple):
    """The content of an image: `first` is `relation` (left of, above) `second`."""

    first: Thing
    second: Thing
    relation: str
    background: str


@lru_cache(maxsize=1)
def all_scenes(seed: int) -> list[Scene]:
    """Return all scenes in random order; the two objects of a scene have different colors and shapes."""
    things = [Thing(*attributes) for attributes in product(SIZES, COLOURS, SHAPES)]
    scenes = [
        Scene(first, second, relation, background)
        for first, second in product(things, repeat=2)
        if first.colour != second.colour and first.shape != second.shape
        for relation, background in product(_PHRASES, COLOURS)
        if background not in (first.colour, second.colour)
    ]
    return [scenes[i] for i in np.random.default_rng(seed).permutation(len(scenes))]


def split(index: int) -> str:
    """Return `train`, `val` or `test`: 80, 10 and 10 % of every ten consecutive scenes."""
    return {4: "val", 9: "test"}.get(index % 10, "train")


def describe(seed: int, index: int) -> tuple[str, ...]:
    """Return five captions of the scene, of which the first is the plainest."""
    shown = all_scenes(seed)[index]
    rng = np.random.default_rng((seed, index, 0))

    def a(thing: Thing) -> str:
        return f"a {rng.choice(_SYNONYMS[thing.size])} {thing.colour} {thing.shape}"

    first, second = shown.first, shown.second
    backdrop = f"{'an' if shown.background == 'orange' else 'a'} {shown.background} background"
    forward, backward, side = _PHRASES[shown.relation]
    return (
        f"a {first} {forward[0]} a {second} on {backdrop}",
        f"a {second} {backward[0]} a {first} on {backdrop}",
        f"{a(first)} {rng.choice(forward[1:])} {a(second)}, on {backdrop}",
        f"{a(second)} with {a(first)} {side[0]}, against {backdrop}",
        f"on {backdrop}, {a(first)} and {side[1]} {a(second)}",
    )


def draw(seed: int, index: int, size: int) -> Image.Image:
    """Draw the scene as an RGB image of `size` x `size` pixels, with slightly shifted objects."""
    shown = all_scenes(seed)[index]
    rng = np.random.default_rng((seed, index, 1))
    side = size * _OVERSAMPLING
    image = Image.new("RGB", (side, side), COLOURS[shown.background])
    canvas = ImageDraw.Draw(image)
    for thing, along in ((shown.first, 0.27), (shown.second, 0.73)):
        along += rng.uniform(-0.03, 0.03)
        across = 0.5 + rng.uniform(-0.15, 0.15)
        x, y = (along, across) if shown.relation == "left" else (across, along)
        radius = SIZES[thing.size] * rng.uniform(0.92, 1.08)
        turn = cmath.rect(1, math.radians(rng.uniform(-8, 8)))
        points = [point * turn for point in _outline(thing.shape)]
        outline = [(side * (x + radius * p.real), side * (y + radius * p.imag)) for p in points]
        canvas.polygon(outline, fill=COLOURS[thing.colour])
    return image.reduce(_OVERSAMPLING)


def _outline(shape: str) -> list[complex]:
    """Return the shape around the origin with a radius of about one; the imaginary axis points down."""
    if shape == "square":
        return [0.85 * (x + 1j * y) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    if shape == "cross":
        quarter = (0.32 - 1j, 0.32 - 0.32j, 1 - 0.32j)
        return [point * cmath.rect(1, turn * math.pi / 2) for turn in range(4) for point in quarter]
    if shape == "heart":
        angles = [2 * math.pi * step / 90 for step in range(90)]
        heights = [13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t) for t in angles]
        return [complex(math.sin(t) ** 3, -y / 16) for t, y in zip(angles, heights, strict=True)]
    radii = {"circle": (1.0,) * 120, "triangle": (1.08,) * 3, "star": (1.08, 0.45) * 5}[shape]
    step = 2 * math.pi / len(radii)
    return [-1j * radius * cmath.rect(1, position * step) for position, radius in enumerate(radii)]


def write_scenes(folder: Path, count: int, size: int, seed: int) -> None:
    """Write `count` scenes of `size` x `size` pixels and their captions.csv (image, caption, split).

    Scene i is a pure function of (seed, i), and all scenes differ, so those in `val` and `test` are not seen
    in training. A folder that exists is not changed.
    """

    def fill(draft: Path) -> Path:
        rows = [("image", "caption", "split")]
        for index in range(count):
            name = f"{index:05d}.jpg"
            # JPEG decodes faster than PNG; chroma subsampling would bleed colors over edges.
            draw(seed, index, size).save(draft / name, "JPEG", quality=92, subsampling=0)
            rows += [(name, caption, split(index)) for caption in describe(seed, index)]
        with (draft / "captions.csv").open("w", encoding="utf-8", newline="") as table:
            csv.writer(table, lineterminator="\n").writerows(rows)
        return draft

    make_once(folder, fill)
