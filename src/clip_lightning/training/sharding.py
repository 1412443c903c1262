"""Implements sharded training (FSDP2): ranks share the weights, gradients and moments of trained towers.

It uses torch's `fully_shard` (FSDP, Zhao et al. 2023) through Lightning's `ModelParallelStrategy`. Heads,
scale, bias, adapters and frozen towers, which are small or not trained, are complete on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import vector_to_parameters
from torch.optim import Optimizer

from clip_lightning.errors import RunFailed, UserError
from clip_lightning.model.checkpoint import read_checkpoint
from clip_lightning.model.clip import CLIP
from clip_lightning.model.towers import Tower
from clip_lightning.training.gradcache import training_norms


class ShardedStrategy(ModelParallelStrategy):
    """Shards the trained towers, for `--trainer.strategy fsdp`; any strategy can resume its checkpoints.

    Only rank 0 has complete tensors in the checkpoint that it saves; the others have empty ones. Unlike in
    Lightning's class, a checkpoint is loaded before setup, since the loaders start at the stored position
    in the epoch. Moments are numbered by the optimizer's parameter groups, as in every other strategy.
    """

    lightning_restore_optimizer = True  # Lightning passes the optimizer's state on, as for other strategies
    restore_checkpoint_after_setup = False

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Set up a mesh of one dimension, over which both the data and the weights are divided."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        return gather_on_first_rank(self.model.state_dict())

    def optimizer_state(self, optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
        own = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = own.state_dict()
        gathered = {number: gather_on_first_rank(moments) for number, moments in state["state"].items()}
        return {**state, "state": gathered}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write the file on rank 0, and raise `RunFailed` on every rank if that fails."""
        failure = None
        try:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        except RunFailed as error:
            failure = str(error)
        if failure := self.broadcast(failure):
            raise RunFailed(failure)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> Any:
        """Map the file into memory, so that the ranks of a machine share it and copy only their shards."""
        return read_checkpoint(Path(checkpoint_path))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        own, stored = self.model.state_dict(), checkpoint["state_dict"]
        state = {name: own_shard(value, own.get(name)) for name, value in stored.items()}
        self.model.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {
                    # copied, since the original is a mapped file; some optimizers store plain numbers
                    name: own_shard(value, parameters[number]).clone() if isinstance(value, Tensor) else value
                    for name, value in moments.items()
                }
                for number, moments in stored["state"].items()
            }
            optimizer.load_state_dict({**stored, "state": state})


def own_shard(complete: Tensor, like: Tensor | None) -> Tensor:
    """Return this rank's shard of a complete tensor if `like` is sharded, else the tensor."""
    if not isinstance(like, DTensor) or complete.shape != like.shape:  # AdamW's step is a single number
        return complete
    return distribute_tensor(
        complete.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None
    )


def gather_on_first_rank(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Replace sharded tensors by complete ones on the CPU of rank 0, and by empty ones on other ranks.

    All ranks must call it if any tensor is sharded.
    """
    gathered = dict(tensors)
    for name, value in gathered.items():
        if isinstance(value, DTensor):
            complete = value.full_tensor()
            gathered[name] = complete.cpu() if torch.distributed.get_rank() == 0 else complete.new_empty(0)
    return gathered


def check_shardable(clip: CLIP, micro_batch_size: int | str | None, trainer: Trainer) -> None:
    """Reject options that cannot be combined with sharding."""
    trained = _trained_towers(clip)
    if not isinstance(trainer.strategy, ShardedStrategy):
        problem = "needs Trainer(strategy=clip_lightning.training.sharding.ShardedStrategy())"
    elif not trained:
        problem = "shards the weights of trained towers, and both are frozen; use ddp"
    elif any(parameter.ndim == 0 for tower in trained for parameter in tower.parameters()):
        problem = "cannot shard towers with single numbers as parameters; use ddp"
    elif micro_batch_size == "auto":
        problem = "cannot be combined with --model.micro_batch_size auto; use a number"
    elif trainer.precision not in ("32-true", "bf16-mixed"):
        problem = f"needs bf16-mixed or 32, not --trainer.precision {trainer.precision}"
    elif any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):
        problem = "cannot be combined with averaged weights; use ddp"
    else:
        return
    raise UserError(f"--trainer.strategy fsdp {problem}")


def shard_towers(clip: CLIP, mesh: DeviceMesh) -> None:
    """Shard the weights of trained towers, layer by layer, over the ranks of a mesh of one dimension.

    Every rank gets the weights of rank 0. They are exchanged in fp32, so that steps in bf16 equal those of
    autocast without sharding, since bf16 would also round the reduced gradients.
    """
    for tensor in (*clip.parameters(), *clip.buffers()):
        same = tensor.detach().to(mesh.device_type)
        torch.distributed.broadcast(same, 0)
        tensor.detach().copy_(same)
    for tower in _trained_towers(clip):
        for layer in _layers(tower.backbone):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(tower, mesh=mesh)


def _trained_towers(clip: CLIP) -> list[Tower]:
    """Return the towers whose own weights are trained, and not only their adapters."""
    return [tower for tower in (clip.image_tower, clip.text_tower) if not (tower.frozen or tower.adapted)]


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the items of the outermost lists: blocks of a transformer, stages of a convolutional tower."""
    for child in module.children():
        listed = isinstance(module, nn.ModuleList | nn.Sequential)
        if not listed or isinstance(child, nn.ModuleList | nn.ModuleDict):  # which are never called
            yield from _layers(child)
        elif any(parameter.requires_grad for parameter in child.parameters()):
            yield child


def sharded_modules(clip: CLIP) -> list[FSDPModule]:
    """Return the layers and towers that are sharded."""
    return [module for module in clip.modules() if isinstance(module, FSDPModule)]


def gather_towers(clip: CLIP, *, gathered: bool) -> None:
    """Keep complete towers on every rank, so that ranks can encode independently, or shard them again."""
    for module in sharded_modules(clip):
        module.set_reshard_after_forward(not gathered and not isinstance(module, Tower), recurse=False)
        if gathered:
            module.unshard()
        else:
            module.reshard()


def average_replicated(clip: CLIP) -> None:
    """Average the gradients that are not sharded over the ranks; FSDP averages the others."""
    gradients = [parameter.grad for parameter in clip.parameters() if parameter.grad is not None]
    replicated = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    flat = torch.cat([gradient.flatten() for gradient in replicated])
    torch.distributed.all_reduce(flat)
    vector_to_parameters(flat / torch.distributed.get_world_size(), replicated)


def broadcast_statistics(clip: CLIP) -> None:
    """Broadcast the batch-norm statistics of rank 0, as DDP does before each step."""
    for norm in training_norms(clip):
        for buffer in norm.buffers():
            torch.distributed.broadcast(buffer, 0)
