"""What stops a run: Ctrl-C, SIGTERM and SIGUSR1, on every rank after the same step, and early stopping."""

from __future__ import annotations

import atexit
import os
import re
import signal
import subprocess
import sys
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities.exceptions import SIGTERMException

from clip_lightning.errors import AgreedStop
from clip_lightning.training.checkpoints import accumulates, all_ranks_save, within_a_step
from clip_lightning.training.ranks import Agreement

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class GracefulStop(Callback):
    """Finishes the current step or validation after the first signal; a second Ctrl-C does not wait for it.

    It is enough that one rank receives it. SIGUSR1 is what schedulers send some time before a job's end: in a
    job of SLURM it is put back into the queue.

    Args:
        says_how: whether the run is the command itself, which then says how it goes on.
    """

    def __init__(self, says_how: bool = True) -> None:
        self._says_how = says_how
        self._asked = 0  # the signal's number
        self._before: dict[int, Any] = {}
        self._agreement = Agreement()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A warning that comes while frozen towers run does not end the process."""
        self._take_over(signal.SIGUSR1)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals, also from Lightning, which would have ranks stop at different batches."""
        for number in _SIGNALS:
            self._take_over(number)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop here if asked; after an epoch's last batch, Ctrl-C lets its validation come first.

        While gradients are accumulated nothing stops: a checkpoint does not hold them.
        """
        if accumulates(trainer):
            return
        self._asked = self._agreement.largest(self._asked)
        if self._asked in (signal.SIGTERM, signal.SIGUSR1):
            # Lightning raises when it has counted the batch; then a resumed run knows that it is done
            trainer._signal_connector.received_sigterm = True
        elif self._asked and not trainer.is_last_batch:
            raise AgreedStop

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how to go on, or have the scheduler do so."""
        if not isinstance(exception, KeyboardInterrupt | SIGTERMException) or not trainer.is_global_zero:
            return
        if self._asked == signal.SIGUSR1 and (job := slurm_job()):
            atexit.register(requeue, job)  # when everything is saved
        if not self._says_how:
            return
        if trainer.global_step > 0:
            saved = all_ranks_save(trainer, exception) and not within_a_step(trainer)
            place = "here" if saved else "the last checkpoint"
            print(f"stopped; the same command with --ckpt_path last goes on from {place}", file=sys.stderr)
        else:
            print("stopped before the first step", file=sys.stderr)

    def _take_over(self, number: signal.Signals) -> None:
        """Only the main thread may; W&B's agents train in another."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(number) != self._ask:
            before = signal.signal(number, self._ask)
            self._before.setdefault(number, before)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self._asked == signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = signum
        again = "; Ctrl-C again stops at once" if signum == signal.SIGINT else ""
        print(f"\nstopping after this step{again}", file=sys.stderr)


class EarlyStopping(callbacks.EarlyStopping):
    """Lightning's early stopping, with which a resumed run that had stopped does not train another epoch.

    A higher `patience` than before lets it continue; Lightning would restore the old value.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore everything but the patience."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before the first step if the checkpoint is of a run that had stopped."""
        out_of_patience = self.stopping_reason == EarlyStoppingReason.PATIENCE_EXHAUSTED
        has_more_now = out_of_patience and self.wait_count < self.patience
        if self.stopping_reason != EarlyStoppingReason.NOT_STOPPED and not has_more_now:
            trainer.should_stop = True
            if trainer.is_global_zero:
                print(
                    f"the run had stopped early ({self.stopping_reason_message}); a higher "
                    "--early_stopping.patience than before would let it continue",
                    file=sys.stderr,
                )


def slurm_job() -> str | None:
    """The job that this process is part of, as `scontrol` names it; None outside of one."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    return job if re.fullmatch(r"\d+(_\d+)?", job) else None


def requeue(job: str) -> None:
    """Put the job back into the queue; its command goes on with `--ckpt_path auto`."""
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    except OSError as error:
        print(f"the job {job} is not put back into the queue: scontrol: {error.strerror}", file=sys.stderr)
        return
    said = " ".join((done.stderr or done.stdout).split())
    if done.returncode:
        print(f"the job {job} is not put back into the queue: scontrol: {said}", file=sys.stderr)
    else:
        print(f"the job {job} is back in the queue", file=sys.stderr)
