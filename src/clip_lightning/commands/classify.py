"""`clip-lightning classify MODEL IMAGE... --labels a,b,c`: which of the labels fits an image."""

from __future__ import annotations

import inspect
import json as json_format
import re
import sys
from pathlib import Path
from typing import Any

from clip_lightning.arguments import Parser, with_json_value
from clip_lightning.errors import UserError
from clip_lightning.terminal import one_line

_READINGS = {
    "softmax": "probabilities of the labels, one of which is assumed to be right: they add up to 100 %",
    "sigmoid": "the probability of each label by itself, as SigLIP models are trained: they need not add up",
}


def run(args: list[str]) -> None:
    """Run `classify` with the arguments of the command line."""
    about = (inspect.getdoc(classify) or "").partition("\n\nArgs")[0]
    parser = Parser(prog="clip-lightning classify", description=about)
    parser.add_argument("model", type=str, help="a bundle's folder, a hub id or wandb:NAME")
    parser.add_argument("images", type=str, nargs="+", metavar="IMAGE", help="image files")
    parser.add_function_arguments(classify, as_group=False, skip={"model", "images"})
    classify(**vars(parser.parse_args(with_json_value(args[1:]))))


def classify(
    model: str, images: list[str], *, labels: str, templates: str = "simple", json: bool = False
) -> None:
    """Print how well each label fits each image.

    Models trained with a softmax (InfoNCE) choose one of the labels; models with a bias (SigLIP) judge each
    label by itself. The output says which it is.

    Args:
        model: a bundle's folder, a hub id or wandb:NAME.
        images: image files.
        labels: names with commas between, or a file with one per line.
        templates: simple, imagenet, none, or a file with one template per line, {} where the name goes.
        json: print one JSON object instead, with probabilities from 0 to 1.
    """
    from clip_lightning.evaluation.prompts import read_templates

    names, sentences = _read_labels(labels), read_templates(templates)
    if missing := [name for name in images if not Path(name).is_file()]:
        raise UserError(f"there is no file {missing[0]}; give image files after the model")
    from clip_lightning.evaluation.zero_shot import probabilities, zero_shot_classifier
    from clip_lightning.model.clip import CLIP
    from clip_lightning.model.encode import best_device, encode_pictures, project_pictures

    clip = CLIP.from_pretrained(model).to(best_device())
    encoded = encode_pictures(clip, [Path(name) for name in images])
    for path, reason in encoded.broken.items():
        print(one_line(f"skipped {path}: {reason}"), file=sys.stderr)
    if not encoded.rows:
        raise UserError(f"none of the {len(images)} images can be read; give others")
    bare = names
    if templates != "none":  # or it would read "a photo of a a dog"
        bare = [re.sub(r"^(?:an?|the) (?=.)", "", name, flags=re.IGNORECASE) for name in names]
    similarity = project_pictures(clip, encoded.features) @ zero_shot_classifier(clip, bare, sentences).T
    results: list[dict[str, Any]] = []
    for at, row in zip(encoded.rows, probabilities(similarity, clip.scale.item(), clip.bias), strict=True):
        ranked = sorted(zip(names, row.tolist(), strict=True), key=lambda entry: -entry[1])
        results.append({"image": images[at], "label": ranked[0][0], "probabilities": dict(ranked)})
    reading = "softmax" if clip.bias is None else "sigmoid"
    if json:
        record = {"reading": reading, "results": results, "broken": encoded.broken}
        print(json_format.dumps(record, ensure_ascii=False))
        return
    for result in results:
        print(one_line(result["image"]))
        for label, probability in list(result["probabilities"].items())[:10]:
            print(f"  {100 * probability:5.1f} %  {one_line(label)}")
    print(_READINGS[reading])


def _read_labels(given: str) -> list[str]:
    file = Path(given)
    try:
        labels = file.read_text(encoding="utf-8-sig").splitlines() if file.is_file() else given.split(",")
    except UnicodeDecodeError as error:
        raise UserError(f"--labels {given} is not UTF-8; save it as UTF-8") from error
    except OSError:  # the list is longer than the name of a file may be
        labels = given.split(",")
    names = list(dict.fromkeys(" ".join(label.split()) for label in labels if label.strip()))
    if not names:
        raise UserError(f"--labels {given!r} has no label; give labels with commas between, or a file")
    return names
