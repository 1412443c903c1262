"""Make docs/images/search.png and zero_shot.png: what a model of the synthetic scenes does with unseen ones.

    python examples/pictures.py runs/ID/model [--out docs/images]

The model is a bundle of the quickstart. Needs the extra `search`.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from itertools import combinations
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from clip_lightning import CLIP, ImageIndex, zero_shot_classifier
from clip_lightning.data.scenes import SHAPES, describe, split, write_scenes
from clip_lightning.search.grid import draw_found

SENTENCE, LIKE = 4, 14  # scenes of the validation and test splits
CLASSIFIED = (4, 9, 14, 19)
SHOWN = 4  # labels
WIDTH = 1280
BLUE, GREY = "#2563eb", "#a1a1aa"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    args = parser.parse_args()
    clip = CLIP.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as folder:
        scenes, unseen = Path(folder, "scenes"), Path(folder, "unseen")
        write_scenes(scenes, count=2500, size=224, seed=0)
        unseen.mkdir()
        for number in range(2500):
            if split(number) != "train":
                shutil.copy(scenes / f"{number:05d}.jpg", unseen)
        search(clip, unseen, Path(folder), args.out / "search.png")
        zero_shot(clip, unseen, args.out / "zero_shot.png")


def search(clip: CLIP, unseen: Path, folder: Path, out: Path) -> None:
    """A sentence, and beside it a picture, each with the six scenes found."""
    index = ImageIndex.build(clip, unseen, folder / "index")
    picture = unseen / f"{LIKE:05d}.jpg"
    sentence = describe(0, SENTENCE)[0].partition(" on ")[0]  # without the background
    found: dict[str | Path, list] = {
        sentence: index.search(sentence, 6)[0],
        picture: index.search_by_image([picture], 6)[0],
    }
    halves = []
    for query, hits in found.items():
        draw_found([(query, hits)], folder / "half.png")
        halves.append(Image.open(folder / "half.png").convert("RGB"))
    whole = Image.new("RGB", (sum(half.width for half in halves), halves[0].height), "white")
    for number, half in enumerate(halves):
        whole.paste(half, (number * half.width, 0))
    small = whole.resize((WIDTH, round(WIDTH * whole.height / whole.width)), Image.Resampling.LANCZOS)
    # few colours, which a palette shows as well in a third of the bytes
    small.quantize(256).save(out, optimize=True)


def zero_shot(clip: CLIP, unseen: Path, out: Path) -> None:
    """Scenes, each above the labels that the model finds most probable."""
    labels = [f"{one} and a {other}" for one, other in combinations(sorted(SHAPES), 2)]
    classifier = zero_shot_classifier(clip, labels, ["a {}", "a picture of a {}", "two shapes, a {}"])
    pictures = [unseen / f"{number:05d}.jpg" for number in CLASSIFIED]
    similarity = clip.embed_images(pictures) @ classifier.T
    chances = 100 * (clip.scale.item() * similarity).softmax(-1)
    figure = Figure((WIDTH / 100, 3.9), 100, facecolor="white")
    for number, (picture, row) in enumerate(zip(pictures, chances, strict=True)):
        left = 0.02 + 0.247 * number
        above = figure.add_axes((left, 0.37, 0.147, 0.48))
        above.imshow(Image.open(picture))
        above.axis("off")
        below = figure.add_axes((left + 0.11, 0.02, 0.1, 0.32))
        values, places = row.topk(SHOWN)
        below.barh(range(SHOWN), values.tolist(), color=[BLUE, *[GREY] * (SHOWN - 1)])
        below.set_yticks(range(SHOWN), [labels[place] for place in places.tolist()], fontsize=10)
        below.invert_yaxis()
        below.set(xlim=(0, 130), xticks=[])
        below.spines[:].set_visible(False)
        below.tick_params(length=0)
        for place, value in enumerate(values.tolist()):
            below.text(value + 4, place, f"{value:.0f} %", va="center", fontsize=10)
    title = f"a ... and a ...: the model's choice among {len(labels)} labels that it was not trained with"
    figure.text(0.02, 0.92, title, fontsize=14)
    figure.savefig(out.with_suffix(".tmp.png"))
    Image.open(out.with_suffix(".tmp.png")).convert("RGB").quantize(256).save(out, optimize=True)
    out.with_suffix(".tmp.png").unlink()


if __name__ == "__main__":
    main()
