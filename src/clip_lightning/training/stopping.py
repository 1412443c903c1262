"""Stops a run on all ranks after the same step: on a signal, early, if it diverges, or if a rank is lost."""

from __future__ import annotations

import atexit
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.utils.data._utils import signal_handling

from clip_lightning.errors import Diverged
from clip_lightning.terminal import note
from clip_lightning.training.checkpoints import is_accumulating, within_a_step

CHECKED = 10
"""Steps after which the norms of their gradients are read."""


class GracefulStop(Callback):
    """Finishes the current step or validation after a signal, then stops; a second Ctrl-C stops at once.

    All ranks stop, even if only one receives the signal. Schedulers send SIGUSR1 some time before the end of
    a job, and a SLURM job is then requeued. Training does not stop while gradients accumulate, since
    checkpoints do not contain them.
    """

    def __init__(self, prints_remedy: bool = True) -> None:
        self._prints_remedy = prints_remedy
        self._received = 0  # the number of the signal
        self._handlers: dict[int, Any] = {}
        self._group: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Handle SIGUSR1, which would otherwise end the process while frozen towers run."""
        self._handle(signal.SIGUSR1)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle all signals in place of Lightning, whose ranks would stop after different batches."""
        self._handle(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop if a rank has received a signal; after the last batch of an epoch, Ctrl-C waits."""
        if is_accumulating(trainer):
            return
        if trainer.world_size > 1:
            # the largest number of all ranks, exchanged on the CPU in order not to wait for a GPU
            self._group = self._group or torch.distributed.new_group(backend="gloo")
            largest = torch.tensor(self._received)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=self._group)
            self._received = int(largest)
        if self._received in (signal.SIGTERM, signal.SIGUSR1):
            # Lightning raises after it has counted the batch, so that a resumed run does not repeat it
            trainer._signal_connector.received_sigterm = True
        elif self._received and not trainer.is_last_batch:
            raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print how to resume, or requeue the job."""
        if not isinstance(exception, KeyboardInterrupt | SIGTERMException) or not trainer.is_global_zero:
            return
        if self._received == signal.SIGUSR1 and "SLURM_JOB_ID" in os.environ:
            atexit.register(requeue)  # after everything is saved
        if self._prints_remedy:
            place = "the last checkpoint" if within_a_step(trainer) else f"step {trainer.global_step}"
            resumes = f"; the same command with --ckpt_path last resumes from {place}"
            note(f"stopped{resumes if trainer.global_step else ' before the first step'}")

    def _handle(self, *numbers: signal.Signals) -> None:
        """Install the handler in the main thread; W&B's agents train in another thread."""
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                self._handlers.setdefault(number, signal.getsignal(number))
                signal.signal(number, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._received == signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signum
        print("\nstopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)


def requeue() -> None:
    """Requeue the SLURM job of this process, whose command resumes with `--ckpt_path auto`."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
    failed = not shutil.which("scontrol") or subprocess.run(["scontrol", "requeue", job]).returncode
    note(f"the job {job} {'could not be' if failed else 'was'} requeued")


class EarlyStopping(callbacks.EarlyStopping):
    """Lightning's early stopping, but a run that has stopped early stays so until `patience` is increased."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before the first step if the resumed run has stopped early, and has no more patience now."""
        out_of_patience = self.stopping_reason == EarlyStoppingReason.PATIENCE_EXHAUSTED
        if out_of_patience and self.wait_count >= self.patience:
            trainer.should_stop = True
            reason = self.stopping_reason_message
            remedy = "increase --early_stopping.patience to continue it"
            rank_zero_only(note)(f"the run has stopped early ({reason}); {remedy}")


class NonFinite(Callback):
    """Counts the steps that `CLIPModule` has skipped, and ends the run after several in a row.

    Mixed precision in fp16 skips a few steps at the start, until its loss scale has settled.
    """

    def __init__(self, in_a_row: int = 20) -> None:
        self.in_a_row = in_a_row
        self.left_out = self.row = 0
        self._norms: dict[int, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        self._count()
        return {"left_out": self.left_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.left_out = state_dict["left_out"]

    def _count(self) -> None:
        """Read the norms of the last steps, which waits for a GPU, and count the skipped steps."""
        steps, norms = [*self._norms], [*self._norms.values()]
        self._norms.clear()
        for step, norm in zip(steps, torch.stack(norms).tolist() if norms else [], strict=True):
            self.row = 0 if math.isfinite(norm) else self.row + 1
            self.left_out += self.row > 0
            if self.row == 1:
                rank_zero_warn(
                    f"skipped step {step}, whose gradient is not finite ({norm}); {self.in_a_row} skipped "
                    "steps in a row end the run"
                )
            if self.row >= self.in_a_row:
                return

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Count skipped steps every `CHECKED` steps, warn about the first, and end the run after too many."""
        if is_accumulating(trainer):
            return
        self._norms[trainer.global_step] = pl_module.gradient_norm
        if len(self._norms) < min(CHECKED, self.in_a_row) and not trainer.is_last_batch:
            return
        self._count()
        if self.left_out:
            pl_module.log("train/steps_left_out", float(self.left_out))
        if self.row >= self.in_a_row:
            raise Diverged(
                f"{self.row} steps in a row had a gradient that is not finite, up to step "
                f"{trainer.global_step}; lower --model.optimizer.lr, use --trainer.precision bf16-mixed "
                "instead of 16-mixed, or check the data with clip-lightning data check"
            )


def watch_children() -> None:
    """Replace the handlers of Lightning and torch for a process that has ended, which prevent saving.

    Lightning's thread kills all ranks, possibly while they save. Torch's signal handler raises in the middle
    of a step, which then cannot be saved; without it, the error is raised when the next batch is read.
    """
    signal_handling._SIGCHLD_handler_set = True
    subprocess_script._launch_process_observer = lambda children: threading.Thread(
        target=_watch, args=[children], daemon=True
    ).start()


def _watch(children: Sequence[subprocess.Popen[Any]]) -> None:
    """Print which process has ended, and kill the others if they do not end by themselves."""
    while True:
        time.sleep(1)
        statuses = {rank: child.poll() for rank, child in enumerate(children, start=1)}
        # 130 and 143: the process has saved after a signal
        failed = {rank: status for rank, status in statuses.items() if status not in (None, 0, 130, 143)}
        if failed or None not in statuses.values():
            break
    for rank, status in failed.items():
        reason = signal.Signals(-status).name if status < 0 else f"status {status}"
        note(f"the process of rank {rank} has ended ({reason})")
    if failed:
        time.sleep(60)  # the others fail at their next exchange, save and exit
        for child in children:
            child.kill()
        os.kill(os.getpid(), signal.SIGKILL)
