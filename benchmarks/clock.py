"""What a trainer's process writes down while it runs, and the process itself under a cap.

`steps.txt` has the time at which each optimiser step ended, `validations.jsonl` each validation, `NNNNNN.pt`
the weights after step N. All times are seconds since the epoch, so that they compare with the start of the
process that the parent notes.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent


class Recorder:
    """Writes the time of every step, and the weights every `every` seconds (0: never)."""

    def __init__(self, folder: Path, every: float = 0) -> None:
        self.folder, self.every = folder, every
        self.steps = 0
        self._saved = time.time()
        folder.mkdir(parents=True, exist_ok=True)

    def step(self, state: Callable[[], dict[str, Tensor]]) -> None:
        """A step has ended; `state` gives the weights if they are wanted."""
        now = time.time()
        self.steps += 1
        with (self.folder / "steps.txt").open("a") as file:
            file.write(f"{now:.3f}\n")
        if self.every and now - self._saved >= self.every:
            self.save(state())

    def save(self, state: dict[str, Tensor]) -> None:
        """Write the weights under the number of the last step."""
        self._saved = time.time()
        draft = self.folder / "draft"
        torch.save({"time": self._saved, "step": self.steps, "state": state}, draft)
        draft.rename(self.folder / f"{self.steps:06d}.pt")


@dataclass
class Process:
    """A process under our clock, which stands still while it is stopped.

    SIGUSR1 to the benchmark stops the running process and all its children, SIGUSR2 lets them go on, so that
    somebody can use the machine in between.
    """

    began: float
    seconds: float = 0.0
    capped: bool = False
    pauses: list[list[float]] = field(default_factory=list)

    def at(self, moment: float) -> float:
        """Seconds of the process's running until `moment` (seconds since the epoch)."""
        paused = sum(max(0.0, min(end, moment) - start) for start, end in self.pauses)
        return moment - self.began - paused

    @property
    def stopped(self) -> bool:
        """Whether the clock stands still."""
        return bool(self.pauses) and self.pauses[-1][1] == math.inf

    def stop(self, group: int) -> None:
        """Stop every process of the group."""
        if not self.stopped:
            os.killpg(group, signal.SIGSTOP)
            self.pauses.append([time.time(), math.inf])

    def go_on(self, group: int) -> None:
        """Let a stopped group run again."""
        if self.stopped:
            self.pauses[-1][1] = time.time()
            os.killpg(group, signal.SIGCONT)


def run_capped(words: list[str], log: Path, cap: float | None = None, **environment: str) -> Process:
    """Run a command with its output in `log`; after `cap` seconds of running it and its children are ended.

    Raises:
        SystemExit: it failed by itself.
    """
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "PYTHONPATH": str(HERE)}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the child is ended with this process
    process = Process(time.time())
    with log.open("w") as output:
        child = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, env=env | environment, start_new_session=True
        )
        signal.signal(signal.SIGUSR1, lambda *_: process.stop(child.pid))
        signal.signal(signal.SIGUSR2, lambda *_: process.go_on(child.pid))
        try:
            while (status := child.poll()) is None and (cap is None or process.at(time.time()) < cap):
                time.sleep(0.05)
        finally:
            for number in (signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, signal.SIG_IGN)
            process.seconds = process.at(time.time())
            if child.poll() is None:
                _end(child)
    if status:
        lines = log.read_text(errors="replace").splitlines()[-15:]
        raise SystemExit("\n".join([*lines, f"failed with status {status}: {' '.join(words)}"]))
    process.capped = status is None
    return process


def _end(child: subprocess.Popen[Any]) -> None:
    os.killpg(child.pid, signal.SIGTERM)
    os.killpg(child.pid, signal.SIGCONT)  # it may have been stopped
    try:
        child.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def step_times(folder: Path, process: Process) -> list[float]:
    """When each step ended, in seconds of the process's running."""
    file = folder / "steps.txt"
    return [process.at(float(line)) for line in file.read_text().split()] if file.exists() else []


def steps_per_second(times: list[float], skip: int) -> float:
    """Rate of the steps after the first `skip`, or of what there is if they are fewer; 0 of less than two."""
    times = times[min(skip, max(len(times) - 2, 1)) - 1 :]
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0


def python(program: str, *words: object) -> list[str]:
    """The command line of a program of this folder."""
    return [sys.executable, str(HERE / program), *map(str, words)]
