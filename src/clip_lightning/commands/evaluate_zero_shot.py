"""`clip-lightning evaluate zero-shot`: pictures classified by the names of their classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_lightning.commands.evaluate_inputs import (
    check_options,
    choose_split,
    listed,
    load_classes,
    load_model,
    say,
    tell_broken,
)
from clip_lightning.commands.evaluate_outputs import finish, slug

if TYPE_CHECKING:
    from clip_lightning.data.classes import ClassSet
    from clip_lightning.evaluation.zero_shot import Classification
    from clip_lightning.model.clip import CLIP
    from clip_lightning.reports.class_report import ClassReport
    from clip_lightning.reports.tables import Row


def zero_shot(
    model: str,
    data: str,
    *,
    templates: str = "simple",
    names: Path | None = None,
    split: str | None = None,
    data_cache: Path | None = None,
    out: Path | None = None,
    wandb: str | None = None,
    json: bool = False,
) -> None:
    """Classify pictures by captions made of the names of the classes.

    Intervals (95 %) of top-1 and top-5 are Wilson's.

    Args:
        model: a bundle's folder, a hub id or wandb:NAME; several with commas between.
        data: a folder of class folders (or of train, val and test with such folders in them), a CSV with the
            columns image and label, torchvision:CIFAR10 and the like, or hf:OWNER/NAME; several with commas
            between.
        templates: simple, imagenet, none, or a file with one template a line, {} where the name goes.
        names: file of the names of classes, with synonyms: JSON from class to name or names, CSV (class, then
            its names), or lines in the order of the classes with commas between names.
        split: all, train, val or test; by default the data's own test split (val, if it has no test), and
            all where it has none.
        data_cache: folder for what torchvision downloads; the user's cache folder by default.
        out: folder for the table as Markdown, CSV and JSON, accuracies of classes (classes.csv), confusions
            (confused.csv, confusion.png) and the calibration (calibration.csv, reliability.png).
        wandb: W&B project (or ENTITY/PROJECT) that gets a run for each model and data set, with tables of
            classes and confusions.
        json: print one JSON object instead, of several models or data sets a list.
    """
    from clip_lightning.data.classes import class_names
    from clip_lightning.evaluation.prompts import read_templates
    from clip_lightning.reports.class_report import ClassReport

    check_options(split, out)
    models, sentences = listed(model), read_templates(templates)
    sets = {place: load_classes(place, data_cache) for place in listed(data)}
    chosen = {place: choose_split(place, split, set(found.splits)) for place, found in sets.items()}
    called = {place: class_names(found.classes, names) for place, found in sets.items()}
    for entries in called.values():
        _tell_same_names(entries)
    rows: list[Row] = []
    reports: list[ClassReport] = []
    for number, name in enumerate(models):
        clip = load_model(name)
        for place, found in sets.items():
            about: Row = {"model": name, "data": place, "split": chosen[place], "templates": templates}
            about["template_count"] = len(sentences)
            values, result = _zero_shot(clip, found, called[place], sentences, about)
            rows.append(about | values)
            reports.append(ClassReport(f"{name} on {place}", [entry[0] for entry in called[place]], result))
            if out is not None:
                several = len(models) * len(sets) > 1
                reports[-1].write(out / f"{number}-{slug(name)}-on-{slug(place)}" if several else out)
            if not json:
                print(reports[-1].summary())
    finish(rows, out, json, wandb, reports)


def _zero_shot(
    clip: CLIP,
    data: ClassSet,
    names: Sequence[Sequence[str]],
    templates: Sequence[str],
    about: dict[str, Any],
) -> tuple[dict[str, Any], Classification]:
    import torch

    from clip_lightning.evaluation.zero_shot import classify, zero_shot_classifier
    from clip_lightning.model.encode import encode_pictures, project_pictures

    rows = data.rows(about["split"])
    pictures = encode_pictures(
        clip, [data.pictures[row] for row in rows], progress=f"{about['model']} on {about['data']}"
    )
    tell_broken(pictures)
    labels = torch.tensor([data.labels[rows[at]] for at in pictures.rows])
    result = classify(
        project_pictures(clip, pictures.features),
        zero_shot_classifier(clip, names, templates),
        labels,
        scale=clip.scale.item(),
        bias=clip.bias,
    )
    values: Row = {"images": len(labels), "classes": len(names), "broken": len(pictures.broken)}
    values["probabilities"] = "softmax" if clip.bias is None else "sigmoid"
    return values | result.metrics, result


def _tell_same_names(entries: Sequence[Sequence[str]]) -> None:
    joined = [", ".join(entry) for entry in entries]
    if same := sorted({name for name in joined if joined.count(name) > 1}):
        say(f"several classes are called {same[0]}: no model can tell them apart; name them by --names")
