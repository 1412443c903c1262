"""`clip-lightning evaluate retrieval|zero-shot|linear-probe`: what models are worth on data."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_lightning.arguments import run_functions
from clip_lightning.errors import UserError

if TYPE_CHECKING:
    from clip_lightning.data.captions import CaptionedImage
    from clip_lightning.data.classes import ClassSet
    from clip_lightning.embedding import Pictures
    from clip_lightning.evaluation.intervals import Hits
    from clip_lightning.evaluation.tables import Row
    from clip_lightning.evaluation.zero_shot import Classification
    from clip_lightning.model import CLIP

SPLITS = ("all", "train", "val", "test")


def run(args: list[str]) -> None:
    """Run `evaluate` with the words of the command line."""
    commands = {"retrieval": retrieval, "zero-shot": zero_shot, "linear-probe": linear_probe}
    run_functions(commands, args, positional=True)


def retrieval(
    model: str,
    data: str,
    *,
    split: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Find pictures by their captions and captions by their pictures, among all of the split.

    Intervals (95 %) are of a bootstrap over pictures. Every model after the first is also compared with the
    first, on the same draws of the same pictures.

    Args:
        model: a bundle's folder, a hub id or wandb:NAME; several with commas between.
        data: captioned pictures, as for fit --data.root; several with commas between.
        split: all, train, val or test. By default the data's own test split (val, if it has no test), and all
            where it has none; val and test of such data are those that fit draws from it by default.
        resamples: draws of the bootstrap.
        seed: of the draws.
        out: folder for the table as Markdown, CSV and JSON.
        json: print one JSON object instead, of several models or data sets a list.
    """
    from clip_lightning.evaluation.intervals import paired_bootstrap

    if resamples < 1:
        raise UserError(f"--resamples {resamples}: expected 1 or more")
    _check(split, out)
    models = _listed(model)
    captioned = {place: _captioned(place, split) for place in _listed(data)}
    rows: dict[str, list[Row]] = {place: [] for place in captioned}
    first: dict[str, Hits] = {}
    for name in models:
        clip = _load(name)
        for place, (chosen, images) in captioned.items():
            values, found = _retrieval(clip, images, f"{name} on {place}", resamples, seed)
            row = {"model": name, "data": place, "split": chosen, **values}
            if place in first:
                row["compared_with"] = rows[place][0]["model"]
                tests = paired_bootstrap(found, first[place], resamples=resamples, seed=seed)
                for metric, (difference, low, high, p) in tests.items():
                    row |= {f"{metric}_difference": difference, f"{metric}_difference_low": low}
                    row |= {f"{metric}_difference_high": high, f"{metric}_difference_p": p}
            first.setdefault(place, found)
            rows[place].append(row)
    _finish([row for group in rows.values() for row in group], out, json)


def _retrieval(
    clip: CLIP, images: Sequence[CaptionedImage], title: str, resamples: int, seed: int
) -> tuple[dict[str, Any], Hits]:
    import torch

    from clip_lightning.embedding import encode_pictures, project_pictures
    from clip_lightning.evaluation.folds import fold_metrics
    from clip_lightning.evaluation.intervals import bootstrap_intervals, hits
    from clip_lightning.evaluation.retrieval import retrieval_metrics, retrieval_ranks

    pictures = encode_pictures(clip, [image.path for image in images], progress=title)
    _tell_broken(pictures)
    captions = [(row, text) for row, at in enumerate(pictures.rows) for text in images[at].captions]
    owner = torch.tensor([row for row, _ in captions])
    image, text = project_pictures(clip, pictures.features), clip.embed_texts([text for _, text in captions])
    found = hits(*retrieval_ranks(image, text, owner), owner)
    bounds = bootstrap_intervals(found, resamples=resamples, seed=seed)
    values: dict[str, Any] = {"images": len(image), "captions": len(text), "broken": len(pictures.broken)}
    for name, value in retrieval_metrics(image, text, owner).items():
        values[name] = value
        if name in bounds:
            values[f"{name}_low"], values[f"{name}_high"] = bounds[name]
    return values | fold_metrics(image, text, owner), found


def _captioned(place: str, split: str | None) -> tuple[str, list[CaptionedImage]]:
    """The split that was chosen, and its pictures."""
    from clip_lightning.data.captions import split_by_image
    from clip_lightning.data.formats import read_captions

    captions = read_captions(Path(place))
    own = {image.split for image in captions.images if image.split} if captions.has_official_splits else set()
    chosen = _chosen(place, split, own, may_draw=True)
    if chosen == "all":
        return chosen, list(captions.images)
    parts = split_by_image(captions, seed=0, val_share=0.1, test_share=0.1)  # as fit does by default
    if not parts[chosen]:
        raise UserError(f"{place} has no {chosen} split; give another --split")
    return chosen, parts[chosen]


