"""`clip-lightning evaluate retrieval|zero-shot|linear-probe`: score models on data."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_lightning.arguments import run_functions
from clip_lightning.errors import UserError
from clip_lightning.terminal import one_line

if TYPE_CHECKING:
    from clip_lightning.data.captions import CaptionedImage
    from clip_lightning.data.classes import ClassSet
    from clip_lightning.evaluation.intervals import Hits
    from clip_lightning.model.clip import CLIP
    from clip_lightning.model.encode import Pictures
    from clip_lightning.reports.class_report import ClassReport
    from clip_lightning.reports.tables import Row

SPLITS = ("all", "train", "val", "test")


def run(args: list[str]) -> None:
    """Run `evaluate` with the arguments of the command line."""
    commands = {"retrieval": retrieval, "zero-shot": zero_shot, "linear-probe": linear_probe}
    run_functions(commands, args, positional=True)


def retrieval(
    model: str,
    data: str,
    *,
    split: str | None = None,
    out: Path | None = None,
    wandb: str | None = None,
    json: bool = False,
) -> None:
    """Find images by their captions and captions by their images, among all of the split.

    R@k is the percentage of queries with a right answer among the first k (hit@k): for an image, any of its
    captions. True recall is the fraction of an image's captions that is found. fold1000_... are means over
    folds of 1,000 images, which is an easier task. Intervals (95 %) allow for the captions of an image being
    answered together. Every model after the first is also compared with the first, image by image.

    Args:
        model: a bundle's folder, a hub id or wandb:NAME; several with commas between.
        data: captioned images, as for fit --data.root; several with commas between.
        split: all, train, val or test. By default the data's own test split (val if it has no test), or all
            if it has no splits; val and test of such data are those that fit draws from it by default.
        out: folder for the table as Markdown, CSV and JSON.
        wandb: W&B project (or ENTITY/PROJECT) that gets a run for each model and data set.
        json: print one JSON object instead, or a list for several models or data sets.
    """
    from clip_lightning.evaluation.intervals import paired_differences

    models = _checked(model, split, out)
    sets = {place: _captioned(place, split) for place in _listed(data)}
    rows: list[Row] = []
    first: dict[str, tuple[str, Hits]] = {}
    for clip, row in _pairs(models, sets):
        row["split"], images = sets[row["data"]]
        values, found = _retrieval(clip, images, _title(row))
        row |= values
        name, reference = first.setdefault(row["data"], (row["model"], found))
        if reference is not found:
            row["compared_with"] = name
            for metric, (difference, low, high, p) in paired_differences(found, reference).items():
                row |= {f"{metric}_difference": difference, f"{metric}_difference_low": low}
                row |= {f"{metric}_difference_high": high, f"{metric}_difference_p": p}
        rows.append(row)
    _finish(rows, out, json, wandb)


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
    """Classify images by captions made of the names of the classes.

    Intervals (95 %) of top-1 and top-5 are Wilson's.

    Args:
        model: a bundle's folder, a hub id or wandb:NAME; several with commas between.
        data: a folder of class folders (or of train, val and test with such folders in them), a CSV with the
            columns image and label, torchvision:CIFAR10 and the like, or hf:OWNER/NAME; several with commas
            between.
        templates: simple, imagenet, none, or a file with one template per line, {} where the name goes.
        names: file of the names of classes, with synonyms: JSON from class to name or names, CSV (class, then
            its names), or lines in the order of the classes with commas between names.
        split: all, train, val or test; by default the data's own test split (val if it has no test), or all
            if it has no splits.
        data_cache: folder for what torchvision downloads; the user's cache folder by default.
        out: folder for the table as Markdown, CSV and JSON, accuracies of classes (classes.csv), confusions
            (confused.csv, confusion.png) and the calibration (calibration.csv, reliability.png).
        wandb: W&B project (or ENTITY/PROJECT) that gets a run for each model and data set, with tables of
            classes and confusions.
        json: print one JSON object instead, or a list for several models or data sets.
    """
    from clip_lightning.data.classes import class_names
    from clip_lightning.evaluation.prompts import read_templates
    from clip_lightning.evaluation.zero_shot import classify, zero_shot_classifier
    from clip_lightning.model.encode import project_pictures
    from clip_lightning.reports.class_report import ClassReport

    models = _checked(model, split, out)
    sentences = read_templates(templates)
    sets = _class_sets(data, data_cache)
    chosen = {place: _choose_split(place, split, found.splits) for place, found in sets.items()}
    called = {place: class_names(found.classes, names) for place, found in sets.items()}
    _warn_of_same_names(called.values())
    several = len(models) * len(sets) > 1
    rows: list[Row] = []
    reports: list[ClassReport] = []
    for clip, row in _pairs(models, sets):
        place = row["data"]
        found, names_of = sets[place], called[place]
        row |= {"split": chosen[place], "templates": templates, "template_count": len(sentences)}
        members = found.rows(chosen[place])
        encoded = _encode(clip, [found.pictures[member] for member in members], _title(row))
        result = classify(
            project_pictures(clip, encoded.features),
            zero_shot_classifier(clip, names_of, sentences),
            _labels(found, [members[at] for at in encoded.rows]),
            scale=clip.scale.item(),
            bias=clip.bias,
        )
        row |= {"images": len(encoded.rows), "classes": len(names_of), "broken": len(encoded.broken)}
        row["probabilities"] = "softmax" if clip.bias is None else "sigmoid"
        rows.append(row | result.metrics)
        reports.append(ClassReport(_title(row), [entry[0] for entry in names_of], result))
        if out is not None:
            folder = f"{len(rows) - 1}-{_slug(row['model'])}-on-{_slug(place)}"
            reports[-1].write(out / folder if several else out)
        if not json:
            print(reports[-1].summary())
    _finish(rows, out, json, wandb, reports)


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
    """Train a linear classifier on the frozen image tower's features, on all of train and on k per class.

    The regulariser is chosen on a fifth of the training images. The interval (95 %) is Wilson's.

    Args:
        model: a bundle's folder, a hub id or wandb:NAME; several with commas between.
        data: images with classes as for zero-shot; several with commas between. If they have no splits of
            their own, a fraction of each class is held out for testing.
        test_share: that fraction, above 0 and below 1.
        shots: numbers of images per class to learn from, with commas between; a number is skipped if a class
            has fewer.
        seeds: draws of these images; mean and standard deviation are over them.
        data_cache: folder for what torchvision downloads; the user's cache folder by default.
        out: folder for the table as Markdown, CSV and JSON.
        wandb: W&B project (or ENTITY/PROJECT) that gets a run for each model and data set.
        json: print one JSON object instead, or a list for several models or data sets.
    """
    if not 0 < test_share < 1:
        raise UserError(f"--test_share {test_share:g}: expected a fraction above 0 and below 1")
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: expected 1 or more")
    counts = [int(word) for word in shots.split(",") if word.strip().isdigit() and int(word) > 0]
    if len(counts) != len(shots.split(",")):
        raise UserError(f"--shots {shots}: expected numbers of images with commas between, as 1,2,4")
    models = _checked(model, None, out)
    sets = _class_sets(data, data_cache)
    rows = []
    for clip, row in _pairs(models, sets):
        found, title = sets[row["data"]], _title(row)
        encoded = _encode(clip, found.pictures, title)
        row |= {"classes": len(found.classes), "broken": len(encoded.broken)}
        rows.append(row | _linear_probe(encoded, found, title, test_share, counts, seeds))
    _finish(rows, out, json, wandb)


def _retrieval(clip: CLIP, images: Sequence[CaptionedImage], title: str) -> tuple[dict[str, Any], Hits]:
    import torch

    from clip_lightning.evaluation import retrieval
    from clip_lightning.evaluation.intervals import hits, recall_intervals
    from clip_lightning.model.encode import project_pictures

    encoded = _encode(clip, [image.path for image in images], title)
    captions = [(row, text) for row, at in enumerate(encoded.rows) for text in images[at].captions]
    owner = torch.tensor([row for row, _ in captions])
    image, text = project_pictures(clip, encoded.features), clip.embed_texts([text for _, text in captions])
    found = hits(*retrieval.retrieval_ranks(image, text, owner), owner)
    bounds = recall_intervals(found)
    values: dict[str, Any] = {"images": len(image), "captions": len(text), "broken": len(encoded.broken)}
    for name, value in retrieval.retrieval_metrics(image, text, owner).items():
        values[name] = value
        if name in bounds:
            values[f"{name}_low"], values[f"{name}_high"] = bounds[name]
    values |= retrieval.true_recall(image, text, owner) | retrieval.fold_metrics(image, text, owner)
    return values, found


def _linear_probe(
    encoded: Pictures, data: ClassSet, title: str, test_share: float, shots: Sequence[int], seeds: int
) -> dict[str, Any]:
    import torch

    from clip_lightning.evaluation.linear_probe import few_shot, held_out, linear_probe

    labels = _labels(data, encoded.rows)
    own = [data.splits[row] for row in encoded.rows]
    part = next((name for name in ("test", "val") if name in own), None)
    if "train" in own and part:
        train, test = (torch.tensor([name == wanted for name in own]) for wanted in ("train", part))
    else:
        test = held_out(labels, test_share, seed=0)
        train = ~test
    if not train.any() or not test.any():
        raise UserError(f"{title}: no images to train or to test on; give more than one image per class")
    parts = (encoded.features[train], labels[train], encoded.features[test], labels[test])
    values = {"train_images": int(train.sum()), "test_images": int(test.sum())}
    return values | linear_probe(*parts) | few_shot(*parts, shots=shots, seeds=seeds)


def _pairs(models: Sequence[str], places: Iterable[str]) -> Iterator[tuple[CLIP, Row]]:
    """Yield each model, on a GPU if there is one, with the beginning of its row for each place."""
    from clip_lightning.model.clip import CLIP
    from clip_lightning.model.encode import best_device

    for name in models:
        clip = CLIP.from_pretrained(name).to(best_device())
        for place in places:
            yield clip, {"model": name, "data": place}


def _title(row: Row) -> str:
    return f"{row['model']} on {row['data']}"


def _encode(clip: CLIP, images: Sequence[Any], title: str) -> Pictures:
    """Run the image tower, and warn of images that could not be read."""
    from clip_lightning.model.encode import encode_pictures

    encoded = encode_pictures(clip, images, progress=title)
    if not encoded.rows:
        path, reason = next(iter(encoded.broken.items()), ("the split", "it has no images"))
        raise UserError(f"none of the images can be read; {path}: {reason}; give other data")
    _warn_of_each("skipped", encoded.broken)
    return encoded


def _labels(data: ClassSet, rows: Iterable[int]) -> Any:
    import torch

    return torch.tensor([data.labels[row] for row in rows])


def _captioned(place: str, split: str | None) -> tuple[str, list[CaptionedImage]]:
    """The split that was chosen, and its images."""
    from clip_lightning.data.captions import Splits, split_by_image
    from clip_lightning.data.formats import read_captions

    captions = read_captions(Path(place))
    own = {image.split for image in captions.images} if captions.has_official_splits else set()
    chosen = _choose_split(place, split, own, may_draw=True)
    if chosen == "all":
        return chosen, list(captions.images)
    images = split_by_image(captions, Splits())[chosen]  # as fit does by default
    if not images:
        raise UserError(f"{place} has no {chosen} split; give another --split")
    return chosen, images


def _class_sets(places: str, cache: Path | None) -> dict[str, ClassSet]:
    from clip_lightning.data.named import find_classes

    sets = {place: find_classes(place, cache) for place in _listed(places)}
    for found in sets.values():
        _warn_of_each("left out", found.left_out)
    return sets


def _listed(text: str) -> list[str]:
    """The places with commas between, or one whose name has commas."""
    places = [text] if Path(text).exists() else [part.strip() for part in text.split(",") if part.strip()]
    if not places:
        raise UserError(f"{text!r} names no model or data; give a folder, or several with commas between")
    return list(dict.fromkeys(places))


def _checked(model: str, split: str | None, out: Path | None) -> list[str]:
    """The names of the models, once the options are known to be right."""
    if split is not None and split not in SPLITS:
        raise UserError(f"--split {split}: expected {', '.join(SPLITS)}")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    return _listed(model)


def _choose_split(place: str, split: str | None, own: Iterable[str | None], *, may_draw: bool = False) -> str:
    named = {name for name in own if name}
    if split is None:
        return next((name for name in ("test", "val") if name in named), "all")
    if split != "all" and split not in named and (named or not may_draw):
        has = f"its splits are {', '.join(sorted(named))}" if named else "it has no splits of its own"
        raise UserError(f"--split {split}: {place} has no such split, {has}; give one it has, or all")
    return split


def _warn_of_same_names(sets: Iterable[Sequence[Sequence[str]]]) -> None:
    for entries in sets:
        joined = [", ".join(entry) for entry in entries]
        for name in sorted({name for name in joined if joined.count(name) > 1})[:1]:
            _warn(f"several classes are called {name}, so no model can tell them apart; give --names")


def _warn_of_each(what: str, reasons: Mapping[str, str], most: int = 5) -> None:
    for name, reason in list(reasons.items())[:most]:
        _warn(f"{what} {name}: {reason}")
    if len(reasons) > most:
        _warn(f"{what} {len(reasons)} in all")


def _warn(line: str) -> None:
    print(one_line(line), file=sys.stderr, flush=True)


def _slug(place: str) -> str:
    return "".join(mark if mark.isalnum() else "-" for mark in place).strip("-")[-40:]


def _finish(
    rows: Sequence[Row],
    out: Path | None,
    json: bool,
    wandb: str | None,
    reports: Sequence[ClassReport | None] = (),
) -> None:
    """Write, print and track the rows, each with its report of classes if there are any."""
    from clip_lightning.reports.tables import print_results, write_results

    if out is not None:
        write_results(rows, out)
        _warn(f"results: {out}")
    print_results(rows, as_json=json)  # before W&B, which may refuse them
    if wandb is not None:
        from clip_lightning.tracking.evaluations import track_evaluation

        for row, report in zip(rows, reports or [None] * len(rows), strict=True):
            _warn(f"W&B run: {track_evaluation(wandb, row, out or Path('runs'), report)}")
