"""Finds wrong captions and false negatives with heads fitted on other images, on features of frozen towers.

I images, N captions, W and V the widths of the towers, D the width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from clip_lightning.arguments import packaged_config
from clip_lightning.data.captions import CaptionedImage, CaptionSet
from clip_lightning.data.features import FeatureCache
from clip_lightning.data.images import Augmentation
from clip_lightning.errors import UserError
from clip_lightning.evaluation.linear_probe import logistic_regression
from clip_lightning.model.clip import CLIP
from clip_lightning.model.encode import best_device
from clip_lightning.terminal import printable
from clip_lightning.training.extract import Extractor

LEAST_IMAGES = 100
FOLDS, GROUP = 5, 1000  # images of a group are candidates for each other's captions
RIDGE, SCALE, PENALTY = 1.0, 20.0, 1e-4
PRECISION = 0.9  # estimated fraction of the accused captions that are wrong
TAIL = 0.4  # fraction of the mismatched captions below which the estimates are too noisy
MOST_WRONG, MOST_CONFUSED = 0.5, 0.2
SHOWN = 10  # accused captions in a terminal
GIVEN, MISMATCHED, NEAREST = range(3)  # judged captions: the image's own, random ones, the best others
Project = Callable[[Tensor], Tensor]


def audit(
    data: CaptionSet, parts: Mapping[str, Sequence[CaptionedImage]], model: str | None, cache: FeatureCache
) -> dict[str, Any]:
    """Judge the captions of all images, by the splits in `parts`, and return a report as JSON values.

    `model` has the towers; by default, they are those of `fit --config heads`, which shares their features.
    """
    images = [image for part in parts.values() for image in part]
    _check_count(data, len(images))
    if model is None:
        names = yaml.safe_load(Path(packaged_config("heads")).read_text())["model"]
        clip = CLIP.from_towers(names["image_tower"], names["text_tower"])
    else:
        clip = CLIP.from_pretrained(model)
    clip.freeze("both")
    image, text = cached_features(clip, parts, cache)
    readable, counts = image.isfinite().all(1), torch.tensor([len(image.captions) for image in images])
    _check_count(data, int(readable.sum()))
    read, names = [images[row] for row in readable.nonzero()[:, 0].tolist()], data.names()
    pairs = [(names[image.path], caption) for image in read for caption in image.captions]
    owner = torch.arange(len(read)).repeat_interleave(counts[readable])
    log_odds, nearest = suspicions(image[readable], text[readable.repeat_interleave(counts)], owner)
    fraction, threshold = choose_threshold(log_odds[GIVEN], log_odds[MISMATCHED])
    order = log_odds[GIVEN].argsort(descending=True, stable=True)
    suspects, negatives = [], []
    for row in order[log_odds[GIVEN, order] >= threshold].tolist():
        score = float(log_odds[GIVEN, row].sigmoid())
        suspects.append({"image": pairs[row][0], "caption": pairs[row][1], "score": score})
    for row, score in find_false_negatives(log_odds[NEAREST], owner):
        (of, caption), name = pairs[nearest[row]], names[read[row].path]
        negatives.append({"image": name, "caption": caption, "of": of, "score": score})
    return {
        "root": str(data.root),
        "images": len(images),
        "captions": len(text),
        "unreadable": int((~readable).sum()),
        "towers": [tower.spec["name"] for tower in (clip.image_tower, clip.text_tower)],
        "wrong_fraction": fraction,
        "accused": len(suspects),
        "suspects": suspects,
        "false_negatives": negatives,
    }


def _check_count(data: CaptionSet, images: int) -> None:
    if images < LEAST_IMAGES:
        problem = f"{data.root} has {images} images that can be read, too few to judge captions by others"
        raise UserError(f"{problem}; expected {LEAST_IMAGES} or more")


def as_text(report: Mapping[str, Any]) -> str:
    """Render a report for a terminal."""
    accused, total, suspects = report["accused"], report["captions"], report["suspects"]
    alike = len(report["false_negatives"])
    lines = [
        report["root"],
        f"  judged    {total:,} captions of {report['images']:,} images, with {' × '.join(report['towers'])}",
        f"  wrong     {report['wrong_fraction']:.1%} of the captions (estimated)",
        f"  accused   {accused:,} captions ({accused / total:.1%}), estimated precision {PRECISION:.0%}",
        *(f"  {one['score']:.3f}     {one['image']}: {one['caption']}" for one in suspects[:SHOWN]),
    ]
    if total > report["images"]:
        share = f"{alike:,} images ({alike / report['images']:.1%})"
        lines.append(f"  alike     {share} that a caption of another image fits, too")
    if report["wrong_fraction"] > MOST_WRONG:
        lines.append(
            "warning: these towers cannot tell the captions from random ones; try others with --model"
        )
    return printable("\n".join(lines))


def cached_features(
    clip: CLIP, parts: Mapping[str, Sequence[CaptionedImage]], cache: FeatureCache
) -> tuple[Tensor, Tensor]:
    """Return the features of all images (I, W) and captions (N, V), as `fit` caches them for each split."""
    device = best_device()
    is_fast = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    extractor = Extractor(cache, device, torch.bfloat16 if is_fast else None)
    image_features, text_features = [], []
    for split, images in parts.items():
        if images:
            captions = [caption for image in images for caption in image.captions]
            plain = extractor.image_features(clip.image_tower, images, 0, Augmentation(), f"{split} images")
            texts = extractor.text_features(clip.text_tower, captions, f"{split} captions")
            image_features.append(plain.rows(range(len(images))))
            text_features.append(texts.rows(range(len(captions))))
    return torch.cat(image_features), torch.cat(text_features)


def fit_heads(image: Tensor, text: Tensor, owner: Tensor) -> tuple[Project, Project]:
    """Return heads for features of images (I, W) and captions (N, V), of which `owner` (N,) are the images.

    They are those of canonical correlation analysis with a ridge (Vinod 1976), and weight each dimension by
    its correlation (Gong et al. 2014). They take seconds, and need fewer pairs than a contrastive loss.
    """
    counts = torch.bincount(owner, minlength=len(image)).float()
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    image_mean, text_mean = counts @ image / len(text), text.mean(0)
    image, text = image - image_mean, text - text_mean
    sums = text.new_zeros(len(image), text.shape[1]).index_add_(0, owner, text)

    def whitening(total: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(total.double() / len(text))
        return (vectors * (values + RIDGE * values.mean()).clamp(min=1e-12).rsqrt()) @ vectors.T

    whiten_image, whiten_text = whitening((image.T * counts) @ image), whitening(text.T @ text)
    cross = whiten_image @ (image.T @ sums).double() @ whiten_text / len(text)
    left, correlations, right = torch.linalg.svd(cross, full_matrices=False)
    project_image = (whiten_image @ left * correlations).float()
    project_text = (whiten_text @ right.T * correlations).float()
    return (
        lambda rows: F.normalize((F.normalize(rows, dim=-1) - image_mean) @ project_image, dim=-1),
        lambda rows: F.normalize((F.normalize(rows, dim=-1) - text_mean) @ project_text, dim=-1),
    )


def evidence(image: Tensor, text: Tensor, features: Tensor, owner: Tensor, placed: Tensor) -> Tensor:
    """Return evidence (N, 4) that captions belong to images.

    It has the log-odds of the image against other images for the caption, those of the caption against other
    captions for the image, and the cosines with the mean of the image's other captions, of embeddings and of
    features; these are 0 without other captions. Given pairs are never among the others, since the right
    image of a wrong caption need not be in the data, nor is the judged one.

    Args:
        image: (I, D), embeddings of the images.
        text: (N, D), embeddings of the given captions.
        features: (N, V), features of the given captions.
        owner: (N,), the image of each given caption.
        placed: (N,), the position of the caption to judge in the place of each given one.
    """
    logits = SCALE * text @ image.T
    match = logits[placed, owner]
    others = logits.index_put((torch.arange(len(text)), owner), torch.tensor(-torch.inf))
    columns = [match - others.logsumexp(1)[placed], match - others.logsumexp(0)[owner]]
    is_among = owner[placed] != owner  # of a judged pair that is not given, whose share is subtracted
    columns = [x - torch.where(is_among, -torch.expm1(x.clamp(max=-1e-6)), 1.0).log() for x in columns]
    for rows in (text, F.normalize(features, dim=-1)):
        sums = rows.new_zeros(len(image), rows.shape[1]).index_add_(0, owner, rows)
        columns.append((rows[placed] * F.normalize(sums[owner] - rows, dim=-1)).sum(1))
    return torch.stack(columns, 1)


def suspicions(image: Tensor, text: Tensor, owner: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the log-odds (3, N) that captions are wrong, and the nearest other caption of each image (I,).

    The captions are the given ones, and in the place of each a random one of another image and the one of up
    to 1,000 other images that fits best. The heads that judge an image were fitted without it and its
    captions. A logistic regression that tells given from random captions weighs the evidence. That of the
    nearest ones leaves out the given ones that look worst, as many as are wrong, and their log-odds assume
    that one in as many captions as they were chosen from fits. `image` (I, W) and `text` (N, V) are features.
    """
    generator = torch.Generator().manual_seed(seed)
    found = text.new_empty(3, len(text), 4)
    nearest, compared = torch.empty(len(image), dtype=torch.long), torch.empty(len(text))
    for fold in torch.randperm(len(image), generator=generator).tensor_split(FOLDS):
        outside = torch.ones(len(image), dtype=torch.bool).index_fill(0, fold, False)
        kept = outside[owner]
        heads = fit_heads(image[outside], text[kept], (outside.cumsum(0) - 1)[owner[kept]])
        for group in fold.tensor_split(-(-len(fold) // GROUP)):
            position = torch.full((len(image),), -1).index_put((group,), torch.arange(len(group)))
            rows = (position[owner] >= 0).nonzero()[:, 0]
            own = position[owner[rows]]
            placed = torch.randint(len(rows), (len(rows),), generator=generator)
            while (same := own[placed] == own).any():
                placed[same] = torch.randint(len(rows), (int(same.sum()),), generator=generator)
            images, texts, given = heads[0](image[group]), heads[1](text[rows]), torch.arange(len(rows))
            others = (SCALE * texts @ images.T).index_put((given, own), torch.tensor(-torch.inf))
            best = (others.log_softmax(0) + others.log_softmax(1)).argmax(0)
            nearest[group], compared[rows] = rows[best], len(rows)
            for kind, judged in {GIVEN: given, MISMATCHED: placed, NEAREST: best[own]}.items():
                found[kind, rows] = evidence(images, texts, text[rows], own, judged)
    several = (torch.bincount(owner)[owner] > 1).float()[:, None]  # a single caption has weights of its own
    inputs = torch.cat([found * several, found[..., :2] * (1 - several), several.expand(3, -1, 1)], -1)
    deviation, mean = torch.std_mean(inputs[:NEAREST], (0, 1))
    inputs = (inputs - mean) / deviation.clamp(min=1e-6)

    def weigh(rows: Tensor) -> Tensor:
        labels = torch.arange(2).repeat_interleave(len(rows))
        weight, bias = logistic_regression(inputs[:NEAREST, rows].flatten(0, 1), labels, 2, PENALTY)
        return inputs @ (weight[1] - weight[0]) + (bias[1] - bias[0])

    log_odds = weigh(torch.arange(len(text)))
    fraction, _ = choose_threshold(log_odds[GIVEN], log_odds[MISMATCHED])
    wrong = int(len(text) * min(fraction, MOST_WRONG))
    likely_right = log_odds[GIVEN].argsort()[: len(text) - wrong]
    log_odds[NEAREST] = weigh(likely_right)[NEAREST] + compared.log()
    return log_odds, nearest


def find_false_negatives(log_odds: Tensor, owner: Tensor) -> list[tuple[int, float]]:
    """Return images that their nearest other caption probably fits, with the probability, the surest first.

    `log_odds` (N,) are those that it is wrong in the place of each caption of the image; their mean counts.
    A single caption is too little evidence.
    """
    counts = torch.bincount(owner)
    means = torch.zeros(len(counts)).index_add_(0, owner, log_odds) / counts
    means = means.masked_fill(counts < 2, torch.inf)
    order = means.argsort(stable=True)[: int((means < 0).sum())]
    return list(zip(order.tolist(), means[order].neg().sigmoid().tolist(), strict=True))


def choose_threshold(given: Tensor, mismatched: Tensor) -> tuple[float, float]:
    """Return the estimated fraction of wrong captions, and the log-odds from which captions are accused.

    The log-odds of the mismatched captions are distributed as those of wrong ones. Above any value, the
    fraction of the given captions divided by that of the mismatched ones is therefore at least the fraction
    of wrong captions, and equals it where there is no right one; the lowest quotient is the estimate
    (Blanchard et al. 2010). The estimated precision above a value is the estimate divided by the quotient.
    None is accused if too many right captions look worse than a tenth of the mismatched ones.
    """
    levels = torch.linspace(0.01, 0.99, 99)
    values = mismatched.sort(descending=True).values[(levels * (len(mismatched) - 1)).long()]
    quotients = (1 - torch.searchsorted(given.sort().values, values) / len(given)) / levels
    fraction = float(quotients[levels >= TAIL].min())
    confused = float(quotients[89]) - fraction
    if not 0 < fraction <= MOST_WRONG or confused > MOST_CONFUSED:
        return fraction, float("inf")
    return fraction, float(values[fraction >= PRECISION * quotients].min())
