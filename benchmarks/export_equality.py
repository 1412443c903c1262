"""Whether exported models are the model: embeddings, retrieval and zero-shot figures of each, side by side.

    python benchmarks/export_equality.py BUNDLE --root FLICKR8K [--classes CALTECH101] [--pictures 200]

Exports the bundle to a temporary folder in every format, embeds the same real photographs and captions with
each and prints one JSON object: the largest absolute differences to the bundle, and R@k. With `--classes`,
our zero-shot accuracy beside that of open_clip's own zero-shot code on the exported model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import open_clip
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from clip_lightning.commands.export import run as export
from clip_lightning.data.classes import class_names, find_classes
from clip_lightning.data.formats import read_captions
from clip_lightning.data.images import decode_image
from clip_lightning.evaluation.prompts import TEMPLATES
from clip_lightning.evaluation.retrieval import retrieval_metrics
from clip_lightning.model.clip import CLIP

BATCH = 50
Embed = Callable[[list[Any]], Tensor]


def in_batches(embed: Embed, items: list[Any]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([embed(items[at : at + BATCH]) for at in range(0, len(items), BATCH)])


class Ours:
    def __init__(self, folder: Path) -> None:
        self.clip = CLIP.from_pretrained(folder)

    def pictures(self, pixels: list[Tensor]) -> Tensor:
        return self.clip.encode_image(torch.stack(pixels))

    def texts(self, texts: list[str]) -> Tensor:
        return self.clip.embed_texts(texts)


class Onnx:
    def __init__(self, folder: Path) -> None:
        self.image = onnxruntime.InferenceSession(folder / "image.onnx")
        self.text = onnxruntime.InferenceSession(folder / "text.onnx")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def pictures(self, pixels: list[Tensor]) -> Tensor:
        return torch.from_numpy(self.image.run(None, {"pixel_values": torch.stack(pixels).numpy()})[0])

    def texts(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer.encode_batch(texts)
        ids, mask = ([getattr(each, name) for each in tokens] for name in ("ids", "attention_mask"))
        inputs = {"input_ids": np.array(ids), "attention_mask": np.array(mask)}
        return torch.from_numpy(self.text.run(None, inputs)[0])


class OpenClip:
    def __init__(self, folder: Path) -> None:
        name = f"local-dir:{folder}"
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(name)
        self.model.eval()
        self.tokenize = open_clip.get_tokenizer(name)
        normalise = self.preprocess.transforms[-1]
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (normalise.mean, normalise.std))

    def pictures(self, pixels: list[Tensor]) -> Tensor:
        return self.model.encode_image((torch.stack(pixels) / 255 - self.mean) / self.std, normalize=True)

    def files(self, paths: list[Path]) -> Tensor:
        """With open_clip's own preprocessing, too."""
        opened = [self.preprocess(Image.open(path).convert("RGB")) for path in paths]
        return self.model.encode_image(torch.stack(opened), normalize=True)

    def texts(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenize(texts), normalize=True)


def exported(bundle: Path, folder: Path) -> dict[str, Any]:
    """Every form of the model, by name, the bundle first."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the figures
        for kind in ("bundle", "onnx", "open_clip"):
            export(["export", str(bundle), "--to", kind, "--out", str(folder / kind)])
    return {
        "bundle": Ours(bundle),
        "bundle written again": Ours(folder / "bundle"),
        "onnx": Onnx(folder / "onnx"),
        "open_clip": OpenClip(folder / "open_clip"),
    }


def retrieval(models: dict[str, Any], root: Path, split: str, count: int) -> dict[str, Any]:
    """Differences and R@k on pictures of a split with their captions.

    As many captions as pictures are compared, the first of each; all of them are searched.
    """
    chosen = [image for image in read_captions(root).images if image.split == split][:count]
    paths = [image.path for image in chosen]
    captions = [text for image in chosen for text in image.captions]
    owner = torch.arange(len(chosen)).repeat_interleave(
        torch.tensor([len(image.captions) for image in chosen])
    )
    transform = models["bundle"].clip.transform
    pixels = [transform(decode_image(path)) for path in paths]
    embedded = {
        name: (in_batches(model.pictures, pixels), in_batches(model.texts, captions))
        for name, model in models.items()
    }
    own = in_batches(models["open_clip"].files, paths)
    embedded["open_clip, its own preprocessing"] = own, embedded["open_clip"][1]
    image, text = embedded["bundle"]
    first = [i for i in range(len(captions)) if i == 0 or owner[i] != owner[i - 1]]
    found = {}
    for name, (images, texts) in embedded.items():
        metrics = retrieval_metrics(images, texts, owner)
        found[name] = {
            "max_difference_pictures": (images - image).abs().max().item(),
            "max_difference_captions": (texts - text)[first].abs().max().item(),
            "max_difference_all_captions": (texts - text).abs().max().item(),
            **{key: round(value, 2) for key, value in metrics.items() if "R@" in key},
        }
    return {"pictures": len(paths), "captions": len(captions), "models": found}


def zero_shot(models: dict[str, Any], root: Path, kinds: list[str]) -> dict[str, Any]:
    """Top-1 in percent on the same pixels with the same captions: our code, and open_clip's on its model."""
    data = find_classes(root)
    names = [entry[0] for entry in class_names(data.classes)]
    transform = models["bundle"].clip.transform
    pixels = [transform(decode_image(path)) for path in data.images if isinstance(path, Path)]
    labels = torch.tensor(data.labels)
    theirs = models["open_clip"]
    found: dict[str, Any] = {"pictures": len(labels), "classes": len(names)}
    ours, other = (in_batches(model.pictures, pixels) for model in (models["bundle"], theirs))
    own_files = in_batches(theirs.files, list(data.images))
    for kind in kinds:
        templates = TEMPLATES[kind]
        classes = models["bundle"].clip.zero_shot_classifier(names, templates)
        weights = open_clip.build_zero_shot_classifier(theirs.model, theirs.tokenize, names, templates)
        answer, their_answer = (ours @ classes.T).argmax(1), (other @ weights).argmax(1)
        found[kind] = {
            "ours": top1(answer, labels),
            "open_clip": top1(their_answer, labels),
            "pictures_answered_otherwise": int((answer != their_answer).sum()),
            "open_clip, its own preprocessing": top1((own_files @ weights).argmax(1), labels),
        }
    return found


def top1(answer: Tensor, labels: Tensor) -> float:
    return round(100 * (answer == labels).double().mean().item(), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--root", type=Path, required=True, help="captioned pictures, as fit takes them")
    parser.add_argument("--split", default="val")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--classes", type=Path, help="a folder of class folders")
    parser.add_argument("--templates", nargs="+", default=list(TEMPLATES), help="sets of captions of a class")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = exported(args.bundle, Path(folder))
        result = {"retrieval": retrieval(models, args.root, args.split, args.pictures)}
        if args.classes:
            result["zero_shot"] = zero_shot(models, args.classes, args.templates)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
