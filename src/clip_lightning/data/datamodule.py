"""Captioned pictures as batches: where they come from, how they are divided, what was broken."""

from __future__ import annotations

import hashlib
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from clip_lightning.cores import cores
from clip_lightning.data.captions import CaptionedImage, CaptionSet, Splits, content_groups, split_by_image
from clip_lightning.data.columns import RECOGNISED, ReadOptions
from clip_lightning.data.datasets import Collate, EvalDataset, TrainDataset
from clip_lightning.data.features import CacheOptions, FeatureCache, Features, default_cache
from clip_lightning.data.images import Augmentation, ImageTransform
from clip_lightning.data.sampler import EvalSampler, FirstEpoch, TrainSampler
from clip_lightning.data.shards.training import ShardDataset, ShardOptions, ShardSampler
from clip_lightning.data.sources import Artifact, Folder, find_source, read_source
from clip_lightning.errors import UserError
from clip_lightning.terminal import one_line
from clip_lightning.wandb_fetch import Fetched

DatasetName = Literal["auto", "flickr8k", "flickr30k", "captions", "folder", "scenes", "shards"]
EVAL_BATCH_SIZE = 64


class CaptionDataModule(LightningDataModule):
    """Reads captioned pictures, divides them by picture, and makes batches.

    A training batch has, on each rank, `batch_size` pictures with `captions_per_image` captions each; an
    evaluation batch has pictures with all their captions.

    Attributes:
        digest: SHA-256 of the data (names, captions, splits, file sizes); known after `setup`.
        root: the folder or annotation file that is read; known after `setup`.
        fetched: the version of the artifact that is used, if one is; known after `setup`.
        broken: path → reason, of pictures and rows that were left out so far.
    """

    def __init__(
        self,
        transform: ImageTransform,
        tokenize: Callable[[list[str]], dict[str, Tensor]],
        root: str | Path | None = None,
        read: ReadOptions = RECOGNISED,
        dataset: DatasetName = "auto",
        batch_size: int = 256,
        num_workers: int | None = None,
        image_size: int | None = None,
        captions_per_image: int = 1,
        augmentation: Augmentation | None = None,
        shards: ShardOptions = ShardOptions(),  # noqa: B008 (frozen, and shown by --help)
        max_broken: float = 0.01,
        splits: Splits = Splits(),  # noqa: B008
        cache: str = "auto",
        cache_options: CacheOptions = CacheOptions(),  # noqa: B008
        seed: int = 0,
    ) -> None:
        """Take note of the settings; nothing is read before `prepare_data` and `setup`.

        Args:
            transform: the image tower's.
            tokenize: the text tower's.
            root: the images and captions: a folder, an annotation file, or several files separated by commas;
                hf:OWNER/NAME[:SUBSET][@REVISION] from Hugging Face; wandb:ENTITY/PROJECT/NAME:ALIAS, an
                artifact; or the URL of an archive with its checksum, https://SERVER/ARCHIVE#sha256=HEX. What
                is fetched is kept on this machine.
            read: columns and image folder of tables and data sets, if they are not recognised.
            dataset: how to read `root`; `auto` looks. `scenes` are drawn, into `root` or the cache folder;
                `shards` are streamed.
            batch_size: pictures per rank and step.
            num_workers: loader processes per rank; by default the number of usable cores, at most 8.
            image_size: side of the square input in pixels; the image tower's own by default.
            captions_per_image: different captions of each picture in a training batch.
            augmentation: flips, crops and colour; by default flips, and none for `scenes`, whose captions
                say left and right.
            shards: what is read of shards, and how.
            max_broken: largest fraction of all images that may be unusable, 0 to 1; more end the run.
            splits: how images are divided if the data names no splits.
            cache: where features of frozen towers are kept: `auto` for the cache folder, `off` to run
                frozen towers at every step, or a folder.
            cache_options: what is kept there, of features and of copies of remote tars.
            seed: of the order, the captions and the augmentation.
        """
        super().__init__()
        self.options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        _check(batch_size=batch_size, captions_per_image=captions_per_image)
        if not 0 <= max_broken <= 1:
            raise UserError(f"--data.max_broken {max_broken}: expected a fraction from 0 to 1")
        if num_workers is not None and num_workers < 0:
            raise UserError(f"--data.num_workers {num_workers}: expected 0 or more")
        if image_size is not None and transform.size != (image_size, image_size):
            raise UserError(
                f"--data.image_size {image_size} is not the model's, which is {transform.size[0]}x"
                f"{transform.size[1]}; leave it out with --model.init_from"
            )
        self.transform = transform
        self.tokenize = tokenize
        self.shards = shards
        if dataset != "shards" and shards != ShardOptions():
            raise UserError("--data.shards.* are options of --data.dataset shards; give that too")
        if shards.sources and root:
            raise UserError("--data.shards.sources and --data.root each name data; give one of them")
        # tars at a URL are read where they are, but an archive, whose URL has a checksum, is fetched
        is_streamed = dataset == "shards" and "://" in str(root) and "#sha256=" not in str(root)
        self._tars = root if is_streamed else None
        self.read = read
        self.source = (
            Folder(Path())
            if self._tars or shards.sources
            else find_source(root, scenes=dataset == "scenes", read=read)
        )
        self.root = Path()
        self.fetched: Fetched | None = None
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = min(8, cores()) if num_workers is None else num_workers
        self.captions_per_image = captions_per_image
        self.augmentation = augmentation or Augmentation(flip=dataset != "scenes")
        self.max_broken = max_broken
        self.splits = splits
        self.cache_options = cache_options
        self.cache = (
            None
            if cache == "off"
            else FeatureCache(
                default_cache() if cache == "auto" else Path(cache), cache_options.gigabytes * 1e9
            )
        )
        self.views = cache_options.views if self.augmentation != Augmentation(flip=False) else 1
        self.seed = seed
        self.digest = ""
        self.broken: dict[str, str] = {}
        self._unusable = 0
        self._resume: dict[str, Any] = {}
        self._images: dict[str, list[CaptionedImage]] = {}
        self._streamed: ShardDataset | None = None
        self._content: dict[str, list[int]] = {}
        self._picture_features: dict[str, list[Features]] = {}
        self._text_features: dict[str, Features] = {}

    def prepare_data(self) -> None:
        """Fetch or draw what is not on this machine, once."""
        if not self._images:  # else it has been read, and a name may mean something newer by now
            self.source.fetch()

    def setup(self, stage: str | None = None) -> None:
        """Read and divide the captions; a second call changes nothing."""
        connector = getattr(self.trainer, "_accelerator_connector", None)
        if self._world > 1 and connector is not None and connector.use_distributed_sampler:
            raise UserError(
                "the data module divides the batches among the ranks itself; "
                "give Trainer(use_distributed_sampler=False)"
            )
        if self._images:
            self._check_ranks()
            return
        self.root = self.source.folder()
        if isinstance(self.source, Artifact):
            self.fetched = self.source.fetched()
        if self.dataset == "shards":
            self._read_shards(stage)
        else:
            self._read_captions()
        self._check_ranks()
        if stage == "fit":
            if not self._images["train"] and self._streamed is None:
                raise UserError(f"{self.root} has no train split; give data that has one to --data.root")
            self._clip_batch_size()
            self._batches()  # complains of a batch that is too large before anything is computed

    def _clip_batch_size(self) -> None:
        """Let a small data set be one batch, instead of refusing what the configurations give."""
        most = len(self._images["train"]) // self._world
        if 0 < most < self.batch_size and self._streamed is None:
            rank_zero_warn(
                f"--data.batch_size {self.batch_size} is more than the {most} training images of each rank; "
                f"a batch has {most}"
            )
            self.batch_size = most

    def _read_captions(self) -> None:
        captions = read_source(self.source, self.dataset, self.read)
        if self._rank == 0:
            for line in (captions.summary(), *(f"warning: {line}" for line in captions.warnings)):
                print(one_line(line), file=sys.stderr)
        said = self.fetched.metadata.get("captions_digest") if self.fetched else None
        if self.fetched and said is not None and said != captions.digest():
            raise UserError(
                f"{self.root} is not what was uploaded as {self.fetched.name}: its captions or pictures have "
                f"changed; remove it and {self.root.name}.json beside it, and it is downloaded again"
            )
        self._images = split_by_image(captions, self.splits)
        # of the splits as they were drawn: scores on other splits are not comparable
        drawn = (replace(image, split=split) for split, part in self._images.items() for image in part)
        self.digest = replace(captions, images=tuple(drawn)).digest()
        self._unusable = len(captions.left_out)
        self._note_broken(captions.left_out)

    def _read_shards(self, stage: str | None) -> None:
        """Training is streamed; images to validate or test on become files like any others."""
        streamed = ShardDataset(
            self.shards,
            self._tars or self.root,  # a URL is not a path, which would lose one of its slashes
            self.transform,
            self.augmentation,
            captions_per_image=self.captions_per_image,
            seed=self.seed,
            budget=self.cache_options.gigabytes * 1e9,
        )
        parts = {split: streamed.held_out(split) for split in ("val", "test")}
        if stage in ("fit", "validate") and not parts["val"]:
            raise UserError(
                "nothing to validate on: no source has a val split; give captioned images or tars to "
                "--data.shards.val"
            )
        self._images = {"train": [], **parts}
        self._streamed = streamed
        drawn = [replace(image, split=split) for split, part in parts.items() for image in part]
        evaluated = CaptionSet(self.root, tuple(drawn)).digest()
        self.digest = hashlib.sha256(f"{streamed.digest}\0{evaluated}".encode()).hexdigest()
        self._note_broken(streamed.index.take_broken())

    def _check_ranks(self) -> None:
        """A name such as `latest` may mean something else to each of several machines."""
        if self._world == 1 or not torch.distributed.is_initialized():
            return
        digests: list[Any] = [None] * self._world
        torch.distributed.all_gather_object(digests, self.digest)
        if len(set(digests)) > 1:
            raise UserError(
                f"the ranks read different data (digests {', '.join(sorted(set(digests)))}); name a version, "
                "wandb:ENTITY/PROJECT/NAME:vN, or give all machines the same --data.root"
            )

    def images(self, split: str) -> list[CaptionedImage]:
        """The pictures of `train`, `val` or `test`; `image_id` of evaluation batches counts them."""
        return self._images[split]

    def captions(self, split: str) -> list[str]:
        """All captions of the split, picture after picture; `text_id` counts them."""
        return [caption for image in self._images[split] for caption in image.captions]

    def use_features(self, split: str, *, pictures: list[Features] | None, texts: Features | None) -> None:
        """Let batches of `split` hold cached features instead of pixels or tokens.

        Args:
            split: `train`, `val` or `test`.
            pictures: one entry a view, rows in the order of `images(split)`; None to go on decoding.
            texts: rows in the order of `captions(split)`; None to go on tokenizing.
        """
        self._picture_features.pop(split, None)
        self._text_features.pop(split, None)
        if pictures:
            self._picture_features[split] = pictures
        if texts is not None:
            self._text_features[split] = texts

    def content_ids(self, split: str) -> list[int]:
        """For each picture of the split the position of the first with the same bytes."""
        if split not in self._content:
            self._content[split] = content_groups(self._images[split])
        return self._content[split]

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of an epoch in seeded order; after a resume, those that are still to come."""
        dataset, sampler = self._batches()
        epoch, done = self._position(sampler.batches)
        sampler.set_epoch(epoch)
        sampler.start_batch = done
        if self.trainer is not None and self.trainer.overfit_batches > 0:
            sampler = FirstEpoch(sampler)
        return self._loader("train", dataset, sampler, self.batch_size)

    def _batches(self) -> tuple[Any, Any]:
        """What a training loader reads, and in which order."""
        if self._streamed is not None:
            ranks = {"rank": self._rank, "world_size": self._world}
            return self._streamed, ShardSampler(self._streamed, self.batch_size, **ranks)
        images = self._images["train"]
        sampler = TrainSampler(
            len(images), self.batch_size, seed=self.seed, rank=self._rank, world_size=self._world
        )
        dataset = TrainDataset(
            images,
            self.content_ids("train"),
            self.transform,
            self.augmentation,
            captions_per_image=self.captions_per_image,
            seed=self.seed,
            views=self._picture_features.get("train", ()),
        )
        return dataset, sampler

    def val_dataloader(self) -> DataLoader[Any]:
        """Every picture of `val` with all its captions."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Every picture of `test` with all its captions."""
        return self._eval_loader("test")

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Note what was broken in the batch, and keep it off the device."""
        found = {} if self._streamed is None else self._streamed.index.take_broken()
        self._note_broken(batch.pop("broken") | found)
        return batch

    def _eval_loader(self, split: str) -> DataLoader[Any]:
        images = self._images[split]
        if not images:
            raise UserError(
                f"{self.root} has no {split} split; give data that has one, or raise "
                f"--data.splits.{split}_fraction"
            )
        sampler = EvalSampler(len(images), rank=self._rank, world_size=self._world)
        (features,) = self._picture_features.get(split, [None])
        dataset = EvalDataset(images, self.transform, features)
        small = min(self.batch_size, EVAL_BATCH_SIZE)
        return self._loader(split, dataset, sampler, self.batch_size if self._is_cached(split) else small)

    def _is_cached(self, split: str) -> bool:
        """Whether batches need neither pictures nor texts, only rows of features."""
        return split in self._picture_features and split in self._text_features

    def _loader(self, split: str, dataset: Any, sampler: Any, batch_size: int) -> DataLoader[Any]:
        # reading cached rows is no work for another process
        workers = 0 if self._is_cached(split) else self.num_workers
        collate: Any = Collate(self.tokenize, self._text_features.get(split))  # takes what __getitems__ gives
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=_start_worker,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _note_broken(self, broken: dict[str, str]) -> None:
        new = {path: reason for path, reason in broken.items() if path not in self.broken}
        if not new:
            return
        self.broken |= new
        total = self._unusable + sum(len(images) for images in self._images.values())
        total += 0 if self._streamed is None else self._streamed.samples
        path, reason = next(iter(new.items()))
        if len(self.broken) > self.max_broken * total:
            raise UserError(
                f"{len(self.broken)} of {total} images or rows in {self.root} are unusable "
                f"(the last: {path}: {reason}), more than --data.max_broken {self.max_broken:g}; fix them, "
                "or raise that fraction"
            )
        said = f"left out {len(self.broken)} images or rows so far; the last: {path}: {reason}"
        rank_zero_warn(one_line(said))

    def state_dict(self) -> dict[str, Any]:
        """Where training is, for the checkpoint.

        Lightning has it there too, but asks for batches (to count them) before it has read its own.
        """
        loop: Any = self.trainer.fit_loop if self.trainer else None
        if loop is None:
            return {}
        epoch = max(loop.epoch_progress.current.ready - 1, 0)
        return {
            "epoch": epoch,
            "batches": loop.epoch_loop.batch_progress.current.processed,
            "must_agree": self._must_agree(self._world),
        }

    def _must_agree(self, ranks: int) -> dict[str, Any]:
        """What a resumed run must have in common with its checkpoint, or its batches would be others."""
        streamed, order = self._streamed, {}
        if streamed is not None:
            order = {
                "--data.shards.window": streamed.window,
                "--data.shards.samples_per_epoch": streamed.samples,
            }
        return {
            **order,
            "data (digest)": self.digest,
            "--seed_everything": self.seed,
            "--data.batch_size × ranks": self.batch_size * ranks,
        }

    def check_resumes(self, state_dict: dict[str, Any], ranks: int) -> None:
        """Compare this data and its batches on `ranks` ranks with what `state_dict` returned; needs `setup`.

        Raises:
            UserError: they are not those of the checkpoint.
        """
        agreed = state_dict.get("must_agree", {})
        for what, now in self._must_agree(ranks).items():
            then = agreed.get(what, now)
            if then != now:
                raise UserError(
                    f"the checkpoint was trained with {what} {then}, this is {now}; give the same data and "
                    "options as then, or start anew with --model.init_from RUN/model"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next batches of training be those that follow.

        Raises:
            UserError: the data or the batches are not those of the checkpoint.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        self.check_resumes(state_dict, self._world)
        self._resume = state_dict

    def _position(self, batches: int) -> tuple[int, int]:
        """The epoch that the next training batch is of, and how many of its batches have been trained on."""
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
    """Leave Ctrl-C to the main process, which finishes its step first, and one core to each worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"--data.{name} {value}: expected 1 or more")
