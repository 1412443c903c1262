"""Scores averages of a model and a fine-tuned one on held-out data, and chooses one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clip_lightning.data.captions import Splits, split_by_image
from clip_lightning.data.classes import class_names, find_classes
from clip_lightning.data.formats import NothingFound
from clip_lightning.data.readers import RECOGNIZED, NoColumn
from clip_lightning.data.sources import find_source, read_source
from clip_lightning.errors import UserError
from clip_lightning.evaluation.retrieval import retrieval_metrics
from clip_lightning.evaluation.zero_shot import classify
from clip_lightning.model.clip import CLIP
from clip_lightning.model.encode import Encoded, encode_images, encode_texts
from clip_lightning.model.merge import Weights, average

ALPHAS = [step / 10 for step in range(11)]
Point = dict[str, float]  # `alpha`, and the scores on `data` and, if given, on `keep`


class HeldOut(NamedTuple):
    """Held-out images and texts; `score` takes their embeddings, without images that cannot be read."""

    metric: str  # rsum or zero_shot_top1
    images: Sequence[Any]
    texts: Sequence[str]
    score: Callable[[Tensor, Tensor, Tensor], float]  # of images, texts, and the positions of the images


def held_out(place: str, classes: bool) -> HeldOut:
    """Return the val split as `fit` uses or draws it; without captions, images of classes if allowed."""
    try:
        source = find_source(place)
        source.fetch()
        images = split_by_image(read_source(source, RECOGNIZED), Splits())["val"]
    except (NothingFound, NoColumn):
        if not classes:
            raise
        return _held_out_classes(place)
    texts = [text for image in images for text in image.captions]
    owner = torch.tensor([row for row, image in enumerate(images) for _ in image.captions])
    return HeldOut(
        "rsum",
        [image.path for image in images],
        texts,
        lambda image, text, rows: retrieval_metrics(image, text, owner, image_id=rows)["rsum"],
    )


def _held_out_classes(place: str) -> HeldOut:
    """Return the val split, or, without one, all images that are not in a test split."""
    found = find_classes(place)
    chosen = found.rows("val") or [row for row, split in enumerate(found.splits) if split != "test"]
    labels = torch.tensor(found.labels)[chosen]
    texts = [f"a photo of a {names[0]}." for names in class_names(found.classes)]
    return HeldOut(
        "zero_shot_top1",
        [found.images[row] for row in chosen],
        texts,
        lambda image, text, rows: classify(image, text, labels[rows], scale=1).metrics["zero_shot_top1"],
    )


@torch.no_grad()
def score_averages(
    clip: CLIP, base: Weights, tuned: Weights, sets: Mapping[str, HeldOut], alphas: Sequence[float]
) -> list[Point]:
    """Load (1 - alpha) * base + alpha * tuned into `clip`, and score it, for each alpha.

    A tower whose weights are the same in both runs only once, and its features are projected again.
    """
    trained = {name.split(".")[0] for name in base if not torch.equal(base[name], tuned[name])}
    images: dict[str, Encoded] = {}
    texts: dict[str, Tensor] = {}
    points = []
    for alpha in alphas:
        clip.load_state_dict(average((base, tuned), (1 - alpha, alpha)))
        point = {"alpha": alpha}
        for name, data in sets.items():
            title = f"--{name}, alpha {alpha:g}"
            if name not in images or "image_tower" in trained:
                encoded = encode_images(clip.image_tower, data.images, progress=f"{title}, images")
                images[name] = Encoded.join(encoded)
            if name not in texts or "text_tower" in trained:
                texts[name] = encode_texts(clip.text_tower, data.texts, progress=f"{title}, texts")
            if not images[name].rows:
                raise UserError(f"--{name} has no held-out image that can be read; give other data")
            image = clip.project_image(images[name].features.to(clip.device)).cpu()
            text = clip.project_text(texts[name].to(clip.device)).cpu()
            point[name] = data.score(image, text, torch.tensor(images[name].rows))
        points.append(point)
    return points


def choose(points: Sequence[Point]) -> tuple[float, str]:
    """Choose alpha, and return it with the reason in a line.

    Without `keep`, it has the best rsum on `data`. With `keep`, it has the largest sum of two fractions: of
    what TUNED won on `data`, and of what it lost on `keep` that is kept. A change by less than one per cent
    does not count as won or lost.
    """
    first, last = points[0], points[-1]
    if "keep" not in first:
        best = max(points, key=lambda point: point["data"])
        return best["alpha"], f"alpha {best['alpha']:g} has the best rsum on --data: {best['data']:.1f}"
    won = [_fraction(point["data"], first["data"], last["data"]) for point in points]
    kept = [_fraction(point["keep"], last["keep"], first["keep"]) for point in points]
    place = max(range(len(points)), key=lambda place: won[place] + kept[place])
    won_here, lost = 100 * won[place], 100 * (1 - kept[place])
    reason = f"{won_here:.0f} % of what was won on --data, and loses {lost:.0f} % of what was lost on --keep"
    return points[place]["alpha"], f"alpha {points[place]['alpha']:g} is the best compromise: it has {reason}"


def _fraction(value: float, start: float, end: float) -> float:
    return (value - start) / (end - start) if end > 1.01 * start else 1.0
