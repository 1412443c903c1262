"""Ends a run if one of its processes has ended, so that the others can save instead of waiting forever."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.strategies.launchers import subprocess_script
from torch.utils.data._utils import signal_handling

from clip_lightning.errors import RunFailed

GRACE_SECONDS = 60
_SAVED = (0, 130, 143)  # the status of a process that has finished, or saved after a signal
# The messages of gloo, NCCL and the rendezvous store about a lost connection.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "before timing out",
)
# The message of torch about a loader process that has ended.
_LOST_WORKER = re.compile(
    r"DataLoader worker \(pid.*?\d\) (?:is )?(killed by signal: [\w ]+|exited unexpectedly)"
)


def lost_rank(error: BaseException) -> RunFailed | None:
    """Return the message for an error that the end of another process has caused, or None for any other."""
    if isinstance(error, RuntimeError) and (worker := _LOST_WORKER.match(str(error))):
        return RunFailed(
            f"a loader process has ended ({worker[1]}); if it ran out of memory, lower --data.num_workers, "
            "and resume with --ckpt_path last"
        )
    distributed = torch.distributed
    kinds = (distributed.DistNetworkError, distributed.DistBackendError, distributed.DistStoreError)
    known = isinstance(error, RuntimeError) and any(message in str(error) for message in _LOST)
    if not isinstance(error, kinds) and not known:
        return None
    return RunFailed(
        "another process of this run has ended or cannot be reached; see its messages, and resume with "
        "--ckpt_path last"
    )


def watch_children() -> None:
    """Replace the handlers of Lightning and torch for a process that has ended, which prevent saving.

    Lightning's thread kills all ranks, possibly while they save: `_Watch` replaces it. Torch's signal handler
    raises in the middle of a step, which then cannot be saved. Without the handler, the error is raised
    seconds later, when the next batch is read.
    """
    signal_handling._SIGCHLD_handler_set = True
    subprocess_script._launch_process_observer = lambda children: _Watch(children).start()


class _Watch(threading.Thread):
    """Prints which process has ended, and kills the others if they do not end by themselves."""

    def __init__(self, children: Sequence[subprocess.Popen[Any]]) -> None:
        super().__init__(daemon=True, name="watch-ranks")  # ends with this process
        self._children = children

    def run(self) -> None:
        while any(child.poll() is None for child in self._children) and not self._failed():
            time.sleep(1)
        for rank, status in self._failed().items():
            reason = signal.Signals(-status).name if status < 0 else f"status {status}"
            print(f"the process of rank {rank} has ended ({reason})", file=sys.stderr)
        if self._failed():
            # the others fail at their next exchange, save and exit
            time.sleep(GRACE_SECONDS)
            for child in self._children:
                child.kill()
            os.kill(os.getpid(), signal.SIGKILL)

    def _failed(self) -> dict[int, int]:
        statuses = {rank: child.poll() for rank, child in enumerate(self._children, start=1)}
        return {
            rank: status for rank, status in statuses.items() if status is not None and status not in _SAVED
        }
