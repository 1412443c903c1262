"""Several processes that train together: agreeing among them, and ending when one of them has."""

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
_STOPPED = (0, 130, 143)  # by itself, or by a signal after which it has saved
# What gloo, NCCL and the rendezvous store say when a connection is gone.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "before timing out",
)
# What torch says when a process that reads data is gone.
_LOST_WORKER = re.compile(
    r"DataLoader worker \(pid.*?\d\) (?:is )?(killed by signal: [\w ]+|exited unexpectedly)"
)


class Agreement:
    """The largest of all ranks' numbers, told by way of the CPUs: a GPU is not waited for."""

    def __init__(self) -> None:
        self._group: Any = None

    def largest(self, number: int) -> int:
        """Every rank has to ask at the same step."""
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return number
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        answer = torch.tensor(number)
        torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(answer)


def lost_rank(error: BaseException) -> RunFailed | None:
    """What to say of an error that another process's end has brought about; None of any other."""
    if isinstance(error, RuntimeError) and (worker := _LOST_WORKER.match(str(error))):
        return RunFailed(
            f"a loader process has ended ({worker[1]}); if memory was short, lower --data.num_workers; "
            "then go on with --ckpt_path last"
        )
    distributed = torch.distributed
    kinds = (distributed.DistNetworkError, distributed.DistBackendError, distributed.DistStoreError)
    known = isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)
    if not isinstance(error, kinds) and not known:
        return None
    return RunFailed(
        "another process of this run has ended or cannot be reached; see what it said, then go on with "
        "--ckpt_path last"
    )


def watch_children() -> None:
    """Notice that a process has ended where nothing is cut short.

    The thread by which Lightning watches ranks kills all with SIGKILL, in the middle of saving: `_Watch` is
    in its place. The handler by which torch watches loaders raises in the middle of a step, and what is saved
    then is half a step: without it, the next batch that is asked for tells, within seconds.
    """
    signal_handling._SIGCHLD_handler_set = True
    subprocess_script._launch_process_observer = lambda children: _Watch(children).start()


class _Watch(threading.Thread):
    """Says which process has ended, and ends the others if they have not noticed after a while."""

    def __init__(self, children: Sequence[subprocess.Popen[Any]]) -> None:
        super().__init__(daemon=True, name="watch-ranks")  # ends with this process
        self._children = children

    def run(self) -> None:
        while any(child.poll() is None for child in self._children) and not self._failed():
            time.sleep(1)
        for rank, status in self._failed().items():
            print(f"the process of rank {rank} has ended ({_reason(status)})", file=sys.stderr)
        if self._failed():
            # what the others do next tells them, and they save and leave
            time.sleep(GRACE_SECONDS)
            for child in self._children:
                child.kill()
            os.kill(os.getpid(), signal.SIGKILL)

    def _failed(self) -> dict[int, int]:
        statuses = {rank: child.poll() for rank, child in enumerate(self._children, start=1)}
        return {
            rank: status for rank, status in statuses.items() if status is not None and status not in _STOPPED
        }


def _reason(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"
