"""open_clip's own trainer on our towers, with a clock on its steps.

    python benchmarks/open_clip_trainer.py --record FOLDER [--every SECONDS] OPEN_CLIP'S OWN WORDS ...

is `python -m open_clip_train.main` as it is, except that a hook behind every optimiser step notes the time
and, at intervals, the weights. `--features FILE` puts stored features (picture file → vector) in place of a
locked image tower; only the search for a learning rate uses it.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from clock import Recorder
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:  # the trainer's process loads nothing that open_clip does not need
    from clip_lightning.data.captions import CaptionedImage
    from clip_lightning.model.clip import CLIP


def write_model(folder: Path, clip: CLIP) -> str:
    """A folder that open_clip loads as `local-dir:FOLDER`: the towers of `clip`, and fresh heads.

    Returns:
        The value of `--model`.
    """
    from clip_lightning.model.export.open_clip import write_open_clip

    torch.manual_seed(0)
    for head in (clip.heads.image, clip.heads.text):
        head[1].reset_parameters()
    folder.mkdir(parents=True)
    write_open_clip(clip, folder, folder)
    return f"local-dir:{folder}"


def write_rows(file: Path, images: list[CaptionedImage], rows: int | None = None) -> None:
    """Every caption with its picture, as a table that open_clip reads; repeated or cut to `rows` rows."""
    pairs = [(str(image.path), caption) for image in images for caption in image.captions]
    random.Random(0).shuffle(pairs)
    count = len(pairs) if rows is None else rows
    with file.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["filepath", "title"])
        table.writerows(pairs[i % len(pairs)] for i in range(count))


def words(model: str, rows: Path, folder: Path) -> list[str]:
    """What every run has in common."""
    source = ["--train-data", str(rows), "--dataset-type", "csv", "--csv-separator", ","]
    return ["--model", model, *source, "--logs", str(folder), "--name", "open_clip", "--save-frequency", "0"]


def load_into(clip: CLIP, state: dict[str, Tensor]) -> None:
    """Put weights under open_clip's names into `clip`; a trunk that `state` lacks stays as it is.

    Raises:
        ValueError: a tensor that `clip` does not have, or does not get.
    """
    from clip_lightning.model.export.open_clip import PARTS

    own = {}
    for name, tensor in state.items():
        ours, theirs = next(pair for pair in PARTS.items() if name.startswith(pair[1]))
        own[ours + name.removeprefix(theirs)] = tensor
    answer = clip.load_state_dict(own, strict=False)
    missing = set(answer.missing_keys)
    if not any(name.startswith("image_tower.") for name in own):
        missing = {name for name in missing if not name.startswith("image_tower.")}
    if answer.unexpected_keys or missing:
        raise ValueError(f"unexpected {answer.unexpected_keys[:3]}, missing {sorted(missing)[:3]}")


def use_features(file: str) -> None:
    """Let open_clip's trainer read stored features of pictures instead of running its trunk."""
    from open_clip_train import main as trainer
    from open_clip_train.data import CsvDataset

    features = torch.load(file, weights_only=True)
    create = trainer.create_model_and_transforms

    def create_without_trunk(*args: Any, **kwargs: Any) -> Any:
        model, *transforms = create(*args, **kwargs)
        model.visual.trunk = nn.Identity()
        return model, *transforms

    def read(self: Any, index: int) -> tuple[Tensor, Tensor]:
        return features[Path(self.images[index]).name], self.tokenize([str(self.captions[index])])[0]

    trainer.create_model_and_transforms = create_without_trunk
    CsvDataset.__getitem__ = read


def main() -> int | None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--every", type=float, default=0)
    parser.add_argument("--features")
    args, rest = parser.parse_known_args()

    from open_clip_train import main as trainer

    if args.features:
        use_features(args.features)
    recorder = Recorder(args.record, args.every)
    models: list[nn.Module] = []

    def state() -> dict[str, Tensor]:
        # torch.compile puts its own prefix before every name
        return {n.removeprefix("_orig_mod."): tensor for n, tensor in models[-1].state_dict().items()}

    train_one_epoch = trainer.train_one_epoch

    def with_model_known(model: nn.Module, *rest: Any, **kwargs: Any) -> Any:
        models.append(model)
        return train_one_epoch(model, *rest, **kwargs)

    trainer.train_one_epoch = with_model_known
    register_optimizer_step_post_hook(lambda *_: recorder.step(state))
    status = trainer.main(rest)
    if args.every:
        recorder.save(state())
    return status


if __name__ == "__main__":
    sys.exit(main())
