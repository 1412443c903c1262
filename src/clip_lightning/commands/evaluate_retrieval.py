"""`clip-lightning evaluate retrieval`: pictures by their captions, and captions by their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_lightning.commands.evaluate_inputs import (
    check_options,
    choose_split,
    listed,
    load_model,
    tell_broken,
)
from clip_lightning.commands.evaluate_outputs import finish
from clip_lightning.errors import UserError

if TYPE_CHECKING:
    from clip_lightning.data.captions import CaptionedImage
    from clip_lightning.evaluation.intervals import Hits
    from clip_lightning.model.clip import CLIP
    from clip_lightning.reports.tables import Row


def retrieval(
    model: str,
    data: str,
    *,
    split: str | None = None,
    out: Path | None = None,
    wandb: str | None = None,
    json: bool = False,
) -> None:
    """Find pictures by their captions and captions by their pictures, among all of the split.

    R@k counts the queries with a right answer among the k best (hit@k): of a picture, any of its captions.
    True recall is the share of a picture's captions that is there. fold1000_... are means over folds of
    1,000 pictures, an easier task. Intervals (95 %) allow for the captions of an image being answered
    together. Every model after the first is also compared with the first, image by image.

    Args:
        model: a bundle's folder, a hub id or wandb:NAME; several with commas between.
        data: captioned pictures, as for fit --data.root; several with commas between.
        split: all, train, val or test. By default the data's own test split (val, if it has no test), and all
            where it has none; val and test of such data are those that fit draws from it by default.
        out: folder for the table as Markdown, CSV and JSON.
        wandb: W&B project (or ENTITY/PROJECT) that gets a run for each model and data set.
        json: print one JSON object instead, of several models or data sets a list.
    """
    from clip_lightning.evaluation.intervals import paired_differences

    check_options(split, out)
    models = listed(model)
    captioned = {place: _captioned(place, split) for place in listed(data)}
    rows: dict[str, list[Row]] = {place: [] for place in captioned}
    first: dict[str, Hits] = {}
    for name in models:
        clip = load_model(name)
        for place, (chosen, images) in captioned.items():
            values, found = _retrieval(clip, images, f"{name} on {place}")
            row = {"model": name, "data": place, "split": chosen, **values}
            if place in first:
                row["compared_with"] = rows[place][0]["model"]
                for metric, (difference, low, high, p) in paired_differences(found, first[place]).items():
                    row |= {f"{metric}_difference": difference, f"{metric}_difference_low": low}
                    row |= {f"{metric}_difference_high": high, f"{metric}_difference_p": p}
            first.setdefault(place, found)
            rows[place].append(row)
    finish([row for group in rows.values() for row in group], out, json, wandb)


def _retrieval(clip: CLIP, images: Sequence[CaptionedImage], title: str) -> tuple[dict[str, Any], Hits]:
    import torch

    from clip_lightning.evaluation.folds import fold_metrics
    from clip_lightning.evaluation.intervals import hits, recall_intervals
    from clip_lightning.evaluation.retrieval import retrieval_metrics, retrieval_ranks
    from clip_lightning.evaluation.true_recall import true_recall
    from clip_lightning.model.encode import encode_pictures, project_pictures

    pictures = encode_pictures(clip, [image.path for image in images], progress=title)
    tell_broken(pictures)
    captions = [(row, text) for row, at in enumerate(pictures.rows) for text in images[at].captions]
    owner = torch.tensor([row for row, _ in captions])
    image, text = project_pictures(clip, pictures.features), clip.embed_texts([text for _, text in captions])
    found = hits(*retrieval_ranks(image, text, owner), owner)
    bounds = recall_intervals(found)
    values: dict[str, Any] = {"images": len(image), "captions": len(text), "broken": len(pictures.broken)}
    for name, value in retrieval_metrics(image, text, owner).items():
        values[name] = value
        if name in bounds:
            values[f"{name}_low"], values[f"{name}_high"] = bounds[name]
    return values | true_recall(image, text, owner) | fold_metrics(image, text, owner), found


def _captioned(place: str, split: str | None) -> tuple[str, list[CaptionedImage]]:
    """The split that was chosen, and its pictures."""
    from clip_lightning.data.captions import split_by_image
    from clip_lightning.data.formats import read_captions

    captions = read_captions(Path(place))
    own = {image.split for image in captions.images if image.split} if captions.has_official_splits else set()
    chosen = choose_split(place, split, own, may_draw=True)
    if chosen == "all":
        return chosen, list(captions.images)
    parts = split_by_image(captions, seed=0, val_share=0.1, test_share=0.1)  # as fit does by default
    if not parts[chosen]:
        raise UserError(f"{place} has no {chosen} split; give another --split")
    return chosen, parts[chosen]
