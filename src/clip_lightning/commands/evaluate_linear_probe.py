"""`clip-lightning evaluate linear-probe`: what can be learnt from the frozen image tower's features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_lightning.commands.evaluate_inputs import (
    check_options,
    listed,
    load_classes,
    load_model,
    tell_broken,
)
from clip_lightning.commands.evaluate_outputs import finish
from clip_lightning.errors import UserError

if TYPE_CHECKING:
    from clip_lightning.data.classes import ClassSet
    from clip_lightning.model.clip import CLIP


def linear_probe(
    model: str,
    data: str,
    *,
    test_share: float = 0.4,
    shots: str = "1,2,4,8,16",
    seeds: int = 3,
    data_cache: Path | None = None,
    out: Path | None = None,
    wandb: str | None = None,
    json: bool = False,
) -> None:
    """Train a linear classifier on the frozen image tower's features, on all of train and on k a class.

    The regulariser is chosen on a fifth of the training pictures. The interval (95 %) is Wilson's.

    Args:
        model: a bundle's folder, a hub id or wandb:NAME; several with commas between.
        data: pictures with classes as for zero-shot; several with commas between. Without splits of their
            own, part of each class is held out for testing.
        test_share: that part, above 0 and below 1.
        shots: pictures of each class to learn from, with commas between; those are skipped for which a class
            has too few.
        seeds: draws of these pictures; mean and standard deviation are over them.
        data_cache: folder for what torchvision downloads; the user's cache folder by default.
        out: folder for the table as Markdown, CSV and JSON.
        wandb: W&B project (or ENTITY/PROJECT) that gets a run for each model and data set.
        json: print one JSON object instead, of several models or data sets a list.
    """
    if not 0 < test_share < 1:
        raise UserError(f"--test_share {test_share:g}: expected a share above 0 and below 1")
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: expected 1 or more")
    counts = [int(word) for word in shots.split(",") if word.strip().isdigit() and int(word) > 0]
    if len(counts) != len(shots.split(",")):
        raise UserError(f"--shots {shots}: expected numbers of pictures with commas between, as 1,2,4")
    check_options(None, out)
    models = listed(model)
    sets = {place: load_classes(place, data_cache) for place in listed(data)}
    rows = []
    for name in models:
        clip = load_model(name)
        for place, found in sets.items():
            row = {"model": name, "data": place}
            rows.append(row | _linear_probe(clip, found, f"{name} on {place}", test_share, counts, seeds))
    finish(rows, out, json, wandb)


def _linear_probe(
    clip: CLIP, data: ClassSet, title: str, test_share: float, shots: Sequence[int], seeds: int
) -> dict[str, Any]:
    import torch

    from clip_lightning.evaluation.linear_probe import few_shot, held_out, linear_probe
    from clip_lightning.model.encode import encode_pictures

    pictures = encode_pictures(clip, data.pictures, progress=title)
    tell_broken(pictures)
    labels = torch.tensor([data.labels[row] for row in pictures.rows])
    own = [data.splits[row] for row in pictures.rows]
    if "train" in own and {"test", "val"} & set(own):
        part = "test" if "test" in own else "val"
        train = torch.tensor([name == "train" for name in own])
        test = torch.tensor([name == part for name in own])
    else:
        test = held_out(labels, test_share, seed=0)
        train = ~test
    if not train.any() or not test.any():
        raise UserError(f"{title}: no pictures to train on, or none to test; give more than one of a class")
    parts = (pictures.features[train], labels[train], pictures.features[test], labels[test])
    values = {"train_images": int(train.sum()), "test_images": int(test.sum())}
    values |= {"classes": len(data.classes), "broken": len(pictures.broken)}
    return values | linear_probe(*parts) | few_shot(*parts, shots=shots, seeds=seeds)
