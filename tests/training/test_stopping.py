"""Stopping a run, by signals or because its gradients are not finite; test_faults covers kills."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from processes import Loop
from small_runs import data, trainer
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clip_lightning.__main__ import _status, main
from clip_lightning.errors import RunFailed
from clip_lightning.training.cli import plain_errors
from clip_lightning.training.module import CLIPModule
from clip_lightning.training.stopping import GracefulStop, NonFinite, requeue

Printed = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode:UserWarning")


ARRAY = {"SLURM_ARRAY_JOB_ID": "417", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.mark.parametrize(("environment", "job"), [({}, "418"), (ARRAY, "417_3")])
def test_a_job_is_requeued(
    tmp_path: Path, monkeypatch: Patch, capfd: Printed, environment: dict[str, str], job: str
) -> None:
    program, notes = tmp_path / "scontrol", tmp_path / "notes"
    given = {"SLURM_JOB_ID": "418", "PATH": f"{tmp_path}:{os.environ['PATH']}", **environment}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    failed = f"the job {job} could not be requeued\n"
    for status, said in ((0, f"{job} was requeued"), (1, f"refused\n{failed}")):
        program.write_text(f'#!/bin/sh\necho "$@" >> {notes}\necho refused >&2\nexit {status}\n')
        program.chmod(0o755)
        requeue()
        assert said in capfd.readouterr().err
    assert notes.read_text() == f"requeue {job}\n" * 2
    monkeypatch.setenv("PATH", "/nowhere")
    requeue()
    assert failed in capfd.readouterr().err


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_stop_after_the_batch(number: signal.Signals, last: bool) -> None:
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    stop, trainer = GracefulStop(), Loop(last=last)
    stop.setup(trainer, None, "fit")
    stop.on_train_start(trainer, None)
    try:
        stop.on_train_batch_end(trainer, None)
        signal.raise_signal(number)
        if number == signal.SIGINT and not last:
            with pytest.raises(KeyboardInterrupt):
                stop.on_train_batch_end(trainer, None)
        else:
            stop.on_train_batch_end(trainer, None)
        assert trainer.received_sigterm == (number != signal.SIGINT)
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
    finally:
        stop.teardown(trainer, None, "fit")
    assert before == {s: signal.getsignal(s) for s in before}


@pytest.mark.parametrize(
    ("number", "environment", "calls"),
    [
        (signal.SIGUSR1, {"SLURM_JOB_ID": "417"}, [requeue]),
        (signal.SIGTERM, {"SLURM_JOB_ID": "417"}, []),
        (signal.SIGUSR1, {}, []),
    ],
)
def test_only_sigusr1_requeues_the_job(number: int, environment: dict[str, str], calls: list[Any]) -> None:
    asked: list[Any] = []
    stop = GracefulStop()
    stop._received = number
    with mock.patch.dict(os.environ, environment), mock.patch("atexit.register", asked.append):
        stop.on_exception(Loop(), None, SIGTERMException())
    assert asked == calls


@pytest.mark.parametrize(
    ("environment", "status"),
    [({}, 143), ({"SLURM_PROCID": "0"}, 143), ({"SLURM_PROCID": "3"}, 0), ({"LOCAL_RANK": "1"}, 0)],
)
def test_only_rank_0_exits_with_the_status_of_a_signal(environment: dict[str, str], status: int) -> None:
    with mock.patch.dict(os.environ, environment, clear=True):
        assert _status(SIGTERMException()) == status


LOST = "[/x/gloo/transport/tcp/pair.cc:545] Read error [::1]: Connection reset by peer"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError(LOST), "another process .*Connection reset by peer.*--ckpt_path last"),
        (torch.distributed.DistNetworkError("x"), "another process of this run has ended"),
        (torch.OutOfMemoryError("Tried to allocate 2 GiB"), "2 GiB; lower --data.batch_size"),
    ],
)
def test_errors_of_torch_are_one_line(error: RuntimeError, message: str) -> None:
    with pytest.raises(RunFailed, match=message), plain_errors():
        raise error
    with pytest.raises(RuntimeError, match=r"^size mismatch$"), plain_errors():
        raise RuntimeError("size mismatch")


# steps whose gradient is not finite


Fit = Callable[..., tuple[CLIPModule, NonFinite]]


class Poison(Callback):
    """Makes a head's gradient NaN after the backward passes of some batches."""

    def __init__(self, batches: set[int], value: float = math.nan) -> None:
        self.batches, self.value, self.batch = batches, value, 0

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch_idx

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if self.batch in self.batches:
            pl_module.clip.heads.text[1].weight.grad[0, 0] = self.value


class Weights(Callback):
    """All weights and both moments after each step."""

    def __init__(self) -> None:
        self.after: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        parts = list(pl_module.parameters())
        for state in trainer.optimizers[0].state.values():
            parts += [state["exp_avg"], state["exp_avg_sq"]]
        self.after.append(torch.cat([part.detach().flatten() for part in parts]))


