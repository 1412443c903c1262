"""The recipe of the small PyTorch CLIP tutorials, written anew as a baseline; a program of its own.

    python benchmarks/baseline_soft_targets.py --rows FILE --record FOLDER [--every SECONDS] [--batch_size 64]

Every caption is a row with its picture; both towers run, and are trained, at every step; embeddings of any
length, from residual MLP heads; temperature 1; soft targets from the similarities within each modality. fp32,
constant rates, 2 loader processes. benchmarks/time_to_recall.py scores what it learns by cosine similarity.

B pictures or captions, D the embedding's width.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from clock import Recorder
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from clip_lightning.model.clip import ResidualMLPHead
from clip_lightning.model.towers import ImageTower, TextTower, Tokenize

EMBED_DIM, DROPOUT, MAX_LENGTH = 256, 0.1, 200
RATES = {"image_tower": 1e-4, "text_tower": 1e-5, "heads": 1e-3}
WEIGHT_DECAY = 1e-3


class Model(nn.Module):
    """Its parts are named as `clip_lightning.CLIP` names them with `head="mlp"`."""

    def __init__(self) -> None:
        super().__init__()
        self.image_tower = ImageTower.from_name("pypi:efficientnet-lite0")
        self.text_tower = TextTower.from_name("pypi:minilm-l6", MAX_LENGTH)
        widths = {"image": self.image_tower.width, "text": self.text_tower.width}
        self.heads = nn.ModuleDict(
            {name: ResidualMLPHead(width, EMBED_DIM, DROPOUT) for name, width in widths.items()}
        )

    def forward(self, pixels: Tensor, tokens: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) of pixels in 0..1 and of captions."""
        return self.heads["image"](self.image_tower(pixels)), self.heads["text"](self.text_tower(**tokens))


def soft_target_loss(image: Tensor, text: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy against softmax((image·imageᵀ + text·textᵀ) / 2 · temperature), both ways."""
    logits = text @ image.T / temperature
    targets = ((image @ image.T + text @ text.T) / 2 * temperature).softmax(dim=-1)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets.T)) / 2


class Rows(Dataset[tuple[Tensor, str]]):
    def __init__(self, file: Path) -> None:
        with file.open(newline="") as stream:
            self.rows = list(csv.reader(stream))[1:]
        self.pixels = v2.Compose([v2.ToImage(), v2.Resize((224, 224)), v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        path, caption = self.rows[index]
        with Image.open(path) as image:
            return self.pixels(image.convert("RGB")), caption


class Collate:
    def __init__(self, tokenize: Tokenize) -> None:
        self.tokenize = tokenize

    def __call__(self, rows: list[tuple[Tensor, str]]) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.stack([pixels for pixels, _ in rows]), self.tokenize([caption for _, caption in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="table of open_clip_trainer.write_rows")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--every", type=float, default=0, help="seconds between stored weights; 0: never")
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Model().to(device).train()
    optimizer = torch.optim.AdamW(
        [
            {"params": model.image_tower.parameters(), "lr": RATES["image_tower"], "weight_decay": 0.0},
            {"params": model.text_tower.parameters(), "lr": RATES["text_tower"], "weight_decay": 0.0},
            {"params": model.heads.parameters(), "lr": RATES["heads"], "weight_decay": WEIGHT_DECAY},
        ]
    )
    loader: Any = DataLoader(
        Rows(args.rows),
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        collate_fn=Collate(model.text_tower.tokenize),
    )
    recorder = Recorder(args.record, args.every)
    while True:  # whoever started it ends it
        for pixels, tokens in loader:
            tokens = {name: tensor.to(device) for name, tensor in tokens.items()}
            loss = soft_target_loss(*model(pixels.to(device), tokens))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(model.state_dict)


if __name__ == "__main__":
    main()
