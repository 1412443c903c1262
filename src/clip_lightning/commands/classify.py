"""`clip-lightning classify MODEL IMAGE... --labels a,b,c` chooses the label that fits each image."""

from __future__ import annotations

import os
import re
from pathlib import Path

from clip_lightning.arguments import Parser, print_result
from clip_lightning.commands import MODEL
from clip_lightning.errors import UserError, as_user_error
from clip_lightning.terminal import note, one_line


def run(args: list[str]) -> None:
    """Run `classify` with the arguments of the command line."""
    parser = Parser.of_function("classify", classify, skip={"model", "images"})
    parser.add_argument("model", type=str, help=MODEL)
    parser.add_argument("images", type=str, nargs="+", metavar="IMAGE", help="image files")
    classify(**vars(parser.parse_args(args[1:])))


def classify(
    model: str, images: list[str], *, labels: str, templates: str = "simple", json: bool = False
) -> None:
    """Print how well each label fits each image.

    Models trained with a softmax (InfoNCE) choose one of the labels. Models with a bias (SigLIP) score each
    label by itself. The output states which kind of model it is.

    Args:
        labels: label names separated by commas, or a file with one name per line.
        templates: simple, imagenet, none, or a file with one template per line in which {} stands for the
            label.
        json: print one JSON object instead, with probabilities from 0 to 1.
    """
    from clip_lightning.evaluation.prompts import read_templates

    names, sentences = _read_labels(labels), read_templates(templates)
    if missing := [name for name in images if not Path(name).is_file()]:
        problem = "is a folder" if Path(missing[0]).is_dir() else "does not exist"
        raise UserError(f"{missing[0]} {problem}; give image files after the model")
    from clip_lightning.model.clip import CLIP, probabilities
    from clip_lightning.model.encode import Encoded, best_device, encode_images

    clip = CLIP.from_pretrained(model).to(best_device())
    encoded = Encoded.join(encode_images(clip.image_tower, images, project=clip.project_image))
    broken = {path: str(reason) for _, path, reason in encoded.broken}
    for path, reason in broken.items():
        note(f"skipped {path}: {reason}")
    if not encoded.rows:
        raise UserError(f"none of the {len(images)} images can be read; give other images")
    article = r"^$" if templates == "none" else r"(?i)^(?:an?|the) (?=.)"  # avoid "a photo of a a dog"
    bare = [re.sub(article, "", name) for name in names]
    similarity = encoded.features @ clip.zero_shot_classifier(bare, sentences).T
    scores = probabilities(similarity, clip.scale.item(), clip.bias)
    results, lines = [], []
    for position, row in zip(encoded.rows, scores, strict=True):
        ranked = sorted(zip(names, row.tolist(), strict=True), key=lambda entry: -entry[1])
        results.append({"image": images[position], "label": ranked[0][0], "probabilities": dict(ranked)})
        lines.append(one_line(images[position]))
        lines += [f"  {100 * value:5.1f} %  {one_line(label)}" for label, value in ranked[:10]]
    if clip.bias is None:
        reading = "softmax"
        lines.append("These probabilities assume that one label is right, so they add up to 100 %.")
    else:
        reading = "sigmoid"
        lines.append("Each probability is for one label alone (as in SigLIP), so their sum may not be 100 %.")
    print_result({"reading": reading, "results": results, "broken": broken}, "\n".join(lines), json)


def _read_labels(given: str) -> list[str]:
    labels = given.split(",")
    if os.path.isfile(given):  # Path.is_file raises if the list is longer than a file name may be
        with as_user_error(f"--labels {given} cannot be read as text", "save it as UTF-8"):
            labels = Path(given).read_text(encoding="utf-8-sig").splitlines()
    elif len(labels) == 1 and (os.path.isdir(given) or re.search(r"/|\.\w{2,4}$", given)):
        raise UserError(f"--labels {given}: there is no such file; give it, or labels separated by commas")
    names = list(dict.fromkeys(" ".join(label.split()) for label in labels if label.strip()))
    if not names:
        raise UserError(f"--labels {given!r} has no label; give labels separated by commas, or a file")
    return names