@pytest.fixture
def fit(make_module: Callable[..., CLIPModule], scenes: Path, tmp_path: Path) -> Fit:
    def run(*callbacks: Callback, image_tower: str = "random:test_vit", **options: Any) -> Any:
        module = make_module(freeze="none", image_tower=image_tower)
        guard = NonFinite(in_a_row=3)
        settings: dict[str, Any] = {"limit_val_batches": 0, "gradient_clip_val": 1.0, **options}
        trainer(tmp_path, *callbacks, guard, **settings).fit(module, data(module, scenes))
        return module, guard

    return run


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.filterwarnings("ignore:skipped step 2")
def test_a_step_is_skipped_and_the_next_is_not(fit: Fit, value: float, precision: str) -> None:
    weights = Weights()
    module, guard = fit(Poison({1}, value), weights, precision=precision)
    first, poisoned, third, _ = weights.after
    assert torch.equal(first, poisoned), "neither weights nor moments"
    assert not torch.equal(poisoned, third)
    assert third.isfinite().all()
    assert (guard.left_out, guard.row) == (1, 0)
    assert module.trainer.callback_metrics["train/steps_left_out"] == 1


class PoisonForward(Callback):
    """Makes an image infinite, and with it the statistics of batch norms."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            batch["pixel_values"] = torch.full_like(batch["pixel_values"], math.inf, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:skipped step .")
def test_skipped_steps_do_not_change_batch_norms(fit: Fit) -> None:
    module, guard = fit(PoisonForward(), image_tower="random:test_resnet")
    assert guard.left_out == 1
    statistics = [b for name, b in module.named_buffers() if "running" in name]
    assert statistics
    assert all(statistic.isfinite().all() for statistic in statistics)


def test_skipped_steps_in_a_row_end_the_run(fit: Fit) -> None:
    with pytest.warns(UserWarning, match=r"skipped step 2, whose gradient is not finite \(nan\)") as said:
        with pytest.raises(RunFailed, match=r"3 steps in a row .* not finite, up to step 4"):
            fit(Poison({1, 2, 3}))
    assert sum("skipped step" in str(warning.message) for warning in said) == 1


@pytest.mark.filterwarnings("ignore:skipped step .")
def test_accumulated_gradients_are_one_step(fit: Fit) -> None:
    weights = Weights()
    _, guard = fit(Poison({0}), weights, accumulate_grad_batches=2)
    assert (guard.left_out, guard.row) == (1, 0)
    before, skipped = weights.after[:2]  # the skipped step has added moments, which are zeros
    assert torch.equal(before, skipped[: len(before)]) and not skipped[len(before) :].any()
    assert not torch.equal(weights.after[2], weights.after[3])


@pytest.mark.filterwarnings("ignore:skipped step .")
def test_separate_skipped_steps_are_counted_in_the_checkpoint(fit: Fit, tmp_path: Path) -> None:
    module, guard = fit(Poison({0, 1, 3}))
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["NonFinite"]
    again = NonFinite()
    again.load_state_dict(stored)
    assert again.left_out == guard.left_out == 3


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning")
@pytest.mark.filterwarnings("ignore:the scale has collapsed:UserWarning")
def test_the_command_ends_with_status_1(
    command: Callable[..., list[str]], tmp_path: Path, capsys: Printed
) -> None:
    options = {"model__freeze": "none", "model__optimizer.lr": 1e38, "model__optimizer.warmup": 0.0}
    options |= {"data__cache": "off", "trainer__max_epochs": 20, "trainer__limit_val_batches": 0}
    with pytest.warns(UserWarning, match="not finite"):
        assert main(command("fit", tmp_path / "runs", **options)) == 1
    assert "20 steps in a row had a gradient that is not finite" in capsys.readouterr().err
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "checkpoints" / "last.ckpt").is_file()


class Waits(Callback, TorchFunctionMode):
    """Counts in each step, from its batch to its end, what would wait for a GPU."""

    READS = (Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.__float__, Tensor.__bool__, Tensor.__int__)

    def __init__(self) -> None:
        super().__init__()
        self.in_step, self.after = False, dict[int, list[str]]()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.in_step and func in self.READS:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))

    def on_train_batch_start(self, *_: Any) -> None:
        self.in_step, self.found = True, []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.in_step, self.after[trainer.global_step] = False, self.found


@pytest.mark.parametrize("freeze", ["both", "text"])
def test_a_step_does_not_wait_for_the_device_unless_it_is_logged(
    make_module: Callable[..., CLIPModule], scenes: Path, tmp_path: Path, freeze: str
) -> None:
    module, waits = make_module(freeze=freeze), Waits()
    options = {"max_epochs": 2, "limit_val_batches": 0, "gradient_clip_val": 1.0, "log_every_n_steps": 3}
    fitting = trainer(tmp_path, NonFinite(), waits, **options)
    batches = data(module, scenes, batch_size=4, cache=str(tmp_path / "cache"))
    with waits:
        fitting.fit(module, batches)
    last = len(batches.images("train")) // 4
    between = {step for step in waits.after if step % 3 and step % last}
    assert len(between) > 4
    assert not [step for step in between if waits.after[step]]
