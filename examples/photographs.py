"""Make docs/images/photographs.png: sentences, and the photographs that a model finds for them.

    pip install scikit-image
    python examples/photographs.py runs/ID/model [--out docs/images/photographs.png]

The photographs come with scikit-image and are CC0 or in the public domain. Needs the extra `search`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import skimage.data
from PIL import Image

from clip_lightning import CLIP, ImageIndex
from clip_lightning.search.grid import draw_found

PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "cat",
    "clock",
    "coffee",
    "grass",
    "gravel",
    "hubble_deep_field",
    "rocket",
)
SENTENCES = (
    "a cat",
    "a woman in an orange suit",
    "a man taking a photograph",
    "a cup of coffee on a table",
    "a rocket taking off",
    "green grass",
)
FOUND = 3
WIDTH = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs/images/photographs.png")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photographs").mkdir()
        for photograph in PHOTOGRAPHS:
            pixels = getattr(skimage.data, photograph)()
            Image.fromarray(pixels).convert("RGB").save(
                folder / "photographs" / f"{photograph}.jpg", quality=95
            )
        index = ImageIndex.build(CLIP.from_pretrained(args.model), folder / "photographs", folder / "index")
        found = list(zip(SENTENCES, index.search(list(SENTENCES), FOUND), strict=True))
        half = len(found) // 2
        columns = []
        for part in (found[:half], found[half:]):
            draw_found(part, folder / "part.png")
            columns.append(Image.open(folder / "part.png").convert("RGB"))
    page = Image.new("RGB", (sum(column.width for column in columns), columns[0].height), "white")
    for number, column in enumerate(columns):
        page.paste(column, (number * column.width, 0))
    page = page.resize((WIDTH, round(WIDTH * page.height / page.width)), Image.Resampling.LANCZOS)
    page.quantize(160).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