def zero_shot(
    model: str,
    data: str,
    *,
    templates: str = "simple",
    names: Path | None = None,
    split: str | None = None,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Classify pictures by captions made of the names of the classes.

    Intervals (95 %) of top-1 and top-5 are Wilson's.

    Args:
        model: a bundle's folder, a hub id or wandb:NAME; several with commas between.
        data: a folder of class folders (or of train, val and test with such folders in them), or a CSV with
            the columns image and label; several with commas between.
        templates: simple, imagenet, none, or a file with one template a line, {} where the name goes.
        names: file of the names of classes, with synonyms: JSON from class to name or names, CSV (class, then
            its names), or lines in the order of the classes with commas between names.
        split: all, train, val or test; by default the data's own test split (val, if it has no test), and
            all where it has none.
        out: folder for the table as Markdown, CSV and JSON, accuracies of classes (classes.csv), confusions
            (confused.csv) and a picture of them (confusion.png).
        json: print one JSON object instead, of several models or data sets a list.
    """
    from clip_lightning.data.classes import class_names
    from clip_lightning.evaluation.prompts import read_templates

    _check(split, out)
    models, sentences = _listed(model), read_templates(templates)
    sets = {place: _classes(place) for place in _listed(data)}
    chosen = {place: _chosen(place, split, set(found.splits)) for place, found in sets.items()}
    called = {place: class_names(found.classes, names) for place, found in sets.items()}
    for entries in called.values():
        _tell_same_names(entries)
    rows = []
    for number, name in enumerate(models):
        clip = _load(name)
        for place, found in sets.items():
            about: Row = {"model": name, "data": place, "split": chosen[place], "templates": templates}
            about["template_count"] = len(sentences)
            values, result = _zero_shot(clip, found, called[place], sentences, about)
            rows.append(about | values)
            if out is not None:
                several = len(models) * len(sets) > 1
                folder = out / f"{number}-{_slug(name)}-on-{_slug(place)}" if several else out
                _write_classes(result, [entry[0] for entry in called[place]], f"{name} on {place}", folder)
            if not json:
                _print_classes(result, [entry[0] for entry in called[place]], f"{name} on {place}")
    _finish(rows, out, json)


def _zero_shot(
    clip: CLIP,
    data: ClassSet,
    names: Sequence[Sequence[str]],
    templates: Sequence[str],
    about: dict[str, Any],
) -> tuple[dict[str, Any], Classification]:
    import torch

    from clip_lightning.embedding import encode_pictures, project_pictures
    from clip_lightning.evaluation.zero_shot import classify, zero_shot_classifier

    rows = data.rows(about["split"])
    pictures = encode_pictures(
        clip, [data.paths[row] for row in rows], progress=f"{about['model']} on {about['data']}"
    )
    _tell_broken(pictures)
    labels = torch.tensor([data.labels[rows[at]] for at in pictures.rows])
    bias = None if clip.logit_bias is None else clip.logit_bias.item()
    result = classify(
        project_pictures(clip, pictures.features),
        zero_shot_classifier(clip, names, templates),
        labels,
        scale=clip.scale.item(),
        bias=bias,
    )
    values: Row = {"images": len(labels), "classes": len(names), "broken": len(pictures.broken)}
    values["probabilities"] = "softmax" if bias is None else "sigmoid"
    return values | result.metrics, result


def linear_probe(
    model: str,
    data: str,
    *,
    test_share: float = 0.4,
    shots: str = "1,2,4,8,16",
    seeds: int = 3,
    out: Path | None = None,
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
        out: folder for the table as Markdown, CSV and JSON.
        json: print one JSON object instead, of several models or data sets a list.
    """
    if not 0 < test_share < 1:
        raise UserError(f"--test_share {test_share:g}: expected a share above 0 and below 1")
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: expected 1 or more")
    counts = [int(word) for word in shots.split(",") if word.strip().isdigit() and int(word) > 0]
    if len(counts) != len(shots.split(",")):
        raise UserError(f"--shots {shots}: expected numbers of pictures with commas between, as 1,2,4")
    _check(None, out)
    models = _listed(model)
    sets = {place: _classes(place) for place in _listed(data)}
    rows = []
    for name in models:
        clip = _load(name)
        for place, found in sets.items():
            row = {"model": name, "data": place}
            rows.append(row | _linear_probe(clip, found, f"{name} on {place}", test_share, counts, seeds))
    _finish(rows, out, json)


def _linear_probe(
    clip: CLIP, data: ClassSet, title: str, test_share: float, shots: Sequence[int], seeds: int
) -> dict[str, Any]:
    import torch

    from clip_lightning.embedding import encode_pictures
    from clip_lightning.evaluation.linear_probe import few_shot, held_out, linear_probe

    pictures = encode_pictures(clip, data.paths, progress=title)
    _tell_broken(pictures)
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


# What the commands share ----------------------------------------------------------------------------------


def _listed(text: str) -> list[str]:
    """The places with commas between, unless there is something under the whole name."""
    places = [text] if Path(text).exists() else [word.strip() for word in text.split(",") if word.strip()]
    if not places:
        raise UserError(f"{text!r} names no model or data; give a folder, or several with commas between")
    return list(dict.fromkeys(places))


def _load(name: str) -> CLIP:
    from clip_lightning.embedding import best_device
    from clip_lightning.model import CLIP

    return CLIP.from_pretrained(name).to(best_device())


def _classes(place: str) -> ClassSet:
    from clip_lightning.data.classes import read_classes

    if place.partition(":")[0] in ("torchvision", "hub", "hf") and not Path(place).exists():
        raise UserError(
            f"{place}: data sets are not fetched by name; give a folder of class folders, or a CSV with the "
            "columns image and label"
        )
    found = read_classes(Path(place))
    for name, reason in list(found.left_out.items())[:5]:
        _say(f"left out {name}: {reason}")
    if len(found.left_out) > 5:
        _say(f"left out {len(found.left_out)} in all")
    return found


def _check(split: str | None, out: Path | None) -> None:
    if split is not None and split not in SPLITS:
        raise UserError(f"--split {split}: expected {', '.join(SPLITS)}")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")


def _chosen(place: str, split: str | None, own: Iterable[str | None], *, may_draw: bool = False) -> str:
    named = {name for name in own if name}
    if split is None:
        return next((name for name in ("test", "val") if name in named), "all")
    if split != "all" and split not in named and (named or not may_draw):
        has = f"its splits are {', '.join(sorted(named))}" if named else "it has no splits of its own"
        raise UserError(f"--split {split}: {place} has no such split, {has}; give one it has, or all")
    return split


def _tell_broken(pictures: Pictures) -> None:
    if not pictures.rows:
        path, reason = next(iter(pictures.broken.items()), ("the split", "it holds no pictures"))
        raise UserError(f"none of the pictures can be read; {path}: {reason}; give other data")
    for path, reason in list(pictures.broken.items())[:3]:
        _say(f"skipped {path}: {reason}")
    if len(pictures.broken) > 3:
        _say(f"skipped {len(pictures.broken)} pictures in all")


def _tell_same_names(entries: Sequence[Sequence[str]]) -> None:
    joined = [", ".join(entry) for entry in entries]
    if same := sorted({name for name in joined if joined.count(name) > 1}):
        _say(f"several classes are called {same[0]}: no model can tell them apart; name them by --names")


def _print_classes(result: Classification, names: Sequence[str], title: str) -> None:
    shares = [(right / asked, names[i]) for i, (right, asked) in enumerate(result.per_class()) if asked]
    worst = ", ".join(f"{name} {100 * share:.0f} %" for share, name in sorted(shares)[:5])
    pairs = ", ".join(
        f"{names[true]} for {names[taken]} ({count})" for true, taken, count in result.confused(5)
    )
    print(f"{title}\n  worst classes: {worst}\n  most often taken for another: {pairs or 'none'}")


def _write_classes(result: Classification, names: Sequence[str], title: str, folder: Path) -> None:
    from clip_lightning.evaluation.confusion import plot_confusion
    from clip_lightning.evaluation.tables import csv_text
    from clip_lightning.files import write_atomically

    classes = [
        (names[i], asked, right, f"{100 * right / asked:.2f}" if asked else "")
        for i, (right, asked) in enumerate(result.per_class())
    ]
    pairs = [(names[true], names[taken], count) for true, taken, count in result.confused(len(names) ** 2)]
    texts = {
        "classes.csv": csv_text(("class", "images", "right", "accuracy"), classes),
        "confused.csv": csv_text(("class", "taken_for", "images"), pairs),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())
    write_atomically(folder / "confusion.png", plot_confusion(result.confusion, names, title))


def _slug(place: str) -> str:
    return "".join(mark if mark.isalnum() else "-" for mark in place).strip("-")[-40:]


def _finish(rows: Sequence[Row], out: Path | None, json: bool) -> None:
    from clip_lightning.evaluation.tables import print_results, write_results

    if out is not None:
        write_results(rows, out)
        _say(f"results: {out}")
    print_results(rows, as_json=json)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
