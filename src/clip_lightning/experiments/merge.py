"""Merges a model and a fine-tuned one, scores the results on held-out data, and chooses one of them."""

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
from clip_lightning.model.merge import Weights, average, average_linear

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


class Merger:
    """Averages BASE and TUNED in a model, and scores the result on held-out data.

    A linear head on a tower that is the same in both becomes their regression mean for the features of
    `keep` and `data`, if both are given. Everything else is (1 - alpha) * BASE + alpha * TUNED.

    Args:
        clip: a model with the weights of BASE, which are replaced.
        base: weights of BASE.
        tuned: weights of TUNED.
        sets: held-out data, named `data` and `keep`.
    """

    def __init__(self, clip: CLIP, base: Weights, tuned: Weights, sets: Mapping[str, HeldOut]) -> None:
        self.clip, self.weights, self.sets = clip, (base, tuned), sets
        trained = {name.split(".")[0] for name in base if not torch.equal(base[name], tuned[name])}
        self.frozen = [side for side in ("image", "text") if f"{side}_tower" not in trained]
        self._alpha = 0.0
        self._rows: dict[str, Tensor] = {}
        self._encoded: dict[tuple[str, str], Tensor] = {}
        linear = [side for side in self.frozen if [*clip.heads[side].state_dict()] == ["1.weight"]]
        self._grams = {side: self._gram_matrices(side) for side in linear if len(sets) == 2}

    @torch.no_grad()
    def load(self, alpha: float) -> None:
        """Replace the weights of the model by an average."""
        self._alpha, fractions = alpha, (1 - alpha, alpha)
        weights = average(self.weights, fractions)
        for side, grams in self._grams.items():
            layers = [model[f"heads.{side}.1.weight"] for model in self.weights]
            weights[f"heads.{side}.1.weight"] = average_linear(layers, fractions, grams)
        self.clip.load_state_dict(weights)

    @torch.no_grad()
    def score(self, alpha: float) -> Point:
        """Load an average and score it; a tower that is the same in both models runs only once."""
        self.load(alpha)
        point = {"alpha": alpha}
        for name, data in self.sets.items():
            image = self.clip.project_image(self._features("image", name).to(self.clip.device)).cpu()
            text = self.clip.project_text(self._features("text", name).to(self.clip.device)).cpu()
            point[name] = data.score(image, text, self._rows[name])
        return point

    def _gram_matrices(self, side: str) -> list[Tensor]:
        features = [self._features(side, name).double() for name in ("keep", "data")]
        return [rows.T @ rows for rows in features]

    def _features(self, side: str, name: str) -> Tensor:
        if side not in self.frozen or (side, name) not in self._encoded:
            data, title = self.sets[name], f"--{name}, alpha {self._alpha:g}, {side}s"
            if side == "text":
                self._encoded[side, name] = encode_texts(self.clip.text_tower, data.texts, progress=title)
            else:
                images = Encoded.join(encode_images(self.clip.image_tower, data.images, progress=title))
                if not images.rows:
                    raise UserError(f"--{name} has no held-out image that can be read; give other data")
                self._encoded[side, name], self._rows[name] = images.features, torch.tensor(images.rows)
        return self._encoded[side, name]


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
    won_here, lost = 100 * won[place], 100 * max(0.0, 1 - kept[place])
    reason = f"{won_here:.0f} % of what was won on --data, and loses {lost:.0f} % of what was lost on --keep"
    return points[place]["alpha"], f"alpha {points[place]['alpha']:g} is the best compromise: it has {reason}"


def _fraction(value: float, start: float, end: float) -> float:
    return (value - start) / (end - start) if end > 1.01 * start else 1.0
