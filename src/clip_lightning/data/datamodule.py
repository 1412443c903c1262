"""Make batches of captioned images: fetch, read and split the data, and record what is broken."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from clip_lightning.cpu import cores
from clip_lightning.data.captions import (
    SPLITS,
    CaptionedImage,
    CaptionSet,
    caption_warnings,
    content_groups,
    split_by_image,
)
from clip_lightning.data.datasets import Collate, EvalDataset, TrainDataset
from clip_lightning.data.features import CacheOptions, FeatureCache, Features
from clip_lightning.data.images import Augmentation, ImageTransform
from clip_lightning.data.readers import RECOGNIZED, ReadOptions
from clip_lightning.data.sampler import EvalSampler, TrainSampler
from clip_lightning.data.shards.index import FILE
from clip_lightning.data.shards.training import ShardDataset, ShardOptions, ShardSampler
from clip_lightning.data.sources import Artifact, Folder, Scenes, find_source, names_tars, read_source
from clip_lightning.errors import UserError, check_option
from clip_lightning.files import cache_folder
from clip_lightning.terminal import note, one_line
from clip_lightning.wandb_fetch import ArtifactName, fetched

EVAL_BATCH_SIZE = 64
_note = rank_zero_only(note)


class CaptionDataModule(LightningDataModule):
    """Read captioned images, split them by image, and make batches.

    On each rank, a training batch has `batch_size` images with `captions_per_image` captions each. An
    evaluation batch has images with all their captions. The order, the choice of captions and the
    augmentation depend only on the seed given to Lightning's `seed_everything` (0 if there is none).

    Attributes:
        digest: SHA-256 of the data (names, captions, splits, file sizes); set by `setup`.
        fetched: the version of the W&B artifact that is used, if any; set by `setup`.
        broken: path → reason, for images and rows that have been left out so far.
    """

    def __init__(
        self,
        transform: ImageTransform,
        tokenize: Callable[[list[str]], dict[str, Tensor]],
        root: str | Path | None = None,
        read: ReadOptions = RECOGNIZED,
        batch_size: int = 256,
        num_workers: int | None = None,
        captions_per_image: int = 1,
        augmentation: Augmentation | None = None,
        shards: ShardOptions = ShardOptions(),  # noqa: B008 (frozen, and shown by --help)
        cache: str = "auto",
        cache_options: CacheOptions = CacheOptions(),  # noqa: B008
        records: Any = None,
    ) -> None:
        """Store the settings; the data is not read before `prepare_data` and `setup`.

        Args:
            transform: the transform of the image tower.
            tokenize: the tokenizer of the text tower.
            root: the images and captions: a folder, an annotation file, or several files separated by commas;
                `hf:OWNER/NAME[:SUBSET][@REVISION]` for Hugging Face data; `wandb:ENTITY/PROJECT/NAME:ALIAS`
                for a W&B artifact; https://SERVER/ARCHIVE#sha256=HEX for an archive and its checksum; a
                folder, URL or pattern of tars; or `scenes` for synthetic scenes. Downloads are cached.
            read: layout, columns and splits, if they are not recognized.
            batch_size: number of images per rank and step.
            num_workers: number of loader processes per rank; by default one per usable core, at most 8. With
                GPUs, each has an equal share of the cores, less one for the rank itself, and at most 16.
            captions_per_image: number of different captions per image in a training batch.
            augmentation: flips, crops and color changes; by default only flips, and none for `scenes`, whose
                captions mention left and right.
            shards: options for training from tars.
            cache: where the features of frozen towers are cached: `auto` for the default cache folder, `off`
                to run frozen towers in every step, or a folder.
            cache_options: size of the cache and number of cached views.
            records: data from Python instead of `root`: rows of (image, captions) or (image, captions,
                split), with images in any form that `CLIP.embed_images` accepts; a DataFrame; a torch or
                Hugging Face data set; or a mapping from splits to any of these. The data is written to the
                cache folder once.
        """
        super().__init__()
        self.options = {
            name: value for name, value in locals().items() if name not in ("self", "__class__", "records")
        }
        """The arguments, without the data itself, which loggers record."""
        check_option("data.batch_size", batch_size, batch_size >= 1, "1 or more")
        check_option("data.captions_per_image", captions_per_image, captions_per_image >= 1, "1 or more")
        check_option("data.num_workers", num_workers, (num_workers or 0) >= 0, "0 or more")
        if sum(map(bool, (shards.sources, root, records is not None))) > 1:
            raise UserError("give only one of --data.root, --data.records and --data.shards.sources")
        self.transform, self.tokenize = transform, tokenize
        self.read, self.shards, self.cache_options = read, shards, cache_options
        self.batch_size, self.captions_per_image = batch_size, captions_per_image
        if num_workers is None:
            gpus = torch.cuda.device_count()
            ranks = 1 if "SLURM_PROCID" in os.environ else gpus  # SLURM gives each rank cores of its own
            num_workers = min(16, max(1, cores() // ranks - 1)) if gpus else min(8, cores())
        self.num_workers = num_workers
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self._tars = str(root) if names_tars(root) else ""
        is_streamed = self._tars or shards.sources
        self.source = Folder(Path()) if is_streamed else find_source(root, read, records)
        self.augmentation = augmentation or Augmentation(flip=not isinstance(self.source, Scenes))
        self.views = cache_options.views if self.augmentation != Augmentation(flip=False) else 1
        folder = cache_folder("features") if cache == "auto" else Path(cache)
        self.cache = None if cache == "off" else FeatureCache(folder, cache_options.gigabytes * 1e9)
        self.root = Path()
        """The folder or annotation file that is read; known after `setup`."""
        self.fetched: ArtifactName | None = None
        self.digest = ""
        self.broken: dict[str, str] = {}
        self.prints_summary = True
        """Whether `setup` prints what it has read; a command that trains several models prints it once."""
        self._unusable = 0
        self._resume: dict[str, Any] = {}
        self._images: dict[str, list[CaptionedImage]] = {}
        self._streamed: ShardDataset | None = None
        self._content: dict[str, list[int]] = {}
        self._features: dict[str, tuple[list[Features], Features | None]] = dict.fromkeys(SPLITS, ([], None))
        """The cached views of the images of a split, and its cached captions."""
        self._teacher: tuple[Features, Features] | None = None

    def prepare_data(self) -> None:
        """Download or generate the data, unless it is on this machine."""
        if not self._images:  # else the data was read already, and its name may have a newer version now
            self.source.fetch()

    def setup(self, stage: str | None = None) -> None:
        """Read the captions and split the images; a second call does nothing."""
        is_new = not self._images
        if is_new:
            self.root = self.source.folder()
            self.fetched = fetched(self.source.name) if isinstance(self.source, Artifact) else None
            # A folder that `data convert` or img2dataset wrote
            is_written = (self.root / FILE).is_file() or any(self.root.glob("[0-9]*.tar"))
            tars = self._tars or (str(self.root) if is_written and self.read.layout == "auto" else "")
            if tars or self.shards.sources:
                self._read_shards(tars, stage)
            elif self.shards == ShardOptions():
                self._read_captions()
            else:
                raise UserError(
                    f"--data.shards options are only for tars, but {self.root} has none; omit these options"
                )
        self._check_ranks()
        if is_new and stage == "fit":
            self._check_training()

    def _read_captions(self) -> None:
        captions = read_source(self.source, self.read)
        if self.prints_summary:
            for line in (captions.summary(), *(f"warning: {line}" for line in captions.warnings)):
                _note(line)
        uploaded = self.fetched.about()["metadata"].get("captions_digest") if self.fetched else None
        if self.fetched and uploaded is not None and uploaded != captions.digest():
            raise UserError(
                f"the captions or images in {self.root} differ from the uploaded artifact "
                f"{self.fetched}; remove the folder and {self.root.name}.json next to it to download "
                "the artifact again"
            )
        self._images = split_by_image(captions, self.read.splits)
        # The digest includes the drawn splits, because scores on different splits are not comparable.
        self.digest = self._digest(captions)
        self._unusable = len(captions.left_out)
        self._note_broken(captions.left_out)

    def _read_shards(self, tars: str, stage: str | None) -> None:
        """Find the samples of tars for training; samples for validation and test are written to files."""
        self._streamed = ShardDataset(
            self.shards,
            tars,
            self.transform,
            self.augmentation,
            captions_per_image=self.captions_per_image,
            seed=self.seed,
            budget=self.cache_options.gigabytes * 1e9,
        )
        self._images = {"train": []} | {split: self._streamed.held_out(split) for split in ("val", "test")}
        if stage in ("fit", "validate") and not self._images["val"]:
            raise UserError(
                "there is no validation data, as no source has a val split; give captioned images or tars "
                "with --data.shards.val"
            )
        evaluated = self._digest(CaptionSet(self.root, ()))
        self.digest = hashlib.sha256(f"{self._streamed.digest}\0{evaluated}".encode()).hexdigest()
        self._note_broken(self._streamed.index.take_broken())

    def _digest(self, captions: CaptionSet) -> str:
        split_images = (replace(image, split=split) for split, part in self._images.items() for image in part)
        return replace(captions, images=tuple(split_images)).digest()

    def _check_ranks(self) -> None:
        """Compare the data of all ranks, and use the seed of the first one.

        A name such as `latest` may mean different versions on different machines, and the batches of ranks
        with different seeds would overlap.
        """
        if self._world == 1 or not torch.distributed.is_initialized():
            return
        everyone: list[Any] = [None] * self._world
        torch.distributed.all_gather_object(everyone, (self.digest, self.seed))
        digests, (self.seed, *_) = zip(*everyone, strict=True)
        if self._streamed is not None:
            self._streamed.seed = self.seed
        if len(set(digests)) > 1:
            raise UserError(
                f"the ranks read different data (digests {', '.join(sorted(set(digests)))}); give a fixed "
                "version (wandb:ENTITY/PROJECT/NAME:vN), or the same --data.root on all machines"
            )

    def _check_training(self) -> None:
        """Check the training data before anything is computed; a small data set becomes one batch."""
        images = self._images["train"]
        if self._streamed is None:
            if not images:
                raise UserError(f"{self.root} has no train split; give --data.root data that has one")
            for line in caption_warnings(images, self.tokenize):
                _note(f"warning: {line}")
            most = len(images) // self._world
            if 0 < most < self.batch_size:
                rank_zero_warn(
                    f"--data.batch_size {self.batch_size} is larger than the {most} training images per "
                    f"rank; using a batch size of {most}"
                )
                self.batch_size = most
        self._batches()

    def images(self, split: str) -> list[CaptionedImage]:
        """Return the images of `train`, `val` or `test`; `image_id` in evaluation batches indexes them."""
        return self._images[split]

    def captions(self, split: str) -> list[str]:
        """Return all captions of a split, image by image; `text_id` in batches indexes them."""
        return [caption for image in self._images[split] for caption in image.captions]

    def use_features(self, split: str, *, images: list[Features] | None, texts: Features | None) -> None:
        """Use cached features instead of pixels or tokens in the batches of a split.

        Args:
            split: `train`, `val` or `test`.
            images: features per view, with rows in the order of `images(split)`; None to decode the images.
            texts: features with rows in the order of `captions(split)`; None to tokenize the captions.
        """
        self._features[split] = images or [], texts

    def use_teacher(self, images: Features, texts: Features) -> None:
        """Add embeddings of a teacher to training batches; see `use_features` for the order of the rows."""
        self._teacher = images, texts

    def content_ids(self, split: str) -> list[int]:
        """Return, for each image of a split, the position of the first image with the same bytes."""
        if split not in self._content:
            self._content[split] = content_groups(self._images[split])
        return self._content[split]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of an epoch in seeded order; after a resume, only the remaining ones."""
        dataset, sampler = self._batches()
        sampler.epoch, sampler.start_batch = self._position(sampler.batches)
        sampler.repeats = self.trainer is not None and self.trainer.overfit_batches > 0
        return self._loader("train", dataset, sampler)

    def _batches(self) -> tuple[Any, Any]:
        """Return the dataset and the sampler for training."""
        ranks = {"rank": self._rank, "world_size": self._world}
        if self._streamed is not None:
            return self._streamed, ShardSampler(self._streamed, self.batch_size, **ranks)
        images = self._images["train"]
        sampler = TrainSampler(len(images), self.batch_size, seed=self.seed, **ranks)
        dataset = TrainDataset(
            images,
            self.content_ids("train"),
            self.transform,
            self.augmentation,
            captions_per_image=self.captions_per_image,
            seed=self.seed,
            views=self._features["train"][0],
        )
        return dataset, sampler

    def val_dataloader(self) -> DataLoader[Any]:
        """Return every image of `val` with all its captions."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return every image of `test` with all its captions."""
        return self._eval_loader("test")

    def _eval_loader(self, split: str) -> DataLoader[Any]:
        images = self._images[split]
        if not images:
            raise UserError(
                f"{self.root} has no {split} split; give data that has one, or increase "
                f"--data.read.splits.{split}_fraction"
            )
        views, _ = self._features[split]
        dataset = EvalDataset(images, self.transform, views[0] if views else None)
        sampler = EvalSampler(len(images), rank=self._rank, world_size=self._world)
        return self._loader(split, dataset, sampler)

    def _loader(self, split: str, dataset: Any, sampler: Any) -> DataLoader[Any]:
        views, texts = self._features[split]
        is_cached = bool(views and texts)
        size = self.batch_size if is_cached or split == "train" else min(self.batch_size, EVAL_BATCH_SIZE)
        # Reading cached rows is too little work for another process.
        workers = 0 if is_cached else self.num_workers
        teacher = self._teacher if split == "train" else None
        collate: Any = Collate(self.tokenize, texts, teacher)  # its input is the result of __getitems__
        return DataLoader(
            dataset,
            batch_size=size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=_start_worker,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available() and not (texts and texts.device.type == "cuda"),
        )

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Record the broken images of a batch, and remove them from what is moved to the device."""
        broken_tars = {} if self._streamed is None else self._streamed.index.take_broken()
        self._note_broken(batch.pop("broken") | broken_tars)
        return batch

    def _note_broken(self, broken: dict[str, str]) -> None:
        new = {path: reason for path, reason in broken.items() if path not in self.broken}
        if not new:
            return
        self.broken |= new
        streamed = self._streamed.samples if self._streamed else 0
        total = self._unusable + streamed + sum(len(images) for images in self._images.values())
        path, reason = next(iter(new.items()))
        count = len(self.broken)
        if count > self.read.max_broken * total:
            raise UserError(
                f"{count} of {total} images or rows in {self.root} cannot be used (last {path}: {reason}), "
                f"which is more than --data.read.max_broken {self.read.max_broken:g} allows; fix them, or "
                "increase that fraction"
            )
        rank_zero_warn(one_line(f"left out {count} images or rows so far (last {path}: {reason})"))

    def state_dict(self) -> dict[str, Any]:
        """Return the position of training for the checkpoint.

        Lightning stores it, too, but requests batches (to count them) before it restores its own state.
        """
        loop: Any = self.trainer.fit_loop if self.trainer else None
        if loop is None:
            return {}
        epoch = max(loop.epoch_progress.current.ready - 1, 0)
        batches = loop.epoch_loop.batch_progress.current.processed
        return {"epoch": epoch, "batches": batches, "must_agree": self._must_agree(self._world)}

    def _must_agree(self, ranks: int) -> dict[str, Any]:
        """Return what must be equal in the checkpoint and the resumed run for the batches to be the same."""
        agree: dict[str, Any] = {}
        if self._streamed is not None:
            agree["--data.shards.window"] = self._streamed.window
            agree["--data.shards.samples_per_epoch"] = self._streamed.samples
        return agree | {
            "data (digest)": self.digest,
            "--seed_everything": self.seed,
            "--data.batch_size × ranks": self.batch_size * ranks,
        }

    def check_resumes(self, state_dict: dict[str, Any], ranks: int) -> None:
        """Compare this data and its batches on `ranks` ranks with a `state_dict`; call `setup` first."""
        agreed = state_dict.get("must_agree", {})
        for what, now in self._must_agree(ranks).items():
            then = agreed.get(what, now)
            if then != now:
                raise UserError(
                    f"the checkpoint was trained with {what} {then}, but this run has {now}; use the same "
                    "data and options, or start a new run with --model.init_from RUN/model"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue training with the batch after the last one of the checkpoint."""
        if self.trainer is not None and self.trainer.state.fn == "fit":
            self.check_resumes(state_dict, self._world)
            self._resume = state_dict

    def _position(self, batches: int) -> tuple[int, int]:
        """Return the epoch of the next training batch, and the number of its batches that are done."""
        if self.trainer is None:
            return 0, 0
        state, self._resume = self._resume, {}
        if not state:
            return self.trainer.current_epoch, 0
        limit = self.trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        epoch, done = state["epoch"], state["batches"]
        return (epoch, done) if done < batches else (epoch + 1, 0)

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self.trainer else 1


def _start_worker(worker_id: int) -> None:
    """Ignore Ctrl-C, which the main process handles after its step, and use one core per worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
