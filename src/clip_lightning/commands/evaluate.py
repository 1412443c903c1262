"""`clip-lightning evaluate retrieval|compositional|zero-shot|linear-probe` measures models on data."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import OpenUnitInterval, PositiveInt
from tqdm import tqdm

from clip_lightning.arguments import check_folder, run_functions
from clip_lightning.data.captions import CaptionedImage, Splits, split_by_image
from clip_lightning.data.compositional import read_choices
from clip_lightning.data.readers import RECOGNIZED
from clip_lightning.errors import UserError
from clip_lightning.evaluation.prompts import read_templates
from clip_lightning.terminal import note, printable

if TYPE_CHECKING:  # not with postponed annotations: to resolve those, jsonargparse would import these
    from clip_lightning.data.classes import ClassSet
    from clip_lightning.model.clip import CLIP
    from clip_lightning.model.encode import Encoded
    from clip_lightning.reports.tables import ClassReport, Row

Split = Literal["all", "train", "val", "test"]
BENCHMARKS, CAPTIONS = ("coco", "flickr30k", "flickr8k"), 5  # some images of COCO have more than five


def retrieval(
    model: str,
    data: str,
    *,
    split: Split | None = None,
    dims: PositiveInt | None = None,
    out: Path | None = None,
    wandb: str | None = None,
    json: bool = False,
) -> None:
    """Retrieve images by their captions, and captions by their images, among all images of a split.

    R@k is the percentage of queries with a right answer among the first k results (hit@k); for an image, each
    of its captions is right. fold1000_... are means over folds of 1,000 images, which is an easier task. The
    95 % intervals take into account that the captions of an image are not independent. Every model after the
    first is also compared with the first, image by image.

    Args:
        model: a bundle, a run folder, a checkpoint, a Hugging Face hub id, or
            wandb:ENTITY/PROJECT/NAME:ALIAS; or several, separated by commas.
        data: captioned images, as for `fit --data.root`; coco:FOLDER, flickr30k:FOLDER or flickr8k:FOLDER for
            the test images of Karpathy's dataset_NAME.json and the first five captions of each, as in papers;
            or several data sets, separated by commas.
        split: all, train, val or test. By default the data's own test split (val if there is no test), or all
            if the data has no splits. For such data, val and test are the splits that `fit` draws by default.
        dims: use only the first numbers of each embedding, normalized again, as a short vector of a model
            trained with --model.matryoshka; by default all.
        out: folder for the table as Markdown, CSV and JSON.
        wandb: W&B project (or ENTITY/PROJECT) to log to, with one run per model and data set.
        json: print one JSON object instead, or a list for several models or data sets.
    """
    import torch

    from clip_lightning.evaluation.intervals import hits, paired_differences, recall_intervals
    from clip_lightning.evaluation.retrieval import fold_metrics, retrieval_metrics, retrieval_ranks

    models = _listed(model)
    check_folder(out, data)
    sets = {place: _captioned(place, split) for place in _listed(data)}
    rows: list[Row] = []
    first: dict[str, Any] = {}
    paths = {place: [image.path for image in images] for place, (_, images) in sets.items()}
    for clip, row, encoded in _encoded(models, paths, dims=dims):
        row["split"], images = sets[row["data"]]
        captions = [(at, text) for at, i in enumerate(encoded.rows) for text in images[i].captions]
        owner = torch.tensor([at for at, _ in captions])
        embedded = encoded.features, clip.embed_texts([text for _, text in captions]), owner
        answers = hits(*retrieval_ranks(*embedded), owner)
        row |= {"images": len(encoded.rows), "captions": len(captions), "broken": len(encoded.broken)}
        row |= retrieval_metrics(*embedded)
        for metric, (low, high) in recall_intervals(answers).items():
            row |= {f"{metric}_low": low, f"{metric}_high": high}
        row |= fold_metrics(*embedded)
        name, reference = first.setdefault(row["data"], (row["model"], answers))
        if reference is not answers:
            row["compared_with"] = name
            for metric, values in paired_differences(answers, reference).items():
                names = (f"{metric}_difference{end}" for end in ("", "_low", "_high", "_p"))
                row |= zip(names, values, strict=True)
        rows.append(row)
    _finish(rows, out, json, wandb)


def compositional(
    model: str,
    data: str,
    *,
    images: Path | None = None,
    out: Path | None = None,
    wandb: str | None = None,
    json: bool = False,
) -> None:
    """Choose between captions that differ in a word or in their order.

    SugarCrepe has one image and two captions; the result is the accuracy, in all, for each file, and their
    mean. Winoground has two images and two captions; the results are the text, image and group scores, in all
    and by tag. The 95 % intervals are Wilson intervals.

    Args:
        model: a bundle, a run folder, a checkpoint, a Hugging Face hub id, or
            wandb:ENTITY/PROJECT/NAME:ALIAS; or several, separated by commas.
        data: a folder with files of SugarCrepe or Winoground, or a file; or several, separated by commas.
        images: folder with the images, such as COCO's val2017, if they are not next to the files.
        out: folder for the table as Markdown, CSV and JSON.
        wandb: W&B project (or ENTITY/PROJECT) to log to, with one run per model and data set.
        json: print one JSON object instead, or a list for several models or data sets.
    """
    import torch

    from clip_lightning.evaluation.compositional import compositional_metrics

    models = _listed(model)
    check_folder(out, data)
    sets = {place: read_choices(Path(place), images) for place in _listed(data)}
    paths: dict[str, list[Path]] = {}
    for place, (choices, missing) in sets.items():
        _warn_of_each("left out", missing)
        paths[place] = list(dict.fromkeys(path for choice in choices for path in choice.images))
    rows: list[Row] = []
    for clip, row, encoded in _encoded(models, paths):
        choices, missing = sets[row["data"]]
        at = {paths[row["data"]][i]: position for position, i in enumerate(encoded.rows)}
        usable = [choice for choice in choices if at.keys() >= {*choice.images}]
        row |= {"entries": len(usable), "missing": len(missing), "broken": len(encoded.broken)}
        for number in (1, 2):
            if part := [choice for choice in usable if len(choice.images) == number]:
                places = torch.tensor([[at[path] for path in choice.images] for choice in part])
                text = clip.embed_texts([caption for choice in part for caption in choice.captions])
                categories = [choice.category for choice in part]
                row |= compositional_metrics(
                    encoded.features[places], text.view(len(part), 2, -1), categories
                )
        rows.append(row)
    _finish(rows, out, json, wandb)


def zero_shot(
    model: str,
    data: str,
    *,
    templates: str = "simple",
    names: Path | None = None,
    split: Split | None = None,
    out: Path | None = None,
    wandb: str | None = None,
    json: bool = False,
) -> None:
    """Classify images by comparing them with captions made from the class names.

    The 95 % intervals of the top-1 and top-5 accuracy are Wilson intervals.

    Args:
        model: a bundle, a run folder, a checkpoint, a Hugging Face hub id, or
            wandb:ENTITY/PROJECT/NAME:ALIAS; or several, separated by commas.
        data: a folder with one folder per class (or with train, val and test folders of such folders), a CSV
            file with the columns image and label, or a Hugging Face data set such as hf:uoft-cs/cifar10; or
            several, separated by commas.
        templates: simple, imagenet, none, or a file with one template per line in which {} stands for the
            class name.
        names: file with the names of the classes, including synonyms: a JSON object from class to name or
            names, or one line per class, in order, with names separated by commas.
        split: all, train, val or test. By default the data's own test split (val if there is no test), or all
            if the data has no splits.
        out: folder for the table as Markdown, CSV and JSON, and for accuracies per class (classes.csv),
            confusions (confused.csv, confusion.png) and calibration (calibration.csv, reliability.png).
        wandb: W&B project (or ENTITY/PROJECT) to log to, with one run per model and data set and tables of
            classes and confusions.
        json: print one JSON object instead, or a list for several models or data sets.
    """
    import torch

    from clip_lightning.data.classes import class_names
    from clip_lightning.evaluation.zero_shot import classify
    from clip_lightning.reports.tables import ClassReport

    models = _listed(model)
    check_folder(out, data)
    sentences = read_templates(templates)
    sets = _class_sets(data)
    chosen = {place: _choose_split(place, split, class_set.splits) for place, class_set in sets.items()}
    named = {place: class_names(class_set.classes, names) for place, class_set in sets.items()}
    for entries in named.values():
        name, count = Counter(map(", ".join, entries)).most_common(1)[0]
        if count > 1:
            note(f"several classes have the name {name}; give them different names with --names")
    members = {place: class_set.rows(chosen[place]) for place, class_set in sets.items()}
    images = {place: [sets[place].images[member] for member in members[place]] for place in sets}
    rows: list[Row] = []
    reports: list[ClassReport] = []
    for clip, row, encoded in _encoded(models, images):
        place = row["data"]
        result = classify(
            encoded.features,
            clip.zero_shot_classifier(named[place], sentences),
            torch.tensor([sets[place].labels[members[place][at]] for at in encoded.rows]),
            scale=clip.scale.item(),
            bias=clip.bias,
        )
        row |= {"split": chosen[place], "templates": templates, "template_count": len(sentences)}
        row |= {"images": len(encoded.rows), "classes": len(named[place]), "broken": len(encoded.broken)}
        row["probabilities"] = "softmax" if clip.bias is None else "sigmoid"
        report = ClassReport(f"{row['model']} on {place}", [entry[0] for entry in named[place]], result)
        if out is not None:
            slugs = (re.sub(r"[\W_]", "-", name).strip("-")[-40:] for name in (row["model"], place))
            report.write(out / f"{len(rows)}-{'-on-'.join(slugs)}" if len(models) * len(sets) > 1 else out)
        if not json:
            print(printable(report.summary()))
        rows.append(row | result.metrics)
        reports.append(report)
    _finish(rows, out, json, wandb, reports)


def linear_probe(
    model: str,
    data: str,
    *,
    test_share: OpenUnitInterval = 0.4,
    shots: str = "1,2,4,8,16",
    seeds: PositiveInt = 3,
    out: Path | None = None,
    wandb: str | None = None,
    json: bool = False,
) -> None:
    """Train a linear classifier on the features of the frozen image tower.

    It is trained on all training images, and few-shot on k images per class. The strength of the
    regularization is chosen on a fifth of the training images. The 95 % interval is a Wilson interval.

    Args:
        model: a bundle, a run folder, a checkpoint, a Hugging Face hub id, or
            wandb:ENTITY/PROJECT/NAME:ALIAS; or several, separated by commas.
        data: images with classes, as for zero-shot; or several data sets, separated by commas.
        test_share: fraction of each class to hold out for testing if the data has no splits, above 0 and
            below 1.
        shots: numbers of training images per class, separated by commas; a number is skipped if a class has
            fewer images.
        seeds: number of random draws of these images, over which mean and standard deviation are computed.
        out: folder for the table as Markdown, CSV and JSON.
        wandb: W&B project (or ENTITY/PROJECT) to log to, with one run per model and data set.
        json: print one JSON object instead, or a list for several models or data sets.
    """
    import torch

    from clip_lightning.evaluation import linear_probe as probe

    counts = [int(word) for word in shots.split(",") if word.strip().isdecimal() and int(word) > 0]
    if len(counts) != len(shots.split(",")):
        raise UserError(f"--shots {shots}: expected numbers of images separated by commas, such as 1,2,4")
    models = _listed(model)
    check_folder(out, data)
    sets = _class_sets(data)
    rows = []
    images = {place: class_set.images for place, class_set in sets.items()}
    for _, row, encoded in _encoded(models, images, projects=False):
        class_set = sets[row["data"]]
        labels = torch.tensor([class_set.labels[at] for at in encoded.rows])
        own = [class_set.splits[at] for at in encoded.rows]
        part = next((name for name in ("test", "val") if name in own), None)
        if "train" in own and part:
            train, test = (torch.tensor([name == wanted for name in own]) for wanted in ("train", part))
        else:
            test = probe.held_out(labels, test_share)
            train = ~test
        if not train.any() or not test.any():
            raise UserError(f"{row['data']} has no images to train or to test on; give more images per class")
        parts = [(encoded.features[rows], labels[rows]) for rows in (train, test)]
        row |= {"classes": len(class_set.classes), "broken": len(encoded.broken)}
        row |= {"train_images": int(train.sum()), "test_images": int(test.sum())}
        note(f"training linear classifiers on {len(encoded.rows):,} images")
        row |= probe.linear_probe(*parts)
        for k in tqdm(counts, "images per class"):
            row |= probe.few_shot(*parts, shots=[k], seeds=seeds)
        rows.append(row)
    _finish(rows, out, json, wandb)


def _encoded(
    models: Sequence[str], sets: Mapping[str, Sequence[Any]], projects: bool = True, dims: int | None = None
) -> "Iterator[tuple[CLIP, Row, Encoded]]":
    """Yield each model, the beginning of its row for each data set, and its features of the images."""
    from clip_lightning.model.clip import CLIP
    from clip_lightning.model.encode import Encoded, best_device, encode_images

    for name in models:
        clip = CLIP.from_pretrained(name).to(best_device())
        clip = clip.with_dims(dims or clip.dims)
        project = clip.project_image if projects else None
        for place, images in sets.items():
            parts = encode_images(clip.image_tower, images, project=project, progress=f"{name} on {place}")
            encoded = Encoded.join(parts)
            broken = {path: str(reason) for _, path, reason in encoded.broken}
            if not encoded.rows:
                path, reason = next(iter(broken.items()), ("the split", "it has no images"))
                raise UserError(f"no image can be read ({path}: {reason}); give other data")
            _warn_of_each("skipped", broken)
            yield clip, {"model": name, "data": place} | ({"dims": dims} if dims else {}), encoded


def _captioned(place: str, split: str | None) -> tuple[str, list[CaptionedImage]]:
    """Return the split that was chosen, and its images."""
    from clip_lightning.data.sources import find_source, read_source

    name, _, folder = place.partition(":")
    most = CAPTIONS if folder and name in BENCHMARKS else None
    place = f"{folder}/dataset_{name}.json" if most else place
    source = find_source(place)
    source.fetch()
    captions = read_source(source, RECOGNIZED)
    _warn_of_each("left out", captions.left_out)
    own = {image.split for image in captions.images if image.split} if captions.has_official_splits else set()
    drawn = {"train", "val", "test"} if split else set()  # as `fit` draws them by default
    chosen = _choose_split(place, split, own or drawn)
    images = split_by_image(captions, Splits())[chosen] if chosen != "all" else captions.images
    return chosen, [replace(image, captions=image.captions[:most]) for image in images]


def _class_sets(places: str) -> dict[str, "ClassSet"]:
    from clip_lightning.data.classes import find_classes

    sets = {place: find_classes(place) for place in _listed(places)}
    for class_set in sets.values():
        _warn_of_each("left out", class_set.left_out)
    return sets


def _listed(text: str) -> list[str]:
    """Divide the text at commas, unless it is the name of a file or folder."""
    places = [text] if Path(text).exists() else [part.strip() for part in text.split(",") if part.strip()]
    if not places:
        raise UserError(f"{text!r} has no model or data; give a folder, or several separated by commas")
    return list(dict.fromkeys(places))


def _choose_split(place: str, split: str | None, own: Iterable[str | None]) -> str:
    named = {name for name in own if name}
    if split is None:
        return next((name for name in ("test", "val") if name in named), "all")
    if split not in ("all", *named):
        expected = ", ".join(["all", *sorted(named)])
        raise UserError(f"--split {split}: {place} has no such split; expected {expected}")
    return split


def _warn_of_each(what: str, reasons: Mapping[str, str]) -> None:
    for name, reason in list(reasons.items())[:5]:
        note(f"{what} {name}: {reason}")
    if len(reasons) > 5:
        note(f"{what} {len(reasons)} in total")


def _finish(
    rows: "list[Row]", out: Path | None, json: bool, wandb: str | None, reports: "Sequence[ClassReport]" = ()
) -> None:
    """Print, write and track the rows, each with its class report if there is one."""
    from clip_lightning.reports.tables import print_results, write_results

    print_results(rows, as_json=json)  # before the disk or W&B may fail
    if out is not None:
        write_results(rows, out)
        note(f"results: {out}")
    if wandb is not None:
        from clip_lightning.tracking.panel import track_evaluation

        for row, report in zip_longest(rows, reports):
            note(f"W&B run: {track_evaluation(wandb, row, out or Path('runs'), report)}")


ON_CLASSES = {"zero-shot": zero_shot, "linear-probe": linear_probe}
run = partial(run_functions, {"retrieval": retrieval, "compositional": compositional, **ON_CLASSES})
