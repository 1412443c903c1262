"""`clip-lightning classify MODEL IMAGE... --labels a,b,c`: which of the labels fits a picture."""

from __future__ import annotations

import inspect
import json as json_format
import sys
from pathlib import Path
from typing import Any

from clip_lightning.arguments import Parser
from clip_lightning.errors import UserError
from clip_lightning.terminal import one_line

_READINGS = {
    "softmax": "probabilities of the labels, one of which is taken to be right: they add up to 100 %",
    "sigmoid": "probability of each label by itself, as SigLIP models were trained: they need not add up",
}


def run(args: list[str]) -> None:
    """Run `classify` with the words of the command line."""
    about = (inspect.getdoc(classify) or "").partition("\n\nArgs")[0]
    parser = Parser(prog="clip-lightning classify", description=about)
    parser.add_argument("model", type=str, help="a bundle's folder, a hub id or wandb:NAME")
    parser.add_argument("images", type=str, nargs="+", metavar="IMAGE", help="files of pictures")
    parser.add_function_arguments(classify, as_group=False, skip={"model", "images"})
    words = ["--json=true" if word == "--json" else word for word in args[1:]]
    classify(**vars(parser.parse_args(words)))


def classify(
    model: str, images: str | list[str], *, labels: str, templates: str = "simple", json: bool = False
) -> None:
    """Say how well each label fits each picture.

    Models trained with a softmax (InfoNCE) choose one of the labels; models with a bias (SigLIP) judge each
    label by itself. The output says which it is.

    Args:
        model: a bundle's folder, a hub id or wandb:NAME.
        images: files of pictures.
        labels: names with commas between, or a file with one a line.
        templates: simple, imagenet, none, or a file with one template a line, {} where the name goes.
        json: print one JSON object instead, with probabilities from 0 to 1.
    """
    names, sentences = _labels(labels), _templates(templates)
    images = [images] if isinstance(images, str) else images
    if missing := [name for name in images if not Path(name).is_file()]:
        raise UserError(f"there is no file {missing[0]}; give files of pictures after the model")
    from clip_lightning.evaluation.zero_shot import probabilities, zero_shot_classifier
    from clip_lightning.model.clip import CLIP
    from clip_lightning.model.encode import best_device, encode_pictures, project_pictures

    clip = CLIP.from_pretrained(model).to(best_device())
    pictures = encode_pictures(clip, [Path(name) for name in images])
    for path, reason in pictures.broken.items():
        print(one_line(f"skipped {path}: {reason}"), file=sys.stderr)
    if not pictures.rows:
        raise UserError(f"none of the {len(images)} pictures can be read; give others")
    similarity = project_pictures(clip, pictures.features) @ zero_shot_classifier(clip, names, sentences).T
    found = probabilities(similarity, clip.scale.item(), clip.bias)
    results = [
        {"image": images[at], "label": names[int(row.argmax())], "probabilities": _by_label(names, row)}
        for at, row in zip(pictures.rows, found, strict=True)
    ]
    _show(results, "softmax" if clip.bias is None else "sigmoid", pictures.broken, json)


def _templates(name: str) -> tuple[str, ...]:
    from clip_lightning.evaluation.prompts import read_templates

    return read_templates(name)


def _labels(given: str) -> list[str]:
    file = Path(given)
    try:
        words = file.read_text(encoding="utf-8-sig").splitlines() if file.is_file() else given.split(",")
    except UnicodeDecodeError as error:
        raise UserError(f"--labels {given} is not UTF-8; save it as UTF-8") from error
    except OSError:  # a list that is longer than a file's name may be
        words = given.split(",")
    names = list(dict.fromkeys(" ".join(word.split()) for word in words if word.strip()))
    if not names:
        raise UserError(
            f"--labels {given!r} names nothing; give labels with commas between, or a file of them"
        )
    return names


def _by_label(names: list[str], row: Any) -> dict[str, float]:
    """The likeliest first."""
    return dict(sorted(zip(names, row.tolist(), strict=True), key=lambda entry: -entry[1]))


def _show(results: list[dict[str, Any]], reading: str, broken: dict[str, str], json: bool) -> None:
    if json:
        record = {"reading": reading, "results": results, "broken": broken}
        print(json_format.dumps(record, ensure_ascii=False))
        return
    for result in results:
        print(one_line(result["image"]))
        for label, share in list(result["probabilities"].items())[:10]:
            print(f"  {100 * share:5.1f} %  {one_line(label)}")
    print(_READINGS[reading])
